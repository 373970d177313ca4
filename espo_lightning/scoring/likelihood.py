"""Likelihoods of a completion: mask laws and one way of scoring for masked diffusion LMs, the exact one for causal LMs.

A likelihood draws masks (data, so that policy, old policy and reference are scored on the same ones)
and turns them into *terms* [M, B, L]: weighted log-probabilities whose mean over the M draws of the sum
over the L positions is the score S of a completion, in nats per sequence.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.scoring.masks import Masks, bernoulli_masks, count_masks, full_mask, quadrature_masks


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: [n, V] float32, [n] -> [n]."""
    return -F.cross_entropy(logits, targets, reduction="none")


def score(policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
    """Terms of the completions on given masks; the only place where a diffusion likelihood is computed.

    The two halves of a coupled draw go through the policy in one batch, and the language-model head
    runs only on the positions that are scored: L per coupled draw, not 2(P + L).

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``.
        prompts: `Prompts` of B rows and width P.
        completion: token ids [B, L].
        masks: `Masks` [M, B, L].

    Returns:
        [M, B, L], float32 from a `Policy`: ``masks.weight`` times log p(y_i | x, the visible tokens).
    """
    halves = torch.stack([masks.hidden, ~masks.hidden]) if masks.coupled else masks.hidden.unsqueeze(0)  # [H, M, B, L]
    views = halves.flatten(0, 2)  # [H M B, L]
    used = views.any(-1)  # a half with nothing hidden needs no forward,
    used[0] = True  # but one row always runs, so that every process makes the same calls
    used = used.nonzero().squeeze(-1)
    owner, hidden = used % len(completion), views[used]
    ids = torch.cat([prompts.ids[owner], completion[owner].masked_fill(hidden, policy.mask_id)], 1)
    attention = prompts.attention(completion.shape[1])
    select = F.pad(hidden, (prompts.ids.shape[1], 0))
    targets = completion[owner][hidden]
    log_probs = policy(ids, None if attention is None else attention[owner], select, token_log_probs, targets)
    terms = log_probs.new_zeros(halves.shape).masked_scatter(halves, log_probs).sum(0)
    return terms * masks.weight


class Likelihood(ABC):
    """A mask law, and how completions are scored on its masks; that of a diffusion policy unless overridden.

    independent_draws: M if the draws of one completion are independent (`k2_u` asks), else 1.
    random: whether another key gives other masks; if not, new masks for every update would all be the same.
    """

    independent_draws: int = 1
    random: bool = True

    def check(self, policy) -> None:
        """Raise a ValueError if the policy cannot be scored this way."""
        if policy.mask_id is None:
            raise ValueError(
                f"the policy is a causal model, which cannot denoise, and {type(self).__name__} scores denoising: use "
                "likelihood=Autoregressive (with decoding=AutoregressiveDecoding), or make it a diffusion policy by "
                "sft (load_policy with denoise: true)"
            )

    @abstractmethod
    def draw(self, keys: Tensor, length: int) -> Masks:
        """Masks [M, B, L] for completions of ``length`` tokens with int64 keys [B]."""

    def terms(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """Terms [M, B, L] of completions [B, L] on given masks, see `score`."""
        return score(policy, prompts, completion, masks)


@dataclass(frozen=True)
class ELBO(Likelihood):
    """The any-order ELBO, an unbiased Monte-Carlo estimate (Eq. 3 of arXiv:2512.03759).

    Args:
        draws: mask draws per score (the paper's M).
        coupled: score the complement of every mask too, the paper's variance reduction; two forwards per draw.
        stratified: spread the counts of the draws of one completion evenly. Excludes ``k2_u``.
        smallest_count: hidden positions uniform on 0..L (0, the authors' code) or 1..L (1, the paper's Eq. 3;
            needs ``coupled: false``). Same mean.
    """

    draws: int = 1
    coupled: bool = True
    stratified: bool = False
    smallest_count: int = 0

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        self.draw(torch.zeros(1, dtype=torch.int64), 1)  # contradictory settings fail here, not in the first rollout

    @property
    def independent_draws(self) -> int:
        return 1 if self.stratified else self.draws

    def draw(self, keys: Tensor, length: int) -> Masks:
        return count_masks(
            keys, length, self.draws, coupled=self.coupled, stratified=self.stratified, smallest=self.smallest_count
        )


@dataclass(frozen=True)
class TimeELBO(Likelihood):
    """The same ELBO from its time integral (Eq. 2): every position hidden with chance t, weight 1/t. Higher variance.

    Args:
        draws: mask draws per score.
        low, high: the interval of t; (0, 1) is unbiased.
    """

    draws: int = 1
    low: float = 0.0
    high: float = 1.0

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
    """

    nodes: int = 3

    def draw(self, keys: Tensor, length: int) -> Masks:
        return quadrature_masks(keys, length, self.nodes)


@dataclass(frozen=True)
class MeanField(Likelihood):
    """sum_i log p(y_i | x, everything masked), the paper's ablation and diffu-GRPO's likelihood; not a bound."""

    random = False

    def draw(self, keys: Tensor, length: int) -> Masks:
        return full_mask(keys, length)


@dataclass(frozen=True)
class Autoregressive(Likelihood):
    """log p(y | x) of a causal policy: exact, in one forward, with nothing to draw.

    With it, GRPO is `token_ratio` with `standardised` advantages (arXiv:2402.03300), and GSPO is `sequence_ratio`
    with a small clip range (arXiv:2507.18071). Both papers divide by a completion's own number of tokens; here, as
    in ESPO and Dr. GRPO (arXiv:2503.20783), the divisor is the canvas width L for all: positions after the
    end have term 0, hence ratio 1 and no gradient, and count as unclipped.
    """

    random = False

    def check(self, policy) -> None:
        if policy.mask_id is not None:
            raise ValueError(
                "likelihood=Autoregressive scores a token given those before it, but the policy is a diffusion model, "
                "which sees those after it too: use ELBO, or a causal policy"
            )

    def draw(self, keys: Tensor, length: int) -> Masks:
        return full_mask(keys, length)  # no position sees itself

    def terms(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """Terms [1, B, L]: log p(y_i | x, y_<i) up to and including the first end-of-text token, 0 after it.

        Their sum is the log-probability with which `AutoregressiveDecoding` at temperature 1 draws the completion.
        """
        length = completion.shape[1]
        scored = torch.arange(length, device=completion.device) <= policy.lengths(completion).unsqueeze(-1)
        ids = torch.cat([prompts.ids, completion[:, :-1]], 1)  # the last token predicts nothing
        select = F.pad(scored, (prompts.ids.shape[1], 0))
        log_probs = policy(ids, prompts.attention(length - 1), select, token_log_probs, completion[scored])
        return log_probs.new_zeros(scored.shape).masked_scatter(scored, log_probs) * masks.weight
