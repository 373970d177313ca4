"""Decoding: from prompts to completions by iterated unmasking. Everything random is keyed.

A step *proposes* a token for every hidden position of the active block (`warp`, `sample_tokens`), ranks the proposals
by an *order* and commits as many as its `Step` says. The published decoders are choices of these three:

    LLaDA low confidence     order=low_confidence                                    schedule=even_schedule
    LLaDA random             order=random_order                                      schedule=even_schedule
    Dream entropy, margin    order=entropy_order, margin_order; top_p;               schedule=dream_schedule
                             order_temperature (alg_temp); block_length=length
    Dream origin             order=random_order; top_p; block_length=length          schedule=origin_schedule
    Fast-dLLM parallel       order=low_confidence; threshold; steps=length           schedule=even_schedule

LLaDA's decoder is that of https://github.com/ML-GSAI/LLaDA (generate.py), Dream's that of
https://github.com/DreamLM/Dream (generation_utils.py), Fast-dLLM's that of arXiv:2505.22618.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.decoding.caching import Caching, check_caching
from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.decoding.orders import POLICY_FREE, low_confidence, perturb, random_order
from espo_lightning.decoding.proposals import entropy, greedy_tokens, require_finite, sample_tokens, warp
from espo_lightning.decoding.schedules import Step, commit, even_schedule
from espo_lightning.decoding.steps import needing, steps_noise, true_places
from espo_lightning.keys import fold_in, randint, uniform
from espo_lightning.ranges import check_whole


@dataclass(frozen=True)
class Decoding(Decoder):
    """How a diffusion policy's completions are decoded.

    Args:
        length: canvas width L in tokens, a multiple of ``block_length``.
        block_length: tokens per block; blocks are filled from the left.
        steps: denoising steps for the whole canvas, a multiple of the number of blocks; steps = length commits
            one token a step.
        temperature: of the proposed tokens; 0 is greedy.
        order: which proposals a step commits first: `low_confidence`, `random_order`, `left_to_right`, `entropy_order`,
            `margin_order`.
        top_p: propose from the nucleus of this probability; 1 = from all tokens.
        order_temperature: draw the positions with probabilities softmax(priority / order_temperature) instead of
            taking the first (Dream's alg_temp); 0 = take the first.
        schedule: how many proposals each step of a block commits: `even_schedule`, `dream_schedule`, `origin_schedule`.
        threshold: commit, beyond the schedule, every proposal whose probability at temperature 1 is at least this
            (Fast-dLLM's parallel decoding). With steps = length, a step commits these, and one in any case. Fewer
            forward passes where the policy is confident. null = off.
        early_stop: as soon as everything before an end-of-text token is committed, fill the hidden rest with
            end-of-text tokens without a forward pass. The text (what stands before the first end-of-text token), and
            so the reward, is exactly that of the full decoding. The canvas after it, and so its ELBO, is not, unless
            the policy puts nothing but end-of-text tokens there.
        prefix_cache: per block, keep keys and values of all that precedes it from the block's first step
            (Fast-dLLM's prefix cache). An approximation: in a bidirectional network they change with every commit.
            Measure before use: it costs the small trained Sudoku policy two thirds of its right answers
            (docs/faster_decoding.md).
        refresh: with prefix_cache, compute what is kept anew in every so many steps of a block; 1 = in each, which is
            the full decoding. null = in the block's first step only.
        dual_cache: with prefix_cache, also keep keys and values of all that follows the block (Fast-dLLM's dual cache),
            so that a step between two full ones computes the block alone.
        corrector: after the last step, so many times hide one position, uniformly drawn, and propose its token anew,
            for one forward pass each. A Gibbs sampler of the policy's one-masked conditionals: it leaves a law that
            they agree with as it is, and drags any other one towards them (how we read SEPO's gradient flow,
            arXiv:2502.01384).

    Raises:
        ValueError: lengths or steps that do not divide, numbers out of range, settings that contradict each other.
    """

    length: int = 16
    block_length: int = 16
    steps: int = 16
    temperature: float = 1.0
    order: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = low_confidence
    top_p: float = 1.0
    order_temperature: float = 0.0
    schedule: Callable[[int, int], list[Step]] = even_schedule
    threshold: float | None = None
    early_stop: bool = False
    prefix_cache: bool = False
    refresh: int | None = None
    dual_cache: bool = False
    corrector: int = 0

    def __post_init__(self):
        check_whole(length=self.length, block_length=self.block_length, steps=self.steps, corrector=self.corrector)
        if min(self.length, self.block_length) < 1 or self.length % self.block_length:
            raise ValueError(f"length {self.length} is not a multiple of block_length {self.block_length}, from 1 up")
        blocks = self.blocks
        if self.steps % blocks or not blocks <= self.steps <= self.length:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {blocks} (length {self.length} / block_length "
                f"{self.block_length}), between {blocks} and {self.length}; got {self.steps}"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if not 0 <= self.order_temperature < math.inf:
            raise ValueError(f"order_temperature must be 0 (take the first) or positive, got {self.order_temperature}")
        if self.order_temperature and self.order is random_order:
            raise ValueError("order_temperature has no effect with random_order: set it to 0, or take another order")
        if self.corrector < 0:
            raise ValueError(f"corrector must be 0 (none) or a number of passes, got {self.corrector}")
        plan = self.schedule(self.block_length, self.steps // blocks)
        if (sure := sum(step.count for step in plan)) < self.block_length:
            raise ValueError(f"schedule must commit all {self.block_length} tokens of a block; only {sure} are sure")
        if any(step.bar < math.inf for step in plan) and self.order is not random_order:
            raise ValueError("origin_schedule commits each position with a given chance: it needs order=random_order")
        if self.threshold is not None:
            if not 0 < self.threshold < 1:
                raise ValueError(f"threshold must be a probability between 0 and 1, or null; got {self.threshold}")
            if self.order is not low_confidence or self.order_temperature or self.schedule is not even_schedule:
                raise ValueError(
                    "threshold compares what low_confidence ranks by, and takes the place of a schedule: it needs "
                    "order=low_confidence, order_temperature=0 and schedule=even_schedule"
                )
        check_caching(self)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block_length

    @property
    def plan(self) -> list[Step]:
        """The steps of every block; with a threshold, a block may be complete before its last one."""
        plan = self.schedule(self.block_length, self.steps // self.blocks)
        return plan if self.threshold is None else [step._replace(bar=math.log(self.threshold)) for step in plan]

    @property
    def passes(self) -> int:
        """The most forward passes of a completion: of every step that may commit something, and of the corrector."""
        return self.blocks * sum(step != Step(0) for step in self.plan) + self.corrector

    @property
    def order_free(self) -> bool:
        """Whether the positions that a step commits are drawn without looking at the policy; see `Decoder`."""
        at_once = sum(step != Step(0) for step in self.plan) == 1
        return self.threshold is None and (self.order in POLICY_FREE or self.block_length == 1 or at_once)

    def check(self, policy) -> None:
        if policy.mask_id is None:
            raise ValueError(
                "the policy is a causal model, which cannot denoise: use decoding=AutoregressiveDecoding (with "
                "likelihood=Autoregressive), or make it a diffusion policy by sft (load_policy with denoise: true)"
            )
        policy.check_canvas(self.length)
        layout = getattr(policy, "layout", None)
        if layout is None or layout.block is None:
            return
        if self.prefix_cache:
            raise ValueError(
                f"prefix_cache is superfluous: the policy has {layout}, whose keys and values of finished blocks are "
                f"exact: use BlockDecoding with block_length {layout.block}, and drop prefix_cache"
            )
        if layout.splits(self.length):
            raise ValueError(
                f"the policy has {layout}, and decoding=Decoding is for policies whose canvas is one block: use "
                f"BlockDecoding with block_length {layout.block}"
            )

    def decode(
        self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more
    ) -> tuple[Tensor, Trace]:
        return decode(policy, prompts, keys, self, agree)

    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        return generate(policy, prompts, keys, self, agree)

    @property
    def greedy(self) -> "Decoding":
        """The same without chance: temperatures 0."""
        return replace(self, temperature=0.0, order_temperature=0.0)

    @property
    def data_dependent(self) -> bool:
        """Whether the number of forward passes depends on what is decoded; `generate`'s ``agree`` is for these."""
        return self.threshold is not None or self.early_stop

    @property
    def foreseen(self) -> bool:
        """Whether it is known beforehand how many positions every step finds hidden."""
        return not self.data_dependent and all(step.bar == math.inf for step in self.plan)


def generate(
    policy, prompts, keys: Tensor, decoding: Decoding, agree: Callable[[bool], bool] = lambda more: more
) -> Tensor:
    """Semi-autoregressive masked diffusion decoding.

    The canvas of mask tokens is filled block by block from the left. Each step proposes a token for every
    masked position of the active block and commits those that come first in ``decoding.order``. A completion
    depends on its key and its prompt only, not on its batch-mates.

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``; for ``early_stop`` also ``eos_ids`` and
            ``eos_id``, for ``prefix_cache`` ``prefix``.
        prompts: `Prompts` of B rows and width P.
        keys: int64 [B], the randomness of each completion.
        agree: "does any process still need this step?", given whether this one does; asked before every step of a
            ``data_dependent`` decoding. Sharded policies need every process in every forward pass: one with nothing
            left to decode then runs a single row.

    Returns:
        Token ids [B, L] without a mask token.
    """
    return _unmask(policy, prompts, keys, decoding, agree, traced=False)[0]


def decode(
    policy, prompts, keys: Tensor, decoding: Decoding, agree: Callable[[bool], bool] = lambda more: more
) -> tuple[Tensor, Trace]:
    """The same completions as `generate` makes, whose arguments these are, in the same passes; and their `Trace`."""
    return _unmask(policy, prompts, keys, decoding, agree, traced=True)


def _proposer(
    decoding: Decoding, mask_token: Tensor, traced: bool, check: Callable[[Tensor], None]
) -> Callable[..., tuple[Tensor, ...]]:
    """(logits [n, V], uniforms [n] twice) -> tokens [n], their priorities, and if ``traced`` their laws' entropies.

    check: see `greedy_tokens`.
    """

    def propose(logits: Tensor, u_token: Tensor, u_order: Tensor) -> tuple[Tensor, ...]:
        logits = logits.index_fill(-1, mask_token, float("-inf"))  # neither drawn nor part of a confidence
        warped = warp(logits, decoding.temperature, decoding.top_p)
        tokens = sample_tokens(warped, u_token, check) if decoding.temperature else greedy_tokens(warped, check)
        priority = decoding.order(logits, warped, tokens, u_order)
        if decoding.order_temperature:
            priority = perturb(priority, decoding.order_temperature, u_order)
        return (tokens, priority, entropy(warped).float()) if traced else (tokens, priority)

    return propose


@torch.no_grad()
def _unmask(
    policy, prompts, keys: Tensor, decoding: Decoding, agree: Callable[[bool], bool], *, traced: bool
) -> tuple[Tensor, Trace | None]:
    width, length = prompts.ids.shape[1], decoding.length
    canvas = F.pad(prompts.ids, (0, length), value=policy.mask_id)
    attention, mask_token = prompts.seen_by(policy, length), canvas.new_full((), policy.mask_id)
    everyone, plan, finite = torch.arange(len(canvas), device=canvas.device), decoding.plan, []
    propose, shape = _proposer(decoding, mask_token, traced, finite.append), (len(canvas), length)
    trace = Trace(keys.new_full(shape, -1), torch.zeros(shape, device=keys.device)) if traced else None
    busy = sum(step != Step(0) for step in plan)  # the trace numbers steps that may commit; the noise, all of them

    for block in range(decoding.blocks):
        first = block * decoding.block_length
        inside = slice(first, first + decoding.block_length)  # of the completion
        active = slice(width + inside.start, width + inside.stop)  # of the canvas
        places = torch.arange(inside.start, inside.stop, device=canvas.device).unsqueeze(0)
        rows, taken, left = everyone, block * busy, decoding.block_length  # of every row, if that is foreseen
        caching = Caching(policy, decoding, active)
        noise = steps_noise(keys, range(block * len(plan), (block + 1) * len(plan)), places, length)
        for number, step in enumerate(plan, block * len(plan)):
            if step == Step(0):
                continue
            hidden = canvas[rows, active] == mask_token  # [n, l]
            count, left = left * len(rows), left - step.count
            if not decoding.foreseen:
                each = hidden.sum(1).tolist()  # the one time that a step waits for the device
                count = sum(each)
            if decoding.data_dependent:
                if not agree(count > 0):
                    break
                if not all(each):
                    keep = needing(hidden, each)
                    rows, hidden = rows[keep], hidden[keep]
                    caching.keep(keep)
            ids = canvas[rows]
            select = torch.zeros_like(ids, dtype=torch.bool)
            select[:, active] = hidden
            u_token, u_order = noise(number)[:, rows].flatten(1)[:, true_places(hidden, count)]
            tokens, priority, *noted = policy(
                ids,
                None if attention is None else attention[rows],
                select,
                propose,
                u_token,
                u_order,
                **caching.of_next_pass(),
            )
            chosen, old = commit(hidden, priority, step), ids[:, active]
            canvas[rows, active] = torch.where(chosen, old.masked_scatter(hidden, tokens), old)
            if traced:
                nats = torch.zeros_like(hidden, dtype=torch.float32).masked_scatter(hidden, *noted)
                _note(trace, (rows, inside), chosen, taken, nats)
            taken += 1
            if decoding.early_stop:
                canvas[rows, width:] = end(canvas[rows, width:], policy)
    for number in range(decoding.corrector):
        step = fold_in(keys, decoding.blocks * len(plan) + number)
        _correct(policy, canvas, attention, step, propose, length, trace, decoding.blocks * busy + number)
    require_finite(torch.cat(finite))
    return canvas[:, width:], trace


def _note(trace: Trace, where: tuple[Tensor | slice, slice], chosen: Tensor, step: int, nats: Tensor) -> None:
    """Write into a trace that a step committed the ``chosen`` positions [n, l] of some rows and columns."""
    for record, value in zip(trace, (step, nats)):
        record[where] = torch.where(chosen, value, record[where])


def _correct(
    policy,
    canvas: Tensor,
    attention: Tensor | None,
    keys: Tensor,
    propose: Callable[..., tuple[Tensor, ...]],
    length: int,
    trace: Trace | None,
    step: int,
) -> None:
    """Draw the token of one random position of every row anew, in place."""
    place = torch.arange(length, device=keys.device) == randint(fold_in(keys, -1), length).unsqueeze(-1)
    select = F.pad(place, (canvas.shape[1] - length, 0))
    noise = uniform(keys, 1).squeeze(-1)
    tokens, _, *noted = policy(canvas.masked_fill(select, policy.mask_id), attention, select, propose, noise, noise)
    canvas.masked_scatter_(select, tokens)
    for nats in noted:
        _note(trace, (slice(None), slice(None)), place, step, nats.unsqueeze(-1))


def end(completion: Tensor, policy) -> Tensor:
    """Completions [n, L], the hidden rest of those whose text is complete filled with end-of-text tokens."""
    hidden = completion == policy.mask_id
    ends = torch.stack([completion == token for token in sorted(policy.eos_ids)]).any(0)
    ended = (ends & (hidden.cumsum(1) == 0)).any(1, keepdim=True)
    return completion.masked_fill(hidden & ended, policy.eos_id)
