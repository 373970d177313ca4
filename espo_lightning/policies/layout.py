"""Layouts: who attends to whom. One concept for the forward pass, the sampler, the scorer and the cost model.

    full            every position to all: LLaDA, Dream, Tiny-A2D's mdlm
    causal          a position to itself and those before it: language models that write from left to right
    block-causal    a position to its whole block and to all blocks before it: SDAR, TraDo, Tiny-A2D's bd3lm

In a block-causal network nothing that follows a finished block changes its keys and values, so that caching them is
exact. Blocks are counted from the first token of the prompt (origin ``global``, as SDAR does: the prompt's last tokens
may share a block with the first of the completion) or from the first of the completion (origin ``response``: the prompt
is a block of its own).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.ranges import check_counts


@dataclass(frozen=True)
class Layout:
    """Who attends to whom.

    Args:
        block: tokens of a block of block-causal attention; None = full, or causal, attention.
        origin: where its blocks are counted from.
        causal: the network's own causal attention.

    Raises:
        ValueError: no block, an unknown origin, or both kinds of causality.
    """

    block: int | None = None
    origin: Literal["global", "response"] = "global"
    causal: bool = False

    def __post_init__(self):
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if self.block is not None and (not whole or self.block < 1):
            raise ValueError(f"block must be a whole number of tokens from 1 up, or null; got {self.block!r}")
        check_counts(1, block=self.block)
        if self.origin not in ("global", "response"):
            raise ValueError(f"block origin must be global or response, got {self.origin!r}")
        if self.block is not None and self.causal:
            raise ValueError(f"a causal policy has no blocks, got block {self.block}")

    def __str__(self) -> str:
        if self.block is not None:
            return f"block-causal attention (block {self.block}, origin {self.origin})"
        return "causal attention" if self.causal else "full attention"

    def splits(self, length: int) -> bool:
        """Whether a canvas of ``length`` tokens may lie in more than one block."""
        return self.block is not None and not (self.origin == "response" and self.block >= length)

    def groups(self, prompts, length: int) -> Tensor:
        """The block of every column of prompt and canvas, ascending along a row: int64 [B, P + length].

        Blocks are numbered from that of the first token; those of padding mean nothing.
        """
        return self._numbers(prompts, columns(prompts, length))

    def blocks(self, prompts, length: int) -> Tensor:
        """The block of every position of the canvas, counted from that of its first: int64 [B, length]."""
        if self.block is None:
            return torch.zeros(len(prompts.ids), length, dtype=torch.int64, device=prompts.ids.device)
        groups = self.groups(prompts, length)[:, prompts.ids.shape[1] :]
        return groups - groups[:, :1]

    def attention(self, prompts, length: int) -> Tensor | None:
        """What `Policy.forward` takes: which keys exist, bool [B, T], None = all; by blocks, who sees whom, [B, T, T].

        T = P + ``length``.
        """
        keys = prompts.attention(length)
        if self.block is None:
            return keys
        groups = self.groups(prompts, length)
        sees = groups.unsqueeze(1) <= groups.unsqueeze(2)
        return sees if keys is None else sees & keys.unsqueeze(1)

    def slots(self, prompts, length: int) -> "Slots":
        """Prompt and canvas cut into slots, see `Slots`; of a block-causal layout."""
        width, size = prompts.ids.shape[1], self.block
        columns_of = columns(prompts, length)[:, :width]
        tail = self.tails(prompts)
        # the number of blocks must not depend on the prompts: other processes have others
        count = -(-length // size) + (self.origin == "global" and size > 1)
        slot = torch.arange(count * size, device=tail.device)
        cut = torch.cat([columns_of, (width - tail).unsqueeze(1) + slot], 1)
        keys = torch.ones_like(columns_of, dtype=torch.bool) if prompts.mask is None else prompts.mask
        keys = torch.cat([keys & (columns_of < (width - tail).unsqueeze(1)), cut[:, width:] < width + length], 1)
        where = width + tail.unsqueeze(1) + torch.arange(length, device=tail.device)
        cut_as = (cut.clamp(max=width + length), self._numbers(prompts, cut), keys, where)
        return Slots(*cut_as, width, size, alike=prompts.mask is None)

    def tails(self, prompts) -> Tensor:
        """How many of the prompt's last tokens lie in the block of the first position of the canvas: int64 [B]."""
        lengths = prompt_lengths(prompts)
        return lengths % self.block if self.origin == "global" else torch.zeros_like(lengths)

    def _numbers(self, prompts, columns: Tensor) -> Tensor:
        """The block of columns [B, T]."""
        width = prompts.ids.shape[1]
        if self.block is None:
            return columns if self.causal else torch.zeros_like(columns)
        if self.origin == "response":
            return torch.where(columns < width, 0, 1 + (columns - width).div(self.block, rounding_mode="floor"))
        padding = width - prompt_lengths(prompts).unsqueeze(1)
        return (columns - padding).div(self.block, rounding_mode="floor")


class Slots(NamedTuple):
    """Prompts [B, P] and canvases [B, L] cut so that blocks begin at the same place in every row.

    T = P + K b: the P columns of the prompt, then K blocks of b slots. Tokens of the prompt that lie in the first block
    of the canvas stand in its first slots once more, and nobody looks at them in the prompt. Slots after the canvas
    are empty.

    columns: int64 [B, T], the column of prompt and canvas that each shows, P + L if empty. groups: int64 [B, T], their
    blocks. keys: bool [B, T], what may be looked at. where: int64 [B, L], the place of every position of the canvas.
    width: P. block: b. alike: all rows are the same, as prompts without padding are.
    """

    columns: Tensor
    groups: Tensor
    keys: Tensor
    where: Tensor
    width: int
    block: int
    alike: bool = False

    @property
    def count(self) -> int:
        """Blocks, K."""
        return (self.columns.shape[1] - self.width) // self.block

    @property
    def positions(self) -> Tensor:
        """Where each stands in prompt and canvas: int64 [B, T]. Empty ones stand on the last, not beyond the room."""
        return self.columns.clamp(max=self.width + self.where.shape[1] - 1)

    def of(self, rows: Tensor | slice) -> "Slots":
        """The same of some rows."""
        tensors = (x[rows] for x in (self.columns, self.groups, self.keys, self.where))
        return Slots(*tensors, self.width, self.block, self.alike)

    @property
    def distinct(self) -> "Slots":
        """One row, if all are alike; what is computed of it holds for every row. Otherwise these slots."""
        return self.of(slice(1)) if self.alike else self

    def show(self, ids: Tensor, empty: int) -> Tensor:
        """Token ids [B, P + L] in their slots: [B, T]. empty: what empty ones show."""
        return F.pad(ids, (0, 1), value=empty).gather(1, self.columns)

    def owned(self) -> Tensor:
        """Which places show a position of the canvas: bool [B, T]."""
        return torch.zeros_like(self.keys).scatter_(1, self.where, True)

    def sees(self, queries: slice, keys: slice) -> Tensor:
        """Who sees whom among clean tokens: bool [B, queries, keys]."""
        known = self.groups[:, None, keys] <= self.groups[:, queries, None]
        return known & self.keys[:, None, keys]

    def noisy_sees(self, known: int, part: slice) -> Tensor:
        """Whom a part of the K b slots sees in a noisy copy, which follows the first ``known`` clean places.

        Clean tokens of the blocks before, and the copy's own block: bool [B, part, known + part].
        """
        groups, keys = self.groups[:, self.width :][:, part], self.keys[:, self.width :][:, part]
        before = (self.groups[:, None, :known] < groups.unsqueeze(2)) & self.keys[:, None, :known]
        inside = (groups.unsqueeze(1) == groups.unsqueeze(2)) & keys.unsqueeze(1)
        return torch.cat([before, inside], 2)


FULL, CAUSAL = Layout(), Layout(causal=True)


def columns(prompts, length: int) -> Tensor:
    """Their numbers in every row: int64 [B, P + length]."""
    batch, width = prompts.ids.shape
    return torch.arange(width + length, device=prompts.ids.device).expand(batch, -1)


def prompt_lengths(prompts) -> Tensor:
    """Tokens of every prompt without padding: int64 [B]."""
    batch, width = prompts.ids.shape
    if prompts.mask is None:
        return torch.full((batch,), width, dtype=torch.int64, device=prompts.ids.device)
    return prompts.mask.sum(-1)


def causally(keys: Tensor, queries: int) -> Tensor:
    """Whom the last ``queries`` of T positions see by causal attention, of keys bool [N, T]: bool [N, queries, T]."""
    column = torch.arange(keys.shape[1], device=keys.device)
    return keys.unsqueeze(1) & (column <= column[-queries:].unsqueeze(1))


def bias(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention: bool [N, T] or [N, Q, T], True = seen, -> [N, 1, 1 or Q, T]."""
    added = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
    return nothing_hidden(added[:, None] if added.ndim == 3 else added[:, None, None, :])


def nothing_hidden(bias: Tensor) -> Tensor:
    """The same bias [.., T], but rows that see no key see all: those of padding, which no other row sees.

    Where softmax rounds the bias to -inf (that of float64 in float32), such a row would be NaN, and so would every row
    that multiplies its values by 0.
    """
    return bias.masked_fill((bias < 0).all(-1, keepdim=True), 0.0)
