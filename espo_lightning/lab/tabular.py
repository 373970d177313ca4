"""Tiny policies whose every state can be enumerated: a few free cells of a real one, or a table."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espo_lightning.lab.exact import all_numbers


class FreeCells(nn.Module):
    """A policy seen through a smaller canvas: a few positions are free, a few symbols allowed, the rest is given.

    The rest of the canvas is always visible. Tokens on the small canvas are the numbers 0..V-1 of the symbols, and V is
    ``mask_id``; other tokens of the policy are ruled out, so its law over the symbols sums to 1. Everything that takes
    a policy takes this: `completion_law`, `score`, `generate`.

    Args:
        policy: a `Policy`.
        canvas: token ids [L]; those at free positions do not matter.
        free: the free positions, ascending.
        symbols: token ids of the V symbols.

    Raises:
        ValueError: free positions that are not ascending positions of the canvas.
    """

    def __init__(self, policy: nn.Module, canvas: Tensor, free: list[int], symbols: list[int]):
        super().__init__()
        if free != sorted(set(free)) or not free or not 0 <= free[0] <= free[-1] < len(canvas):
            raise ValueError(f"free must be ascending positions of a canvas of {len(canvas)}, got {free}")
        self.policy, self.canvas, self.mask_id = policy, canvas, len(symbols)
        self.free, self.symbols = (torch.tensor(x, device=canvas.device) for x in (free, symbols))

    def expand(self, completion: Tensor) -> Tensor:
        """Small completions [N, n] on the policy's own canvas: [N, L]."""
        tokens = F.pad(self.symbols, (0, 1), value=self.policy.mask_id)
        full = self.canvas.expand(len(completion), -1).clone()
        full[:, self.free] = tokens[completion]
        return full

    def forward(
        self, ids: Tensor, attention: Tensor | None, select: Tensor, reduce: Callable[..., Any], *columns: Tensor
    ) -> Any:
        """``reduce(logits [c, V+1], *columns)`` at the selected positions, as `Policy.forward`; the mask has -inf.

        Args:
            ids: int64 [N, P + n], a prompt and small canvases.
            attention: bool [N, P + n] or None.
            select: bool [N, P + n], in the canvas only.
        """
        width = ids.shape[1] - len(self.free)
        ids = torch.cat([ids[:, :width], self.expand(ids[:, width:])], 1)
        selected = torch.zeros_like(ids, dtype=torch.bool)
        selected[:, width + self.free] = select[:, width:]
        if attention is not None:
            attention = F.pad(attention[:, :width], (0, len(self.canvas)), value=True)

        def among_symbols(logits: Tensor, *columns: Tensor) -> Any:
            return reduce(F.pad(logits[:, self.symbols], (0, 1), value=float("-inf")), *columns)

        return self.policy(ids, attention, selected, among_symbols, *columns)


class TabularPolicy(nn.Module):
    """A denoiser with free parameters, seen through the interface of `Policy`. Prompts are ignored.

    Tokens: 0..V-1 are the symbols and V is ``mask_id``, which has a logit of -inf.

    Args:
        symbols: V.
        length: L.
        generator: of the initial parameters, on the CPU.
        scale: their standard deviation.
        consistent: False: logits [(V+1)^L, L, V] of their own for every state, so that different orders
            disagree and the ELBO is loose. True: the conditionals of one joint law with logits [V^L], for
            which the ELBO is the log-likelihood.
    """

    def __init__(
        self, symbols: int, length: int, *, generator: torch.Generator, scale: float = 1.0, consistent: bool = False
    ):
        super().__init__()
        self.symbols, self.length, self.consistent, self.mask_id = symbols, length, consistent, symbols
        shape = (symbols**length,) if consistent else ((symbols + 1) ** length, length, symbols)
        self.table = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

    def logits(self) -> Tensor:
        """[(V+1)^L, L, V], of every state, position and symbol; only those of hidden positions mean anything."""
        if not self.consistent:
            return self.table
        marginals = self.table.view([self.symbols] * self.length)
        for position in range(self.length):  # hidden = summed over
            marginals = torch.cat([marginals, marginals.logsumexp(position, keepdim=True)], position)
        digits = all_numbers(self.symbols + 1, self.length).to(self.table.device).unsqueeze(-1)  # [(V+1)^L, L, 1]
        states = torch.arange(len(digits), device=self.table.device).view(-1, 1, 1)
        change = torch.arange(self.symbols, device=self.table.device) - digits
        return marginals.flatten()[states + change * self._place.unsqueeze(-1)]

    @property
    def _place(self) -> Tensor:
        return (self.symbols + 1) ** torch.arange(self.length, device=self.table.device)

    def forward(
        self, ids: Tensor, attention: Tensor | None, select: Tensor, reduce: Callable[..., Any], *columns: Tensor
    ) -> Any:
        """``reduce(logits [n, V+1], *columns)`` at the n selected positions, as `Policy.forward`.

        Args:
            ids: int64 [N, P + L], any P.
            attention: ignored.
            select: bool [N, P + L], in the canvas only.

        Raises:
            ValueError: a position of the prompt is selected.
        """
        if select[:, : -self.length].any():
            raise ValueError(f"only the last {self.length} positions have logits, but a position before was selected")
        states = (ids[:, -self.length :] * self._place).sum(1)
        logits = self.logits().index_select(0, states)[select[:, -self.length :]]
        return reduce(F.pad(logits, (0, 1), value=float("-inf")), *columns)
