"""The likelihood of block-causal policies: in every block, given the finished blocks before it, an any-order ELBO.

All blocks are scored in one pass: a noisy copy of the canvas, whose blocks see themselves and the clean tokens before
them. Prompt and clean tokens go through the network once for all copies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.scoring.likelihood import ELBO, Likelihood, Seen
from espo_lightning.scoring.masks import Masks, count_masks
from espo_lightning.scoring.score import spread, token_log_probs


@dataclass(frozen=True)
class BlockELBO(ELBO):
    """The sum over the blocks of each one's any-order ELBO given the blocks before it, an unbiased estimate.

    A bound of the log-likelihood of `BlockDecoding` in random order: it is that log-likelihood with blocks of one
    token, where nothing is left to draw, and the `ELBO` of the canvas where that is one block.

    Args:
        draws, coupled, stratified, smallest_count: as in `ELBO`, in every block by itself; a draw of all blocks is one
            pass, or two if coupled.
        block: tokens of a block, as the policy has; it divides the canvas.

    Raises:
        ValueError: no draw, no block, or what `ELBO` raises.
    """

    block: int = 32
    in_blocks = True

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
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
        return count_masks(keys, blocks.shape[1], self.draws, **law, blocks=blocks)

    def log_probs(self, policy, prompts, completion: Tensor, masks: Masks) -> Tensor:
        """See `block_log_probs`."""
        return block_log_probs(policy, prompts, completion, masks)


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
    used, hidden, wanted = masks.rows()
    owner = used % len(completion)
    slots = policy.layout.slots(prompts, completion.shape[1])
    known = slots.columns.shape[1] - slots.block  # clean places: nobody looks at a clean last block
    clean = slots.show(torch.cat([prompts.ids, completion], 1), empty=policy.mask_id)[:, :known]
    shown = torch.cat([prompts.ids[owner], completion[owner].masked_fill(hidden, policy.mask_id)], 1)
    noisy = slots.of(owner).show(shown, empty=policy.mask_id)[:, slots.width :]
    positions = torch.cat([slots.columns[:, :known], slots.columns[:, slots.width :]], 1)
    sees, among_clean = slots.noisy_sees(known), slots.sees(slice(0, known), slice(0, known))
    select = torch.zeros(len(owner), positions.shape[1], dtype=torch.bool, device=owner.device)
    select.scatter_(1, slots.where[owner] - slots.width + known, wanted)
    targets = completion[owner][wanted]
    ids, told = torch.cat([clean[owner], noisy], 1), {"positions": positions[owner]}
    if known and getattr(policy, "resumes", False):
        prefix, nothing = policy.prefix(), torch.zeros_like(clean, dtype=torch.bool)
        policy(clean, among_clean, nothing, lambda logits: logits[:, 0], prefix=prefix, positions=positions[:, :known])
        values = policy(ids, sees[owner], select, token_log_probs, targets, prefix=prefix.of(owner), **told)
    else:
        sees = torch.cat([F.pad(among_clean, (0, noisy.shape[1])), sees], 1)
        values = policy(ids, sees[owner], select, token_log_probs, targets, **told)
    return spread(values, masks)
