"""Notebook 12: what a loose bound costs a policy gradient, and what the noise of its estimate costs, on exact laws.

Policies have 3 symbols on 6 positions, so that all 729 completions and their 4,096 states can be enumerated. They are
tables, or small transformers with full or block-causal attention, whose orders agree more or less.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import CompletionLaw, completion_law, enumerate_completions
from espo_lightning.lab.exact_blocks import block_completion_law
from espo_lightning.lab.gradients import cosine
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.scoring.block import BlockELBO
from espo_lightning.scoring.likelihood import ELBO, Likelihood

SYMBOLS, LENGTH = 3, 6
PROMPT = Prompts(torch.zeros(1, 1, dtype=torch.int64), None)
LESSON, MASK, WORD = range(3)  # purposes of random keys


class WithoutMask(Policy):
    """A policy whose law over tokens leaves out the mask, its last token, as decoders do."""

    def forward(self, ids: Tensor, attention: Tensor | None, select: Tensor, reduce: Callable, *columns, **more):
        def among_symbols(logits: Tensor, *columns: Tensor):
            return reduce(logits.index_fill(-1, torch.tensor(SYMBOLS), float("-inf")), *columns)

        return super().forward(ids, attention, select, among_symbols, *columns, **more)


def network(seed: int, block: int | None, scale: float) -> WithoutMask:
    """A transformer with weights drawn at random, ``scale`` times the usual ones: larger ones are more opinionated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SYMBOLS + 1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        is_causal=False,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator; leave it as it was
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, scale / weight.shape[-1] ** 0.5, generator=generator)
    return WithoutMask(model.double(), None, mask_id=SYMBOLS, layout=Layout(block, "response")).eval()


def likelihood_of(policy: nn.Module) -> Likelihood:
    """The ELBO for the policy's attention, by one coupled draw."""
    block = getattr(policy, "layout", Layout()).block
    return ELBO() if block is None else BlockELBO(block=block)


def law_of(policy: nn.Module) -> CompletionLaw:
    """Of every completion, with its graph: the decoder's log-likelihood, and the ELBO."""
    law = completion_law if getattr(policy, "layout", Layout()).block is None else block_completion_law
    return law(policy, PROMPT, SYMBOLS, LENGTH)


def teach(policy: nn.Module, target: Tensor, seed: int, lessons: int, batch: int = 64, lr: float = 3e-3) -> None:
    """``lessons`` batches of completions drawn from a law [V^L], scored as supervised training does."""
    words, likelihood = enumerate_completions(SYMBOLS, LENGTH), likelihood_of(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for step in range(lessons):
        generator = torch.Generator().manual_seed(int(fold_in(fold_in(seed, LESSON), torch.tensor(step))) % 2**31)
        answers = words[torch.multinomial(target, batch, replacement=True, generator=generator)]
        keys = fold_in(fold_in(fold_in(seed, MASK), step), torch.arange(batch))
        masks = likelihood.draw(keys, LENGTH)
        prompts = Prompts(PROMPT.ids.expand(batch, -1), None)
        loss = -likelihood.terms(policy, prompts, answers, masks).sum(-1).mean() / LENGTH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def noisy_table(seed: int, level: float) -> TabularPolicy:
    """The conditionals of one joint law, on which all orders agree, with noise of standard deviation ``level``."""
    generator = torch.Generator().manual_seed(seed)
    agreeing = TabularPolicy(SYMBOLS, LENGTH, generator=generator, consistent=True)
    table = TabularPolicy(SYMBOLS, LENGTH, generator=generator, scale=level)
    with torch.no_grad():
        table.table += agreeing.logits()
    return table


def taught(seed: int, block: int | None, lessons: int) -> WithoutMask:
    """A transformer that was taught a law whose logits are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(SYMBOLS**LENGTH, generator=generator, dtype=torch.float64)).softmax(0)
    policy = network(seed, block, scale=1.0)
    teach(policy, target, seed, lessons)
    return policy


KINDS: dict[str, Callable[[int, float], nn.Module]] = {  # kind -> (seed, level) -> policy
    "table": noisy_table,
    "random network": lambda seed, level: network(seed, None, level),
    "taught network": lambda seed, level: taught(seed, None, int(level)),
    "blocks": lambda seed, level: taught(seed, None if level == LENGTH else int(level), BLOCK_LESSONS),
}
BLOCK_LESSONS = 400  # of every policy of the kind "blocks", whose levels are block sizes


# ---- rewards -----------------------------------------------------------------------------------------------


def rewards_of(seed: int, law: CompletionLaw) -> dict[str, Tensor]:
    """Three rewards [V^L]: the share of tokens that a hidden word has; one word in ten; a gap above the median.

    The last one goes with the gap as closely as a reward can.
    """
    words, generator = enumerate_completions(SYMBOLS, LENGTH), torch.Generator().manual_seed(seed)
    hidden = words[int(torch.randint(len(words), (), generator=generator))]
    gap = (law.log_likelihood - law.elbo).detach()
    return {
        "share": (words == hidden).double().mean(1),
        "one in ten": (torch.rand(len(words), generator=generator) < 0.1).double(),
        "gap": (gap > gap.median()).double(),
    }


# ---- what is measured --------------------------------------------------------------------------------------


def bound(seed: int, *, levels: dict[str, list[float]], samples: int, gain: float) -> dict:
    """The ELBO's policy gradient against the exact one, for policies of every kind and level, and three rewards.

    Args:
        levels: kind, of `KINDS` -> its levels.
        samples: completions whose sampled gradients give the noise, with two mask draws each.
        gain: first-order gain of the exact step whose improvement is measured.

    Returns:
        "rows": of every policy and reward, see `measure`.
    """
    return {
        "rows": [
            {"kind": kind, "level": level, **row}
            for kind, of_kind in levels.items()
            for level in of_kind
            for row in measure(KINDS[kind](seed, level), seed, samples, gain)
        ]
    }


def measure(policy: nn.Module, seed: int, samples: int, gain: float) -> list[dict]:
    """For every reward: "gap" and "gap_sd", mean and standard deviation in nats over the policy's completions;
    "correlation" of the gap with the reward; "cosine" of the ELBO's centred policy gradient with the exact one, and
    its "norm" relative to it; "improvement", the exact mean reward gained by a step along it over that gained by an
    equally long exact step; "completion_noise" and "mask_noise", the variance of one completion's gradient with one
    coupled draw, in two parts, over the squared norm of its mean.
    """
    law = law_of(policy)
    p = law.log_likelihood.detach().exp()
    gap = (law.log_likelihood - law.elbo).detach()
    squares, differences, drawn = score_noise(policy, p, seed, samples)
    rows = []
    for name, reward in rewards_of(seed, law).items():
        advantage = reward - p @ reward
        if p @ advantage.square() < 1e-12:  # with a tight bound no completion's gap is above the median
            continue
        exact, elbo = (flat_gradient(policy, (p * advantage * score).sum()) for score in law)
        mean_square = float(elbo.square().sum())
        weight = advantage[drawn].square()
        total, masks = float((weight * squares).mean()), float((weight * differences).mean()) / 2
        rows.append(
            {
                "reward": name,
                "gap": float(p @ gap),
                "gap_sd": float((p @ (gap - p @ gap).square()).sqrt()),
                "correlation": correlation(gap, reward, p),
                "cosine": cosine(elbo, exact),
                "norm": float(elbo.norm() / exact.norm()),
                "improvement": improvement(policy, elbo, exact, reward, gain),
                "completion_noise": (total - masks) / mean_square - 1,  # by sampling; may come out below 0
                "mask_noise": masks / mean_square,
            }
        )
    return rows


def flat_gradient(policy: nn.Module, value: Tensor) -> Tensor:
    """Of a scalar in the policy's parameters, keeping the graph: [P]."""
    return parameters_to_vector(torch.autograd.grad(value, [*policy.parameters()], retain_graph=True))


def correlation(x: Tensor, y: Tensor, p: Tensor) -> float:
    """Pearson's, for indices drawn from p; 0 if one of them does not vary."""
    x, y = x - p @ x, y - p @ y
    spread = (p @ x.square() * (p @ y.square())).sqrt()
    return float(p @ (x * y) / spread) if spread > 1e-12 else 0.0


def score_noise(policy: nn.Module, p: Tensor, seed: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of sampled gradients of the score: [S] squared norms, [S] squared distances of two draws, [S] which completions.

    Two independent coupled draws for every completion y ~ p.
    """
    words, likelihood = enumerate_completions(SYMBOLS, LENGTH), likelihood_of(policy)
    generator = torch.Generator().manual_seed(int(fold_in(seed, WORD)) % 2**31)
    drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
    masks = likelihood.draw(fold_in(fold_in(seed, MASK), torch.arange(2 * samples)), LENGTH)
    squares, differences = torch.empty(2, samples, dtype=torch.float64)
    for i, index in enumerate(drawn.tolist()):
        word, both = words[index].unsqueeze(0), []
        for row in (2 * i, 2 * i + 1):
            terms = likelihood.terms(policy, PROMPT, word, masks.of(slice(row, row + 1)))
            both.append(flat_gradient(policy, terms.sum()))
        squares[i] = sum(float(g.square().sum()) for g in both) / 2
        differences[i] = float((both[0] - both[1]).square().sum())
    return squares, differences, drawn


@torch.no_grad()
def improvement(policy: nn.Module, along: Tensor, exact: Tensor, reward: Tensor, gain: float) -> float:
    """Gain of the exact mean reward by a step along a gradient, over that by an equally long step along the exact one.

    The step is so long that the exact one gains ``gain`` to first order.
    """
    parameters = [*policy.parameters()]
    start = parameters_to_vector(parameters).clone()
    values = []
    for step in (torch.zeros_like(exact), along / along.norm(), exact / exact.norm()):
        vector_to_parameters(start + gain / exact.norm() * step, parameters)
        values.append(float(law_of(policy).log_likelihood.exp() @ reward))
    vector_to_parameters(start, parameters)
    return (values[1] - values[0]) / (values[2] - values[0])


def kept(row: dict, forwards: int, draws: int = 1, tight: bool = False) -> float:
    """About how much of an exact step's gain survives bias and noise: cos / sqrt(1 + noise / n).

    A gradient of n completions is the biased mean plus noise, whose square is the variance of one over n; what is
    orthogonal to the exact gradient gains nothing to first order.

    Args:
        row: of `measure`.
        forwards: in one pass with gradient; a completion takes two for each of its coupled draws.
        draws: M.
        tight: as if the bound were tight: cosine 1, the noise as it is.
    """
    completions = forwards / (2 * draws)
    noise = max(0.0, row["completion_noise"] + row["mask_noise"] / draws) / completions
    return (1.0 if tight else row["cosine"]) / (1 + noise) ** 0.5
