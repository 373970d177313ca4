"""Scores along the trace of a decoder: every token in the state in which it was drawn.

A decoder hides, in step s, what it commits in s and later, and draws the tokens of s from that state. Their
log-probabilities, summed over the steps, are the log-likelihood of the completion given its order; where the order does
not look at the policy (`Decoder.order_free`), its gradient is exactly that of the path's log-likelihood.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.keys import fold_in, real, uniform
from espo_lightning.ranges import check_counts
from espo_lightning.scoring.likelihood import Seen, SeenLikelihood
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import log_probs, sampler_log_probs


def ranks(seen: Seen, merge: int = 1) -> tuple[Tensor, int]:
    """The steps of a trace counted within each completion, ``merge`` in a row as one: [B, L], -1 = filled without a
    pass; and the most that a completion can have.

    Raises:
        ValueError: there is no trace.
    """
    if seen.trace is None:
        raise ValueError(
            "scores along a trajectory need its trace: pass that of Decoder.decode to Seen (and score nothing else)"
        )
    steps = seen.trace.steps
    count = int(steps.max()) + 1 if seen.passes is None else seen.passes
    present = (steps.unsqueeze(-1) == torch.arange(count, device=steps.device)).any(1)  # [B, T]
    rank = (present.cumsum(1) - 1).gather(1, steps.clamp(min=0))
    return torch.where(steps < 0, steps, rank // merge), -(-count // merge)


def step_sums(values: Tensor, rank: Tensor, count: int) -> Tensor:
    """Sums [B, T] over the positions of each step of values [B, L], in the widest float."""
    sums = torch.zeros(len(rank), count + 1, dtype=real(rank.device), device=rank.device)
    return sums.scatter_add(1, rank % (count + 1), values.to(sums.dtype))[:, :count]  # -1 goes last, and is dropped


def trace_masks(rank: Tensor, chosen: Tensor, weight: Tensor) -> Masks:
    """The states of chosen steps [M, B]: everything of this step and later is hidden, the step's own tokens are scored.

    Args:
        rank: [B, L], see `ranks`.
        weight: [M, B] of the step's tokens. A completion without the step is not scored.
    """
    at = chosen.unsqueeze(-1)
    hidden = (rank >= at) | (rank < 0)
    return Masks(hidden, torch.where(rank == at, weight.unsqueeze(-1), 0.0).float(), False)


class TraceLikelihood(SeenLikelihood):
    """Scores along the trace, under the law of the sampler: without the mask token, at its temperature."""

    traced = True
    in_blocks = True  # later blocks are hidden, and finished ones shown, in every state of the trace
    temperature: float

    def check_decoding(self, decoding: Decoder, updates: int = 1) -> None:
        name = type(self).__name__
        if decoding.temperature != self.temperature:
            raise ValueError(
                f"likelihood={name} scores the law that tokens are drawn from: likelihood.temperature is "
                f"{self.temperature:g} and decoding.temperature {decoding.temperature:g}; make them equal"
            )
        if decoding.top_p < 1:
            raise ValueError(
                f"likelihood={name} needs decoding.top_p=1, got {decoding.top_p:g}: policy, old policy and reference "
                "would have different nuclei, and a token outside one of them an infinite ratio"
            )
        if decoding.prefix_cache:
            raise ValueError(
                f"likelihood={name} scores with full passes, but decoding.prefix_cache draws from others: drop it"
            )
        if decoding.corrector:
            raise ValueError(
                f"likelihood={name} scores each position in the one state that it was drawn in, and decoding.corrector "
                "draws some of them again: set it to 0"
            )

    def log_probs(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        return log_probs(policy, prompts, completion, masks, sampler_log_probs(policy.mask_id, self.temperature))


@dataclass(frozen=True)
class Trajectory(TraceLikelihood):
    """The log-likelihood of a completion given the order it was decoded in: all steps, or an unbiased sample of them.

    Over all T steps it is the sum over the tokens, each in its own state, with nothing random. It is what TraceRL
    (arXiv:2509.06949), AGRPO (2510.04019), JustGRPO (2601.15165) and relative trajectory balance (2405.20971) score.

    Args:
        draws: steps per completion, spread evenly over its law, each weighed by 1 / its chance; null = all steps, one
            forward each.
        merge: this many steps in a row are scored in the state before the first of them: fewer forwards, and another
            likelihood, whose gradient is biased.
        entropy: draw steps with chances proportional to the entropy of their tokens' laws, not uniformly.
        temperature: of the decoder.

    Raises:
        ValueError: no draw, no step to merge, entropy without draws, or a temperature that is not positive.
    """

    draws: int | None = None
    merge: int = 1
    entropy: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        check_counts(1, **{"merge": self.merge} | ({} if self.draws is None else {"draws": self.draws}))
        if self.entropy and self.draws is None:
            raise ValueError("entropy draws steps: it has no effect with draws=null, where all are scored; set draws")
        check_temperature(self.temperature)

    @property
    def random(self) -> bool:
        return self.draws is not None

    @property
    def exact(self) -> bool:
        return self.draws is None and self.merge == 1

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        rank, count = ranks(seen, self.merge)
        if self.draws is None:
            chosen = torch.arange(count, device=rank.device).unsqueeze(-1).expand(-1, len(rank))
            return trace_masks(rank, chosen, torch.full_like(chosen, count, dtype=torch.float32))
        present = (step_sums(torch.ones_like(rank), rank, count) > 0).to(real(rank.device))
        mass = present
        if self.entropy:
            mass = step_sums(seen.trace.entropy, rank, count) + 1e-8 * present  # no step is out of reach
        chance = mass / mass.sum(-1, keepdim=True)
        draw = torch.arange(self.draws, device=rank.device)
        point = (uniform(fold_in(keys, -11), 1) + draw) / self.draws  # [B, M]
        cdf = chance.cumsum(-1)
        last = present.sum(-1, keepdim=True).long() - 1  # where rounding leaves the sum below a point
        chosen = torch.searchsorted(cdf, point, right=True).clamp(max=last)
        return trace_masks(rank, chosen.T, 1 / chance.gather(1, chosen).T)


@dataclass(frozen=True)
class HighestEntropy(TraceLikelihood):
    """The steps with the highest mean entropy of their tokens' laws, others in every update (EGSPO, arXiv:2603.12554).

    Update u takes the steps of rank uM .. uM + M - 1. A choice of steps, not a likelihood; weights are 1.

    Args:
        draws: steps per completion and update (M).
        temperature: of the decoder.

    Raises:
        ValueError: no draw, or a temperature that is not positive.
    """

    draws: int = 1
    temperature: float = 1.0

    def __post_init__(self):
        check_counts(1, draws=self.draws)
        check_temperature(self.temperature)

    def check_decoding(self, decoding: Decoder, updates: int = 1) -> None:
        super().check_decoding(decoding, updates)
        if updates * self.draws > decoding.passes:
            raise ValueError(
                f"likelihood=HighestEntropy takes {self.draws} steps in each of {updates} updates, but decoding has "
                f"{decoding.passes}: lower likelihood.draws or updates, or raise decoding.steps"
            )

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        rank, count = ranks(seen)
        tokens = step_sums(torch.ones_like(rank), rank, count)
        mean = (step_sums(seen.trace.entropy, rank, count) / tokens).masked_fill(tokens == 0, -math.inf)
        first = seen.update * self.draws
        chosen = mean.argsort(dim=-1, descending=True, stable=True)[:, first : first + self.draws].T
        return trace_masks(rank, chosen, torch.ones_like(chosen, dtype=torch.float32))


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is positive: at 0 the sampler has no law to score."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, as that of the decoder, got {temperature}")
