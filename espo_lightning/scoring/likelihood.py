"""Likelihoods of a completion: mask laws and one way of scoring for masked diffusion LMs, the exact one for causal LMs.

A likelihood draws masks (data, so that policy, old policy and reference are scored on the same ones) and takes
log-probabilities [M, B, L] on them. Times the masks' weights these are *terms*, whose mean over the M draws of the sum
over the L positions is the score S of a completion, in nats per sequence.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.keys import fold_in
from espo_lightning.ranges import check_counts
from espo_lightning.scoring.masks import (
    Masks,
    bernoulli_masks,
    count_masks,
    full_mask,
    prompt_noise,
    quadrature_masks,
)
from espo_lightning.scoring.score import log_probs, token_log_probs


class Seen(NamedTuple):
    """What a mask law may look at: B completions of L tokens after prompts of width P.

    Attributes:
        valid: bool [B, L], up to and including the first end-of-text token.
        prompt: bool [B, P], real tokens of the prompt.
        keys: int64 [B], the same for all updates of a rollout.
        update: number of this update.
        updates: number of all updates of the rollout.
        trace: how they were decoded, for the laws that ask (``traced``), and None for others.
        passes: the most steps that their decoder takes, so that all processes have equally many views; None = as many
            as the trace has.
        blocks: int64 [B, L], the block of every position in the policy's layout, counted from the first's; None = not
            said.
    """

    valid: Tensor
    prompt: Tensor
    keys: Tensor
    update: int = 0
    updates: int = 1
    trace: Trace | None = None
    passes: int | None = None
    blocks: Tensor | None = None

    @classmethod
    def whole(cls, keys: Tensor, length: int) -> "Seen":
        """Completions that fill the canvas, without prompts."""
        valid = torch.ones(len(keys), length, dtype=torch.bool, device=keys.device)
        return cls(valid, valid[:, :0], keys)

    @classmethod
    def of(
        cls,
        policy,
        prompts,
        completion: Tensor,
        keys: Tensor,
        updates: int = 1,
        trace: Trace | None = None,
        passes: int | None = None,
    ) -> "Seen":
        """Completions [B, L] of a `Policy` after `Prompts`, before the first update."""
        position = torch.arange(completion.shape[1], device=completion.device)
        valid = position <= policy.lengths(completion).unsqueeze(-1)  # with the end-of-text token, if there is one
        real = torch.ones_like(prompts.ids, dtype=torch.bool) if prompts.mask is None else prompts.mask
        layout = getattr(policy, "layout", None)
        blocks = None if layout is None else layout.blocks(prompts, completion.shape[1])
        return cls(valid, real, keys, 0, updates, trace, passes, blocks)

    def of_rows(self, rows: Tensor) -> "Seen":
        """The same of some completions."""
        trace = None if self.trace is None else self.trace.of_rows(rows)
        blocks = None if self.blocks is None else self.blocks[rows]
        parts = {"valid": self.valid[rows], "prompt": self.prompt[rows], "keys": self.keys[rows]}
        return self._replace(**parts, trace=trace, blocks=blocks)


class Likelihood(ABC):
    """A mask law, and how completions are scored on its masks; that of a diffusion policy unless overridden.

    Attributes:
        independent_draws: M if the draws of one completion are independent (`k2_u` asks), else 1.
        random: whether masks differ from update to update; if not, new masks for every update would all be the same.
        traced: whether the masks depend on the trace of the decoder, which then must be noted.
        exact: whether the score is, without noise, the log-likelihood of a completion given the order it was decoded
            in.
        in_blocks: whether it scores block-causal policies, block by block.
    """

    independent_draws: int = 1
    random: bool = True
    traced: bool = False
    exact: bool = False
    in_blocks: bool = False

    def check(self, policy, length: int, updates: int = 1) -> None:
        """Raise a ValueError if the policy cannot be scored this way.

        Args:
            length: canvas width L.
            updates: inner updates per rollout.
        """
        if policy.mask_id is None:
            raise ValueError(
                f"the policy is a causal model, which cannot denoise, and {type(self).__name__} scores denoising: use "
                "likelihood=Autoregressive (with decoding=AutoregressiveDecoding), or make it a diffusion policy by "
                "sft (load_policy with denoise: true)"
            )
        layout = getattr(policy, "layout", None)
        if layout is not None and layout.splits(length) and not self.in_blocks:
            raise ValueError(
                f"the policy has {layout}, and {type(self).__name__} hides positions of all blocks at once, a state "
                f"that such a policy never decodes from: use likelihood=BlockELBO with block {layout.block}"
            )

    def check_decoding(self, decoding: Decoder, updates: int = 1) -> None:  # noqa: B027
        """Raise a ValueError if completions that were decoded this way cannot be scored; called after `check`."""

    @abstractmethod
    def draw(self, keys: Tensor, length: int) -> Masks:
        """Masks [M, B, L] for completions that fill a canvas of ``length`` tokens, with int64 keys [B]."""

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        """Masks [M, B, L] of decoded completions, with int64 keys [B]; a law that looks at them overrides it."""
        return self.draw(keys, seen.valid.shape[1])

    def log_probs(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """Log-probabilities [M, B, L] of completions [B, L] on given masks, see `score.log_probs`."""
        return log_probs(policy, prompts, completion, masks)

    def terms(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """The same times the weights of the masks."""
        return self.log_probs(policy, prompts, completion, masks) * masks.weight


class SeenLikelihood(Likelihood):
    """A likelihood whose mask law looks at what was decoded: subclasses define `masks`."""

    @abstractmethod
    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        """Masks [M, B, L], see `Likelihood.masks`."""

    def draw(self, keys: Tensor, length: int) -> Masks:
        return self.masks(keys, Seen.whole(keys, length))


@dataclass(frozen=True)
class ELBO(Likelihood):
    """The any-order ELBO, an unbiased Monte-Carlo estimate (Eq. 3 of arXiv:2512.03759).

    Args:
        draws: mask draws per score (the paper's M).
        coupled: score the complement of every mask too, the paper's variance reduction; two forwards per draw.
        stratified: spread the counts of the draws of one completion evenly. Excludes ``k2_u``.
        smallest_count: hidden positions uniform on 0..L (0, the authors' code) or 1..L (1, the paper's Eq. 3;
            needs ``coupled: false``). Same mean.
        weighted: false = every scored position counts alike, 1, or 1/2 if coupled: not an ELBO (GDSD,
            arXiv:2605.29398).
    """

    draws: int = 1
    coupled: bool = True
    stratified: bool = False
    smallest_count: int = 0
    weighted: bool = True

    def __post_init__(self):
        check_counts(1, draws=self.draws)
        if self.smallest_count not in (0, 1):
            raise ValueError(
                f"smallest_count: smallest must be 0 (authors' code) or 1 (paper, Eq. 3), got {self.smallest_count}"
            )
        self.draw(torch.zeros(1, dtype=torch.int64), 1)  # contradictory settings fail here, not in the first rollout

    @property
    def independent_draws(self) -> int:
        return 1 if self.stratified else self.draws

    def draw(self, keys: Tensor, length: int) -> Masks:
        law = {"coupled": self.coupled, "stratified": self.stratified, "smallest": self.smallest_count}
        return self.counted(count_masks(keys, length, self.draws, **law))

    def counted(self, masks: Masks) -> Masks:
        """The masks with the weights that this says."""
        if self.weighted:
            return masks
        return masks._replace(weight=(masks.weight != 0) * (0.5 if self.coupled else 1.0))


@dataclass(frozen=True)
class TimeELBO(Likelihood):
    """The same ELBO from its time integral (Eq. 2): every position hidden with chance t, weight 1/t. Higher variance.

    Args:
        draws: mask draws per score.
        low, high: the interval of t; (0, 1) is unbiased.

    Raises:
        ValueError: no draw, or not 0 <= low < high <= 1.
    """

    draws: int = 1
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        check_counts(1, draws=self.draws)
        self.draw(torch.zeros(1, dtype=torch.int64), 1)

    @property
    def independent_draws(self) -> int:
        return self.draws

    def draw(self, keys: Tensor, length: int) -> Masks:
        return bernoulli_masks(keys, length, self.draws, low=self.low, high=self.high)


@dataclass(frozen=True)
class QuadratureELBO(Likelihood):
    """The ELBO by Gauss-Legendre quadrature in the mask ratio (GDPO, arXiv:2510.08554); slightly biased, low variance.

    Args:
        nodes: quadrature nodes, one forward each.

    Raises:
        ValueError: no node.
    """

    nodes: int = 3

    def __post_init__(self):
        check_counts(1, nodes=self.nodes)

    def draw(self, keys: Tensor, length: int) -> Masks:
        return quadrature_masks(keys, length, self.nodes)


@dataclass(frozen=True)
class MeanField(SeenLikelihood):
    """sum_i log p(y_i | x, everything masked): the paper's ablation and, with noise, diffu-GRPO's score; not a bound.

    Args:
        prompt_noise: chance to show a token of the prompt as [MASK] (d1, arXiv:2504.12216, takes 0.15).
        to_end: score up to and including the first end-of-text token only, not the whole canvas.

    Raises:
        ValueError: a noise outside [0, 1).
    """

    prompt_noise: float = 0.0
    to_end: bool = False

    def __post_init__(self):
        if not 0 <= self.prompt_noise < 1:
            raise ValueError(f"prompt_noise must be a chance from 0 to below 1, got {self.prompt_noise}")

    @property
    def random(self) -> bool:
        return self.prompt_noise > 0

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        masks = full_mask(keys, seen.valid.shape[1])
        noise = prompt_noise(fold_in(keys, -7).unsqueeze(0), seen.prompt, self.prompt_noise)
        return masks._replace(weight=masks.weight * seen.valid if self.to_end else masks.weight, prompt=noise)


@dataclass(frozen=True)
class Autoregressive(Likelihood):
    """log p(y | x) of a causal policy: exact, in one forward, with nothing to draw.

    With it, GRPO is `token_ratio` with `standardised` advantages (arXiv:2402.03300), and GSPO is `sequence_ratio`
    with a small clip range (arXiv:2507.18071). Both papers divide by a completion's own number of tokens; here, as
    in ESPO and Dr. GRPO (arXiv:2503.20783), the divisor is the canvas width L for all: positions after the
    end have term 0, hence ratio 1 and no gradient, and count as unclipped.
    """

    random = False
    exact = True

    def check(self, policy, length: int, updates: int = 1) -> None:
        if policy.mask_id is not None:
            raise ValueError(
                "likelihood=Autoregressive scores a token given those before it, but the policy is a diffusion model, "
                "which sees those after it too: use ELBO, or a causal policy"
            )

    def draw(self, keys: Tensor, length: int) -> Masks:
        return full_mask(keys, length)  # no position sees itself

    def log_probs(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """[1, B, L] nats: log p(y_i | x, y_<i) up to and including the first end-of-text token, 0 after it.

        Their sum is the log-probability with which `AutoregressiveDecoding` at temperature 1 draws the completion.
        """
        length = completion.shape[1]
        scored = torch.arange(length, device=completion.device) <= policy.lengths(completion).unsqueeze(-1)
        ids = torch.cat([prompts.ids, completion[:, :-1]], 1)  # the last token predicts nothing
        select = F.pad(scored, (prompts.ids.shape[1], 0))
        values = policy(ids, prompts.attention(length - 1), select, token_log_probs, completion[scored])
        return values.new_zeros(scored.shape).masked_scatter(scored, values).unsqueeze(0)
