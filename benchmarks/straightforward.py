"""ESPO as one would first write it: the baseline that the library's speed is measured against.

Plain PyTorch, one page, the order of work of the authors' trainer: every forward pass builds the logits
of every position, [B, P + L, V]; the two halves of a coupled mask are two passes; old policy and
reference are scored once for each of the mu updates, on fresh masks, before the first of them; the sampler adds Gumbel
noise to all logits and picks the tokens to commit row by row. The network is the same transformers model object as
the library's, so that only the algorithm around it differs. Prompts are unpadded.

`competent.py` has what a second version would do better, as arguments of `Straightforward`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import user_seconds
from torch import Tensor, nn

from espo_lightning import Decoding, Masks, Policy, Prompts, espo_loss
from espo_lightning.decoding import masked as sampler
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.scoring.score import score


def log_probs(model: nn.Module, mask_id: int, prompts: Tensor, completion: Tensor, hidden: Tensor) -> Tensor:
    """log p of every completion token [B, L], hidden or not, with ``hidden`` shown as the mask token."""
    noisy = torch.where(hidden, mask_id, completion)
    logits = model(torch.cat([prompts, noisy], 1), use_cache=False).logits.float()
    logits = logits[:, -completion.shape[1] :]
    return -F.cross_entropy(logits.flatten(0, 1), completion.flatten(), reduction="none").view_as(completion)


def terms(
    model: nn.Module, mask_id: int, prompts: Tensor, completion: Tensor, masks: Masks, log_probs: Callable = log_probs
) -> Tensor:
    """Weighted log-probabilities [M, B, L] of a coupled ELBO estimate: two passes per draw."""
    draws = []
    for hidden, weight in zip(masks.hidden, masks.weight):
        first = log_probs(model, mask_id, prompts, completion, hidden)
        second = log_probs(model, mask_id, prompts, completion, ~hidden)
        draws.append(weight * torch.where(hidden, first, second))
    return torch.stack(draws)


@torch.no_grad()
def generate(
    model: nn.Module,
    mask_id: int,
    prompts: Tensor,
    length: int,
    block: int,
    steps: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Low-confidence decoding, block by block: [B, P] -> [B, L]."""
    canvas = torch.cat([prompts, prompts.new_full((len(prompts), length), mask_id)], 1)
    per_block = steps * block // length
    base, extra = divmod(block, per_block)
    for step in range(steps):
        current, number = divmod(step, per_block)
        masked = canvas == mask_id
        masked[:, prompts.shape[1] + (current + 1) * block :] = False
        logits = model(canvas, use_cache=False).logits.float()
        logits[:, :, mask_id] = float("-inf")  # neither a token nor part of a confidence
        probabilities = logits.softmax(-1)
        if temperature:
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            logits = logits.double() / temperature - torch.log(-torch.log(uniform))
        proposal = logits.argmax(-1)
        confidence = probabilities.gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
        confidence = torch.where(masked, confidence, float("-inf"))
        for row in range(len(canvas)):
            chosen = confidence[row].topk(base + (number < extra)).indices
            canvas[row, chosen] = proposal[row, chosen]
    return canvas[:, prompts.shape[1] :]


@dataclass
class Straightforward:
    """One outer step at a time: rollout, rewards, mu updates.

    Args:
        model, reference: transformers causal LMs without a causal mask; ``reference`` may be None if beta is 0.
        optimizer: of the model's parameters.
        mask_id: the mask token.
        length, block, steps, group, updates, draws: L, block length, denoising steps, G, mu, M.
        micro_batch: completions per forward and backward pass.
        clip_range, beta, max_norm: eps, KL coefficient, gradient clipping.
        generator: of Gumbel noise and masks.
        log_probs, generate: how completions are scored and decoded.
    """

    model: nn.Module
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    mask_id: int
    length: int
    block: int
    steps: int
    group: int
    updates: int
    draws: int
    micro_batch: int
    clip_range: float
    beta: float
    max_norm: float
    generator: torch.Generator
    log_probs: Callable[..., Tensor] = log_probs
    generate: Callable[..., Tensor] = generate

    def outer_step(self, prompts: Tensor, reward: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Prompts [Q, P] -> user CPU seconds of the three phases."""
        seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}
        start = user_seconds()
        prompts = prompts.repeat_interleave(self.group, 0)
        completion = self.complete(prompts, temperature=1.0)
        rewards = reward(completion).view(-1, self.group)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) * self.group / (self.group - 1)).flatten()
        seconds["rollout"] += user_seconds() - start
        start = user_seconds()
        scored = [self.score(prompts, completion, advantages) for _ in range(self.updates)]
        seconds["score"] = user_seconds() - start
        start = user_seconds()
        for batches in scored:
            self.optimizer.zero_grad()
            for batch in batches:
                (self.loss(*batch) / len(batches)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
        seconds["update"] = user_seconds() - start
        return seconds

    def score(self, prompts: Tensor, completion: Tensor, advantages: Tensor) -> list[tuple]:
        """The micro-batches of one update: prompts, completions, fresh masks, terms of old policy and reference."""
        batches = []
        for rows in torch.arange(len(prompts)).split(self.micro_batch):
            batch = prompts[rows], completion[rows], self.draw_masks(len(rows))
            with torch.no_grad():
                old = self.terms(self.model, *batch)
                ref = self.terms(self.reference, *batch) if self.beta else None
            batches.append((*batch, old, ref, advantages[rows]))
        return batches

    def terms(self, model: nn.Module, prompts: Tensor, completion: Tensor, masks: Masks) -> Tensor:
        return terms(model, self.mask_id, prompts, completion, masks, self.log_probs)

    def draw_masks(self, batch: int) -> Masks:
        """Fresh coupled masks: k uniform on 0..L, then k random positions."""
        hidden = torch.zeros(self.draws, batch, self.length, dtype=torch.bool)
        weight = torch.zeros(self.draws, batch, self.length)
        for m in range(self.draws):
            for b in range(batch):
                k = int(torch.randint(0, self.length + 1, (), generator=self.generator))
                hidden[m, b, torch.randperm(self.length, generator=self.generator)[:k]] = True
                weight[m, b] = 0.5 * (self.length + 1) / max(1, self.length - k)
                weight[m, b, hidden[m, b]] = 0.5 * (self.length + 1) / max(1, k)
        return Masks(hidden, weight, coupled=True)

    def loss(self, prompts, completion, masks, old, ref, advantages) -> Tensor:
        """The clipped sequence-level surrogate and the k2 penalty, a mean over the completions."""
        scores = self.terms(self.model, prompts, completion, masks).sum(-1).mean(0)
        ratio = ((scores - old.sum(-1).mean(0)) / self.length).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if self.beta:
            loss = loss + self.beta * 0.5 * (scores - ref.sum(-1).mean(0)) ** 2 / self.length
        return loss.mean()

    def complete(self, prompts: Tensor, temperature: float) -> Tensor:
        return self.generate(
            self.model, self.mask_id, prompts, self.length, self.block, self.steps, temperature, self.generator
        )


def assert_same(baseline: Straightforward, policy: Policy, prompts: Tensor) -> dict[str, float]:
    """The library computes what the baseline computes: greedy completions, terms, loss and gradient on equal masks.

    Returns:
        The largest differences, that of the gradient relative to its norm.

    Raises:
        AssertionError: they differ by more than float32 tolerance.
    """
    batch = Prompts(prompts, None)
    keys = torch.arange(len(prompts))
    decoding = Decoding(baseline.length, baseline.block, baseline.steps, temperature=0.0)
    completion = sampler.generate(policy, batch, keys, decoding)
    assert torch.equal(completion, baseline.complete(prompts, temperature=0.0)), "greedy completions differ"

    masks = ELBO(draws=baseline.draws).draw(keys, baseline.length)
    advantages = torch.linspace(-1, 1, len(prompts))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact = baseline.terms(baseline.model, prompts, completion, masks)
        old, ref = (exact + 0.1 * torch.randn(exact.shape, generator=noise) for _ in range(2))

    own = score(policy, batch, completion, masks)
    loss, _ = espo_loss(own, old, ref, advantages, clip_range=baseline.clip_range, beta=baseline.beta)
    library = torch.autograd.grad(loss, list(policy.model.parameters()))
    plain_loss = baseline.loss(prompts, completion, masks, old, ref, advantages)
    plain = torch.autograd.grad(plain_loss, list(baseline.model.parameters()))

    norm = torch.stack([g.norm() for g in plain]).norm()
    difference = {
        "terms": float((own - exact).detach().abs().max()),
        "loss": float((loss - plain_loss).detach().abs()),
        "gradient": float(torch.stack([(a - b).norm() for a, b in zip(library, plain)]).norm() / norm),
    }
    tolerance = {"terms": 1e-5 * float(exact.abs().max()), "loss": 1e-5, "gradient": 1e-4}
    assert all(difference[key] <= tolerance[key] for key in difference), f"{difference} exceeds {tolerance}"
    return difference
