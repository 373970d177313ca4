"""Small block-causal policies and their prompts."""

import pytest
import torch

from espo_lightning import (
    Prompts,
    Seen,
    new_policy,
)
from espo_lightning.keys import fold_in

ORIGINS = ("global", "response")
LENGTHS = (6, 3, 12, 9)  # of prompts, in one batch
EACH = pytest.mark.parametrize("origin", ORIGINS)


def block_policy(block: int = 4, origin: str = "global", dtype=torch.float64, layers: int = 2, **more):
    """Weights so large that everybody's opinion depends on whom it sees."""
    policy = new_policy(32, layers, 4, 64, seed=1, block=block, origin=origin, **more)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return policy.to(dtype).eval()


def some_prompts(lengths=LENGTHS, width: int | None = None, seed: int = 0) -> Prompts:
    """Left-padded prompts of these lengths; a row is the same in every batch."""
    width = width or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + length)
        ids[row, width - length :] = torch.randint(7, 60, (length,), generator=generator)
        mask[row, width - length :] = True
    return Prompts(ids, mask)


def alone(prompts: Prompts, row: int) -> Prompts:
    return Prompts(prompts.ids[row : row + 1, prompts.mask[row]], None)


def keys_of(n: int, seed: int = 7) -> torch.Tensor:
    return fold_in(seed, torch.arange(n))


class Counted:
    """A policy that notes the shape of every pass: (rows, tokens computed)."""

    def __init__(self, policy):
        self.policy, self.passes = policy, []
        self.mask_id, self.layout, self.prefix, self.selective = policy.mask_id, policy.layout, policy.prefix, True
        self.eos_ids, self.eos_id, self.check_tokens = policy.eos_ids, policy.eos_id, policy.check_tokens

    def __call__(self, ids, *args, prefix=None, **kwargs):
        self.passes.append((len(ids), ids.shape[1] - (0 if prefix is None else len(prefix))))
        return self.policy(ids, *args, prefix=prefix, **kwargs)


LENGTH = 8


def some_completions(rows: int = len(LENGTHS), length: int = LENGTH) -> torch.Tensor:
    return torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(3))


def drawn(policy, law, prompts, completion, keys=None):
    keys = keys_of(len(completion)) if keys is None else keys
    return law.masks(keys, Seen.of(policy, prompts, completion, keys))
