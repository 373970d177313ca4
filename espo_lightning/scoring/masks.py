"""The masks of the likelihood estimators: pure functions of keys, no model."""

from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.keys import fold_in, randint, random_subset, uniform


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
