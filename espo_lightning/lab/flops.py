"""FLOPs of a rollout and its updates, from the shape of a network and the passes that `ESPOModule` makes. Pure.

Counted as `torch.utils.flop_counter` does: 2 m n k for every matrix product, attention included, nothing for what is
done element by element. Exact for this library: the last layer's MLP and the head run where a token is predicted,
half-passes with nothing hidden do not run, the first update's own terms are its old scores, the reference is scored
once per mask set. docs/cost_model.md has the same as equations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.decoding.masked import Decoding
from espo_lightning.lab.network import Network
from espo_lightning.objectives.objective import Objective
from espo_lightning.policies.prefix import HEAD_BYTES
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import DRAWS

# ---- passes: what runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Some forward passes of one width.

    calls: of the network. rows: sequences in all of them. width: tokens of a sequence, P + L. positions: where a token
    is predicted, in all of them. pairs: of a token and one that it attends to, masked or not; None = all of a sequence.
    known: tokens whose keys and values are not computed but read, in all of them.
    Averages need not be whole numbers; neither need rows, where a pass takes parts of sequences.
    """

    calls: float
    rows: float
    width: int
    positions: float
    pairs: float | None = None
    known: float = 0

    @property
    def attended(self) -> float:
        """``pairs``, counted."""
        return self.rows * self.width * self.width if self.pairs is None else self.pairs

    def __add__(self, other: "Passes") -> "Passes":
        pairs = None if self.pairs is other.pairs is None else self.attended + other.attended
        sums = (self.calls + other.calls, self.rows + other.rows, self.width, self.positions + other.positions)
        return Passes(*sums, pairs, known=self.known + other.known)

    def __mul__(self, n: float) -> "Passes":
        pairs = None if self.pairs is None else self.pairs * n
        sizes = (self.calls * n, self.rows * n, self.width, self.positions * n)
        return Passes(*sizes, pairs, known=self.known * n)


def pass_of(rows: float, tokens: int, keys: int, width: int, positions: float = 0) -> Passes:
    """One pass of some rows that computes ``tokens`` of each, which may attend to ``keys``, themselves included."""
    return Passes(1, rows * tokens / width, width, positions, rows * tokens * keys, known=rows * (keys - tokens))


def hidden_in_steps(decoding: Decoding) -> list[float]:
    """How many positions of a block are hidden in each of its steps that may commit something."""
    hidden, left = [], decoding.block_length
    for count, bar in decoding.schedule(decoding.block_length, decoding.steps // decoding.blocks):
        if count or bar < 1:
            hidden.append(left)
        left -= left * (1 - bar) if bar < 1 else count
    return hidden


def decoding_passes(decoding: Decoding, completions: int, width: int, shift: int = 0) -> Passes:
    """Those of `generate`: every row in every step that may commit, the head at what is hidden in the active block.

    With ``prefix_cache``, a step between two full ones computes what follows the prefix, or the block. What
    ``threshold`` and ``early_stop`` save depends on the data and is not counted: an upper bound for them.
    ``origin_schedule`` counts with its mean.

    shift: of the policy; a prefix is one token shorter where the state before a token predicts it.
    """
    hidden = hidden_in_steps(decoding)
    corrector = Passes(decoding.corrector, completions * decoding.corrector, width, completions * decoding.corrector)
    if not decoding.prefix_cache:
        calls, positions = decoding.blocks * len(hidden), decoding.blocks * sum(hidden)
        return Passes(calls, completions * calls, width, completions * positions) + corrector
    passes = corrector
    for start in range(width - decoding.length, width, decoding.block_length):
        part = (start + decoding.block_length if decoding.dual_cache else width) - start + shift
        for step, positions in enumerate(hidden):
            full = step % (decoding.refresh or len(hidden)) == 0
            passes += pass_of(completions, width if full else part, width, width, completions * positions)
    return passes


def plain_trace(decoding: Decoder, completions: int) -> Trace:
    """Traces as the schedule makes them in any order, here from the left, with the same entropy everywhere.

    What ``threshold`` and ``early_stop`` save is not counted; ``origin_schedule`` counts with its mean.
    """
    if not isinstance(decoding, Decoding):
        steps = torch.arange(decoding.length)
    else:
        counts, left = [], decoding.block_length
        for count, bar in decoding.schedule(decoding.block_length, decoding.steps // decoding.blocks):
            if count or bar < 1:
                counts.append(min(left, count or round(left * (1 - bar))))
                left -= counts[-1]
        steps = torch.arange(len(counts) * decoding.blocks).repeat_interleave(torch.tensor(counts * decoding.blocks))
    return Trace(steps.expand(completions, -1), torch.ones(completions, decoding.length))


def scoring_passes(masks: Masks, width: int, micro_batch: int, draws: int | None = None) -> Passes:
    """Those of `log_probs` in micro-batches: no row that scores nothing, but at least one per call.

    draws: of which a call scores at most so many; None = all.
    """
    if draws is not None and len(masks.weight) > draws:
        parts = [scoring_passes(part, width, micro_batch) for part in masks.split(draws)]
        return sum(parts[1:], parts[0])
    scored = masks.scored.flatten(0, 1)  # [H M, B, L]
    used = scored.any(-1)
    idle = ~used[0, ::micro_batch]  # the first row of a call always runs
    return Passes(len(idle), int(used.sum() + idle.sum()), width, int(scored.sum()))


class Work(NamedTuple):
    """All passes of a rollout and its updates on one GPU; a phase that is not needed has none.

    terms: the extra pass without gradient of ``view_by_view``. updates: passes with gradient.
    """

    rollout: Passes
    old: Passes
    reference: Passes
    terms: Passes
    updates: Passes


def work(
    rollout: Passes,
    masks: list[Masks],
    *,
    updates: int,
    objective: Objective,
    micro_batch: int,
    view_by_view: bool,
    scoring: Callable[..., Passes] = scoring_passes,
) -> Work:
    """What `ESPOModule.training_step` runs.

    Args:
        rollout: see `decoding_passes`.
        masks: U sets [M, B, L]; U = ``updates``, or 1 if they are reused.
        updates, micro_batch, view_by_view: as in `ESPOModule`.
        objective: says whether old and reference log-probabilities are needed.
        scoring: the passes of a likelihood on given masks, as `scoring_passes`.
    """
    nothing = rollout * 0
    sets = [scoring(m, rollout.width, micro_batch, draws=DRAWS) for m in masks]  # without a graph
    trained = masks if not view_by_view else [view for m in masks for view in m.single_passes()]
    repeats = updates // len(sets)
    return Work(
        rollout=rollout,
        old=sum(sets[1:], nothing) if objective.old else nothing,
        reference=sum(sets, nothing) if objective.reference else nothing,
        terms=sum(sets, nothing) * repeats if view_by_view else nothing,
        updates=sum((scoring(m, rollout.width, micro_batch) for m in trained), nothing) * repeats,
    )


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """FLOPs of forward passes: frozen or trained linear layers, adapters, attention scores (QK and PV), head."""

    linear: float
    adapters: float
    scores: float
    head: float


def dense(linears: list[tuple[int, int]]) -> int:
    """FLOPs of linear layers for one token."""
    return 2 * sum(m * n for m, n in linears)


def low_rank(linears: list[tuple[int, int]], rank: int) -> int:
    """FLOPs of their adapters for one token."""
    return 2 * rank * sum(m + n for m, n in linears)


def forward(network: Network, passes: Passes, rank: int = 0) -> Parts:
    """FLOPs of forward passes, with adapters of a rank or without (0)."""
    tokens = passes.rows * passes.width
    in_mlp = (network.layers - 1) * tokens + passes.positions  # the last MLP runs where a token is predicted
    in_attention = network.layers * tokens
    return Parts(
        linear=in_attention * dense(network.attention) + in_mlp * dense(network.mlp),
        adapters=in_attention * low_rank(network.attention, rank) + in_mlp * low_rank(network.mlp, rank),
        scores=network.layers * 4 * passes.attended * network.heads * network.head_dim,
        head=passes.positions * 2 * network.hidden_size * network.vocab_size,
    )


def backward(network: Network, passes: Passes, rank: int = 0, checkpointing: bool = False) -> float:
    """FLOPs of the backward passes after `forward`, recomputation included.

    A trained matrix costs twice its forward product, a frozen one once. Fused attention recomputes its scores: 5
    products for 2. Only in layer 0 with adapters and without checkpointing does the input need no gradient.
    """
    part, tokens = forward(network, passes, rank), passes.rows * passes.width
    flops = (1 if rank else 2) * (part.linear + part.head) + 2 * part.adapters + 2.5 * part.scores
    if rank and not checkpointing:
        flops -= tokens * (dense(network.attention[:3]) + 2 * rank * 3 * network.hidden_size)
    if passes.positions > passes.calls * (HEAD_BYTES // (4 * network.vocab_size)):
        flops += part.head  # in chunks, see `apply_head`
    if checkpointing:  # all layers but the last, up to the last matrix product, whose input is all that is needed
        layer = dense(network.attention + network.mlp) + low_rank(network.attention + network.mlp, rank)
        skipped = low_rank([(0, network.hidden_size)], rank) if rank else dense(network.mlp[2:])
        flops += (network.layers - 1) * (tokens * (layer - skipped) + part.scores / network.layers)
    return flops


def flops(network: Network, w: Work, rank: int = 0, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of every phase. The reference of adapters is the base without them."""
    return {
        "rollout": sum(forward(network, w.rollout, rank)),
        "old scores": sum(forward(network, w.old, rank)),
        "reference": sum(forward(network, w.reference)),
        "updates": sum(forward(network, w.terms + w.updates, rank)) + backward(network, w.updates, rank, checkpointing),
    }
