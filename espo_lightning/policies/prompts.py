"""Prompts of one width, and what of them and of a canvas behind them is seen."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from espo_lightning.policies.layout import FULL


class Prompts(NamedTuple):
    """Left-padded prompts of one width. ids: int64 [B, P]. mask: bool [B, P], True = real; None = no padding."""

    ids: Tensor
    mask: Tensor | None

    def attention(self, length: int) -> Tensor | None:
        """Key mask of prompt and canvas, bool [B, P + length], or None where nothing is padded."""
        return None if self.mask is None else F.pad(self.mask, (0, length), value=True)

    def seen_by(self, policy, length: int) -> Tensor | None:
        """Who attends to whom in prompt and canvas, as the policy's layout says; a callable without one has full
        attention. See `Layout.attention`."""
        return getattr(policy, "layout", FULL).attention(self, length)

    def of(self, rows: slice | Tensor) -> "Prompts":
        """Some of the rows."""
        return Prompts(self.ids[rows], None if self.mask is None else self.mask[rows])

    def repeat_each(self, n: int) -> "Prompts":
        """Every row ``n`` times in a row: [B, P] -> [B n, P]."""
        return Prompts(
            self.ids.repeat_interleave(n, 0), None if self.mask is None else self.mask.repeat_interleave(n, 0)
        )
