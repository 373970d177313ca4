"""The masks of the likelihood estimators: pure functions of keys, no model."""

from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.keys import fold_in, randint, randints, random_bits, random_subset, real, uniform


class Masks(NamedTuple):
    """Masks of M draws for B completions of L tokens.

    That a draw may be a mask and its complement is known here only: everyone else asks for `passes` and `scored`.

    Attributes:
        hidden: bool [M, B, L], the positions shown as [MASK] in the forward pass of a draw.
        weight: float32 [M, B, L], the factor of each position's log-probability in the score; 0 = not scored.
        coupled: whether a second forward with the complement of ``hidden`` scores the other positions.
        prompt: bool [M, B, P], tokens of the prompt that are shown as [MASK], never scored; None = none.
        tally: int64 [H, M, B] on the CPU, how many positions every pass scores, see `tallied`; None = not yet counted.
    """

    hidden: Tensor
    weight: Tensor
    coupled: bool
    prompt: Tensor | None = None
    tally: Tensor | None = None

    @property
    def passes(self) -> Tensor:
        """What every forward pass hides: bool [H, M, B, L]; H passes make a draw."""
        return torch.stack([self.hidden, ~self.hidden]) if self.coupled else self.hidden.unsqueeze(0)

    @property
    def scored(self) -> Tensor:
        """Where every forward pass is read: bool [H, M, B, L]; no position of a draw is read twice."""
        return self.passes & (self.weight != 0)

    def tallied(self) -> "Masks":
        """The same with its `tally`, for which the device is waited for once. All passes on these masks, and on parts
        of them, then have shapes that the host knows."""
        return self if self.tally is not None else self._replace(tally=self.scored.sum(-1).cpu())

    @property
    def count(self) -> int:
        """Scored positions of all passes, if it is `tallied`."""
        return int(self.tally.sum())

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The N passes to be run: whose they are, int64 [N], what they hide and where they are read, bool [N, L].

        A pass that scores nothing needs no forward, but the first always runs, so that every process makes the same
        calls.
        """
        scored, tally = self.scored, self.tallied().tally.flatten()
        used = scored.any(-1).flatten()
        used[0] = True
        used = torch.nonzero_static(used, size=int(tally.count_nonzero() + (tally[0] == 0))).squeeze(-1)
        return used, self.passes.flatten(0, 2)[used], scored.flatten(0, 2)[used]

    def of(self, rows: slice | Tensor) -> "Masks":
        """The masks of some of the completions."""
        prompt = None if self.prompt is None else self.prompt[:, rows]
        tally = self.tally[..., rows] if self.tally is not None and isinstance(rows, slice) else None
        return Masks(self.hidden[:, rows], self.weight[:, rows], self.coupled, prompt, tally)

    def split(self, draws: int) -> list["Masks"]:
        """The same in parts of at most so many draws."""
        prompts = [None] * len(self.weight) if self.prompt is None else self.prompt.split(draws)
        tallies = [None] * len(self.weight) if self.tally is None else self.tally.split(draws, 1)
        parts = zip(self.hidden.split(draws), self.weight.split(draws), prompts, tallies)
        return [Masks(hidden, weight, self.coupled, *more) for hidden, weight, *more in parts]

    def single_passes(self) -> list["Masks"]:
        """Masks [1, B, L] of one forward pass each, whose terms add up, draw by draw, to this one's: M H of them."""
        prompts = [None] * len(self.weight) if self.prompt is None else self.prompt
        tallies = [[None] * 2] * len(self.weight) if self.tally is None else self.tally.unbind(1)
        draws = zip(self.passes.unbind(1), self.weight, prompts, tallies)
        return [
            Masks(hidden[None], (weight * hidden)[None], False, *(None if x is None else x[None] for x in more))
            for passes, weight, prompt, tally in draws
            for hidden, *more in zip(passes, [prompt] * len(passes), (None if t is None else t[None] for t in tally))
        ]


def count_masks(
    keys: Tensor,
    length: int,
    draws: int,
    *,
    coupled: bool,
    stratified: bool,
    smallest: int = 0,
    blocks: Tensor | None = None,
) -> Masks:
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
        blocks: int64 [B, L], the block of every position, ascending from 0: all this within each block, L being its
            size, and independent of the others; None = one block.
    """
    if smallest not in (0, 1):
        raise ValueError(f"smallest must be 0 (authors' code) or 1 (paper, Eq. 3), got {smallest}")
    if smallest == 1 and coupled:
        raise ValueError("coupled masks need counts uniform on 0..L: set smallest=0, or coupled=False")
    if blocks is None:
        blocks = torch.zeros(len(keys), length, dtype=torch.int64, device=keys.device)
    sizes = torch.zeros_like(blocks).scatter_add_(1, blocks, torch.ones_like(blocks))  # of block 0, 1, ..
    spans = (sizes + 1 - smallest).clamp(min=1)
    draw = torch.arange(draws, device=keys.device).unsqueeze(-1)  # [M, 1]
    if stratified:
        start = randints(fold_in(keys, -1), length, spans)
        counts = (start + draw.unsqueeze(-1) * spans // draws) % spans + smallest
    else:
        counts = randints(fold_in(fold_in(keys, -2), draw), length, spans) + smallest
    blocks = blocks.expand(draws, -1, -1)
    size, span, k = (x.expand_as(blocks).gather(-1, blocks) for x in (sizes, spans, counts))
    first = (sizes.cumsum(-1) - sizes).expand_as(blocks).gather(-1, blocks)  # position of each one's block
    hidden = _ranks(fold_in(fold_in(keys, -3), draw), blocks) - first < k  # [M, B, L]
    weight = torch.where(hidden, k.clamp(min=1).reciprocal() * span, 0.0)
    if coupled:
        weight = 0.5 * torch.where(hidden, weight, (size - k).clamp(min=1).reciprocal() * span)
    return Masks(hidden, weight.float(), coupled)


def _ranks(keys: Tensor, blocks: Tensor) -> Tensor:
    """Places of the positions in a random order that keeps the blocks [M, B, L] in theirs: keys [M, B] -> [M, B, L]."""
    order = random_bits(keys, blocks.shape[-1]).argsort(-1)
    by_block = blocks.gather(-1, order).argsort(dim=-1, stable=True)
    return order.gather(-1, by_block).argsort(-1)


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
    node_weights = torch.tensor(node_weights, dtype=real(keys.device), device=keys.device)
    scale = node_weights.unsqueeze(-1) / 2 * nodes * length / counts
    return Masks(hidden, torch.where(hidden, scale.unsqueeze(-1), 0.0).float(), False)


def full_mask(keys: Tensor, length: int) -> Masks:
    """The one-step mean field log p(y_i | x, all masked): everything hidden, weight 1."""
    hidden = torch.ones(1, len(keys), length, dtype=torch.bool, device=keys.device)
    return Masks(hidden, hidden.float(), False)


def token_view_masks(keys: Tensor, valid: Tensor, *, low: float, high: float) -> Masks:
    """coupled-GRPO's three views of every token (DiffuCoder, arXiv:2506.20639) as two draws; a sum, no likelihood.

    Draw 0 hides everything, weight 1. Draw 1 hides each position with chance r ~ U(low, high), weight 1/r, and is
    coupled: its complement has weight 1/(1-r). Nothing after the end is scored; there, views 2 and 3 show the end.

    Args:
        keys: int64 [B].
        valid: bool [B, L], up to and including the first end-of-text token.
    """
    u = uniform(fold_in(keys, -6), valid.shape[1] + 1)
    r = low + (high - low) * u[:, :1]
    hidden = u[:, 1:] < r
    weight = torch.stack([torch.ones_like(valid, dtype=u.dtype), torch.where(hidden, 1 / r, 1 / (1 - r))])
    return Masks(torch.stack([torch.ones_like(hidden), hidden]), (weight * valid).float(), True)


def random_view_masks(keys: Tensor, valid: Tensor, level: Tensor) -> Masks:
    """UniGRPO's views (dLLM-RL, arXiv:2509.06949): each valid token hidden with chance t, at least one.

    Everything after the end is hidden, too. The weight is 1 on what is hidden and valid, so that a score is a sum over
    those tokens, not a likelihood.

    Args:
        keys: int64 [M, B].
        valid: bool [B, L].
        level: t, float64 [M, B].
    """
    u = uniform(keys, valid.shape[1]).masked_fill(~valid, 2.0)
    hidden = (u < level.unsqueeze(-1)) | (u == u.amin(-1, keepdim=True))
    return Masks(hidden | ~valid, (hidden & valid).float(), False)


def block_view_masks(keys: Tensor, valid: Tensor, prompt: Tensor, draws: int, *, block: int, noise: float) -> Masks:
    """SPG's views (arXiv:2510.09541): part of one block, all later blocks, and a little of what precedes it.

    A block is drawn uniformly from those that hold valid tokens, then how many of its n valid tokens are hidden,
    uniformly on 1..n, then which. Later blocks and everything after the end are hidden. Of the prompt and of
    earlier blocks each token is hidden with chance ``noise``. Weight |y| / k on the k hidden and valid tokens.

    Args:
        keys: int64 [B].
        valid: bool [B, L].
        prompt: bool [B, P], the real tokens of the prompt.
        draws: M, independent.
        block: tokens of a block; it divides L.
        noise: chance to hide a token that precedes the block.
    """
    length = valid.shape[1]
    keys = fold_in(fold_in(keys, -8), torch.arange(draws, device=keys.device).unsqueeze(-1))  # [M, B]
    tokens = valid.sum(-1)
    chosen = randint(fold_in(keys, 0), (tokens + block - 1) // block)  # [M, B]
    number = torch.arange(length, device=keys.device) // block  # of each position's block
    inside = (number == chosen.unsqueeze(-1)) & valid  # [M, B, L]
    count = 1 + randint(fold_in(keys, 1), inside.sum(-1))
    last = torch.iinfo(torch.int64).max
    ranks = random_bits(fold_in(keys, 2), length).masked_fill(~inside, last).argsort(-1).argsort(-1)
    noisy = uniform(fold_in(keys, 3), length) < noise
    before, after = number < chosen.unsqueeze(-1), number > chosen.unsqueeze(-1)
    hidden = (inside & (ranks < count.unsqueeze(-1))) | after | ~valid | (before & noisy)
    scored = hidden & valid
    weight = torch.where(scored, tokens.unsqueeze(-1) / scored.sum(-1, keepdim=True), 0.0)
    return Masks(hidden, weight.float(), False, prompt_noise(fold_in(keys, 4), prompt, noise))


def prompt_noise(keys: Tensor, prompt: Tensor, noise: float) -> Tensor | None:
    """Each real token of prompts [B, P] hidden with chance ``noise``: keys [M, B] -> bool [M, B, P]; None without.

    Tokens are numbered from the end of the prompt, so that the padding on its left changes nothing.
    """
    return (uniform(keys, prompt.shape[1]).flip(-1) < noise) & prompt if noise else None
