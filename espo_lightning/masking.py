"""Keyed randomness and the masks of the ELBO estimators. Pure functions, no model.

Every random number of a run is a function of a *key*, an int64 that is folded together from
(seed, purpose, rollout, global sample index, ...). Masks and rollouts therefore do not depend on the
world size, on the split into micro-batches or on a resume, and no global generator is ever touched.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed int64: the increment of SplitMix64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> on int64 copies the sign bit


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of the 64-bit integers."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def fold_in(keys: Tensor | int, data: Tensor | int) -> Tensor:
    """Derive independent keys: int64 ``keys`` and ``data``, any shapes that broadcast."""
    keys, data = torch.as_tensor(keys), torch.as_tensor(data)
    return _mix(_mix(keys * _GOLDEN + 1) ^ _mix(data * _GOLDEN))


def random_bits(keys: Tensor, n: int) -> Tensor:
    """``n`` random int64 per key: [...] -> [..., n]."""
    counter = torch.arange(1, n + 1, device=keys.device)
    return _mix(_mix(keys).unsqueeze(-1) + counter * _GOLDEN)


def uniform(keys: Tensor, n: int) -> Tensor:
    """``n`` float64 uniforms on [0, 1) per key: [...] -> [..., n]."""
    return _shift_right(random_bits(keys, n), 11).double() * 2.0**-53


def randint(keys: Tensor, high: int) -> Tensor:
    """One integer on 0..high-1 per key (modulo bias below high / 2^63)."""
    return _shift_right(random_bits(keys, 1).squeeze(-1), 1) % high


def random_subset(keys: Tensor, counts: Tensor, length: int) -> Tensor:
    """A uniformly random subset of ``counts`` out of ``length`` positions: [...] -> bool [..., length]."""
    ranks = random_bits(keys, length).argsort(-1).argsort(-1)
    return ranks < counts.unsqueeze(-1)


class Masks(NamedTuple):
    """Masks of M draws for B completions of L tokens.

    hidden: bool [M, B, L], the positions shown as [MASK] in the forward pass of a draw.
    weight: float32 [M, B, L], the factor of each position's log-probability in the score; 0 = not scored.
    coupled: whether a second forward with the complement of ``hidden`` scores the other positions.

    """

    hidden: Tensor
    weight: Tensor
    coupled: bool

    def of(self, rows: slice | Tensor) -> "Masks":
        """The masks of some of the completions."""
        return Masks(self.hidden[:, rows], self.weight[:, rows], self.coupled)

    def single_views(self) -> list["Masks"]:
        """One-forward masks [1, B, L] whose terms add up, draw by draw, to this one's: M of them, or 2M if coupled."""
        views = []
        for hidden, weight in zip(self.hidden, self.weight):
            views.append((hidden, weight * hidden))
            if self.coupled:
                views.append((~hidden, weight * ~hidden))
        return [Masks(hidden[None], weight[None], False) for hidden, weight in views]


def count_masks(keys: Tensor, length: int, draws: int, *, coupled: bool, stratified: bool, smallest: int = 0) -> Masks:
    """Masks for the count form of the ELBO (Eq. 3 of arXiv:2512.03759), an unbiased estimate of it.

    The number of hidden positions k is uniform on ``smallest``..L, the hidden set uniform given k. With
    ``smallest=0``, the law of the authors' code, the weight is (L+1)/k, and the complement, whose size is
    uniform on 0..L as well, may be scored too with (L+1)/(L-k), each half counting one half: then every
    position is scored exactly once per draw. ``smallest=1``, the paper's text, has the weight L/k and
    no complement. Both have the mean ELBO.

    Args:
        keys: int64 [B], one per completion.
        length: L.
        draws: M.
        coupled: score the complement as well.
        stratified: spread the M counts of one completion evenly over 0..L. Each count is still uniform, but
            the draws are dependent; the variance usually falls, without a guarantee.
        smallest: 0 or 1.
    """
    if smallest not in (0, 1):
        raise ValueError(f"smallest must be 0 (authors' code) or 1 (paper, Eq. 3), got {smallest}")
    if smallest == 1 and coupled:
        raise ValueError("coupled masks need counts uniform on 0..L: set smallest=0, or coupled=False")
    span = length + 1 - smallest
    draw = torch.arange(draws, device=keys.device).unsqueeze(-1)  # [M, 1]
    if stratified:
        counts = (randint(fold_in(keys, -1), span) + draw * span // draws) % span + smallest
    else:
        counts = randint(fold_in(fold_in(keys, -2), draw), span) + smallest
    hidden = random_subset(fold_in(fold_in(keys, -3), draw), counts, length)  # [M, B, L]
    k = counts.unsqueeze(-1)
    weight = torch.where(hidden, span / k.clamp(min=1), 0.0)
    if coupled:
        weight = 0.5 * torch.where(hidden, weight, span / (length - k).clamp(min=1))
    return Masks(hidden, weight.float(), coupled)


def bernoulli_masks(keys: Tensor, length: int, draws: int, *, low: float = 0.0, high: float = 1.0) -> Masks:
    """Masks for the time form of the ELBO (Eq. 2): t ~ U(low, high), each position hidden with chance t, weight 1/t.

    Unbiased for (low, high) = (0, 1), with unbounded weights and infinite variance; a narrower interval is
    biased and tamer.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"need 0 <= low < high <= 1, got low={low}, high={high}")
    keys = fold_in(fold_in(keys, -4), torch.arange(draws, device=keys.device).unsqueeze(-1))  # [M, B]
    u = uniform(keys, length + 1)
    t = (low + (high - low) * (1 - u[..., :1])).clamp(min=torch.finfo(torch.float32).tiny)  # 1 - u > 0: no 1/0
    hidden = u[..., 1:] < t
    return Masks(hidden, torch.where(hidden, 1 / t, 0.0).float(), False)


def quadrature_masks(keys: Tensor, length: int, nodes: int) -> Masks:
    """Masks at Gauss-Legendre nodes of the mask ratio (GDPO, arXiv:2510.08554): one draw per node.

    The count at node t is round(tL), at least 1, and its weight uses the count itself, not the nominal t.
    Not unbiased: the quadrature of a smooth integrand replaces the variance in the count.
    """
    import numpy as np

    points, node_weights = np.polynomial.legendre.leggauss(nodes)
    counts = torch.tensor([max(1, round((p + 1) / 2 * length)) for p in points], device=keys.device).unsqueeze(-1)
    draw = torch.arange(nodes, device=keys.device).unsqueeze(-1)
    hidden = random_subset(fold_in(fold_in(keys, -5), draw), counts.expand(-1, len(keys)), length)
    # score = mean over the draws, hence the factor `nodes`; leggauss weights sum to 2
    scale = torch.tensor(node_weights, device=keys.device).unsqueeze(-1) / 2 * nodes * length / counts
    return Masks(hidden, torch.where(hidden, scale.unsqueeze(-1), 0.0).float(), False)


def full_mask(keys: Tensor, length: int) -> Masks:
    """The one-step mean field log p(y_i | x, all masked): everything hidden, weight 1."""
    hidden = torch.ones(1, len(keys), length, dtype=torch.bool, device=keys.device)
    return Masks(hidden, hidden.float(), False)
