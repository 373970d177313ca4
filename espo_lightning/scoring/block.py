"""The likelihood of block-causal policies: in every block, given the finished blocks before it, an any-order ELBO.

All blocks are scored in one pass: a noisy copy of the canvas, whose blocks see themselves and the clean tokens before
them. Prompt and clean tokens go through the network once for all copies.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.ranges import check_counts
from espo_lightning.scoring.likelihood import ELBO, Likelihood, Seen
from espo_lightning.scoring.masks import Masks, count_masks
from espo_lightning.scoring.score import DRAWS, spread, token_log_probs

PART = 64  # slots of a noisy copy at once: early ones need not pass by the keys of what comes after them


@dataclass(frozen=True)
class BlockELBO(ELBO):
    """The sum over the blocks of each one's any-order ELBO given the blocks before it, an unbiased estimate.

    A bound of the log-likelihood of `BlockDecoding` in random order: it is that log-likelihood with blocks of one
    token, where nothing is left to draw, and the `ELBO` of the canvas where that is one block.

    Args:
        draws, coupled, stratified, smallest_count, weighted: as in `ELBO`, in every block by itself; a draw of all
            blocks is one pass, or two if coupled.
        block: tokens of a block, as the policy has; it divides the canvas.

    Raises:
        ValueError: no draw, no block, or what `ELBO` raises.
    """

    block: int = 32
    in_blocks = True

    def __post_init__(self):
        check_counts(1, block=self.block)
        super().__post_init__()

    def check(self, policy, length: int, updates: int = 1) -> None:
        Likelihood.check(self, policy, length, updates)
        layout = getattr(policy, "layout", None)
        if layout is None or layout.block is None:
            raise ValueError(
                "likelihood=BlockELBO needs a block-causal policy, but this one has full attention: use ELBO, or make "
                "it block-causal by sft (load_policy with block)"
            )
        if layout.block != self.block:
            raise ValueError(f"likelihood.block is {self.block}, but the policy has {layout}: set it to {layout.block}")
        if length % self.block:
            raise ValueError(
                f"likelihood.block {self.block} does not divide the canvas of {length} tokens: set its length to a "
                "multiple of the block"
            )

    def draw(self, keys: Tensor, length: int) -> Masks:
        return self._masks(keys, (torch.arange(length, device=keys.device) // self.block).expand(len(keys), -1))

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        if seen.blocks is None:
            return self.draw(keys, seen.valid.shape[1])
        return self._masks(keys, seen.blocks)

    def _masks(self, keys: Tensor, blocks: Tensor) -> Masks:
        law = {"coupled": self.coupled, "stratified": self.stratified, "smallest": self.smallest_count}
        return self.counted(count_masks(keys, blocks.shape[1], self.draws, **law, blocks=blocks))

    def log_probs(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """See `block_log_probs`."""
        return block_log_probs(policy, prompts, completion, masks)


def parts_of(slots: int, block: int) -> list[slice]:
    """The slots of a noisy copy in parts of whole blocks, which go through the network one after the other."""
    size = max(1, PART // block) * block
    return [slice(start, min(start + size, slots)) for start in range(0, slots, size)]


def block_log_probs(policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
    """log p(y_i | x, finished blocks before i's, the visible tokens of i's block) of completions on given masks.

    The head runs on scored positions only. Where the policy can go on from keys and values (`Policy.resumes`), prompt
    and clean tokens are computed once per completion; otherwise once per pass, in one sequence with the noisy copy.

    Args:
        policy: a block-causal `Policy`.
        prompts: `Prompts` of B rows and width P.
        completion: token ids [B, L].
        masks: `Masks` [M, B, L].

    Returns:
        [M, B, L] nats; 0 where nothing is scored.
    """
    if not torch.is_grad_enabled() and len(masks.weight) > DRAWS:
        return torch.cat([block_log_probs(policy, prompts, completion, part) for part in masks.split(DRAWS)])
    policy.check_tokens(prompts.ids.shape[1] + completion.shape[1])
    masks = masks.tallied()
    used, hidden, wanted = masks.rows()
    owner = used % len(completion)
    slots = policy.layout.slots(prompts, completion.shape[1])
    shown = torch.cat([prompts.ids[owner], completion[owner].masked_fill(hidden, policy.mask_id)], 1)
    noisy = slots.of(owner).show(shown, empty=policy.mask_id)[:, slots.width :]
    known = slots.columns.shape[1] - slots.block  # clean places: nobody looks at a clean last block
    clean = slots.show(torch.cat([prompts.ids, completion], 1), empty=policy.mask_id)[:, :known]
    copies = _Copies(policy, slots, owner, clean, noisy, completion, wanted)
    values = copies.resumed() if known and getattr(policy, "resumes", False) else copies.joint()
    return spread(values, masks)


class _Copies(NamedTuple):
    """Noisy copies of canvases, and how they go through the network.

    policy: `Policy`. slots: of its layout, `Slots`. owner: int64 [N], whose they are. clean: int64 [B, C], the clean
    places before a last block. noisy: int64 [N, K b], their slots. completion: int64 [B, L]. wanted: bool [N, L], where
    they are read.
    """

    policy: Any
    slots: Any
    owner: Tensor
    clean: Tensor
    noisy: Tensor
    completion: Tensor
    wanted: Tensor

    def read(self) -> Tensor:
        """``wanted``, in slots: bool [N, K b]."""
        where = self.slots.where[self.owner] - self.slots.width
        return torch.zeros_like(self.noisy, dtype=torch.bool).scatter_(1, where, self.wanted)

    def resumed(self) -> Tensor:
        """Log-probabilities of all wanted positions, row by row: clean tokens once, then part after part of the slots.

        A part needs the clean tokens before its last block only, and the rows that are read there only.
        """
        policy, slots, owner, known = self.policy, self.slots, self.owner, self.clean.shape[1]
        prefix, nothing = policy.prefix(), torch.zeros_like(self.clean, dtype=torch.bool)
        sees = slots.sees(slice(0, known), slice(0, known))
        positions, read, places = slots.positions, self.read(), slots.where[owner] - slots.width
        policy(self.clean, sees, nothing, lambda x: x[:, 0], prefix=prefix, positions=positions[:, :known])
        total = 0.0
        for part in parts_of(self.noisy.shape[1], slots.block):
            stop = slots.width + part.stop - slots.block
            inside = self.wanted & (places >= part.start) & (places < part.stop)
            rows = inside.any(-1)
            rows[0] = True  # every process makes the same calls
            rows = rows.nonzero().squeeze(-1)
            mine = owner[rows]
            values = policy(
                torch.cat([self.clean[mine, :stop], self.noisy[rows, part]], 1),
                slots.noisy_sees(stop, part)[mine],
                F.pad(read[rows, part], (stop, 0)),
                token_log_probs,
                self.completion[mine][inside[rows]],
                prefix=prefix.of(mine, stop),
                positions=torch.cat([positions[:, :stop], positions[:, slots.width :][:, part]], 1)[mine],
            )
            filled = values.new_zeros(len(rows), inside.shape[1]).masked_scatter(inside[rows], values)
            total = values.new_zeros(inside.shape).index_add(0, rows, filled) + total
        return total[self.wanted]

    def joint(self) -> Tensor:
        """The same, with clean tokens along with every copy."""
        slots, owner, known = self.slots, self.owner, self.clean.shape[1]
        copied = slots.noisy_sees(known, slice(None))
        clean = slots.sees(slice(0, known), slice(0, known))
        sees = torch.cat([F.pad(clean, (0, self.noisy.shape[1])), copied], 1)
        positions = torch.cat([slots.positions[:, :known], slots.positions[:, slots.width :]], 1)
        return self.policy(
            torch.cat([self.clean[owner], self.noisy], 1),
            sees[owner],
            F.pad(self.read(), (known, 0)),
            token_log_probs,
            self.completion[owner][self.wanted],
            positions=positions[owner],
        )
