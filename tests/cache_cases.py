"""Decodings with approximate caches, of a canvas of 12 tokens, and what such caches compute, said a second time."""

from dataclasses import replace

import torch
from decoding_cases import some_prompts

from espo_lightning import Decoding, Policy, Prompts, dream_schedule, entropy_order

BASE = Decoding(12, 4, 12, 0.7, prefix_cache=True)
CACHED = {
    "refresh": replace(BASE, refresh=2),
    "dual": replace(BASE, dual_cache=True),
    "dual, refresh": replace(BASE, dual_cache=True, refresh=3),
    "one block, refresh": replace(BASE, block_length=12, refresh=5),
    "Dream, dual": Decoding(
        12, 6, 6, 1.0, entropy_order, 0.9, 0.1, dream_schedule, prefix_cache=True, refresh=2, dual_cache=True
    ),
    "threshold, dual, refresh": replace(BASE, block_length=6, threshold=0.5, refresh=2, dual_cache=True),
    "early stop, dual": replace(BASE, early_stop=True, dual_cache=True),
}


def padded(rows: int, width: int = 6) -> Prompts:
    prompts = some_prompts(rows, width)
    return Prompts(prompts.ids, torch.arange(width) >= torch.arange(rows).unsqueeze(1) % 4)


class Stale:
    """A second implementation beside the first, without a cache: their logits are compared in every pass.

    The network reads the canvas of the last full pass and, behind it, what is computed anew of the present one. The old
    canvas attends to itself alone; what is new to itself, and to the old canvas where that is not computed anew.
    """

    def __init__(self, policy: Policy):
        self.policy, self.mask_id, self.errors = policy, policy.mask_id, []
        self.eos_ids, self.eos_id = policy.eos_ids, policy.eos_id

    def prefix(self, start: int, stop: int | None = None):
        self.first, self.part = None, slice(start - self.policy.shift, stop)
        self.cache = self.policy.prefix(start, stop=stop)
        return self

    def keep(self, rows: torch.Tensor) -> None:
        self.first = self.first[rows]
        self.cache.keep(rows)

    def __call__(self, ids, attention, select, reduce, *columns, prefix):
        def compared(logits, *columns):
            self.errors.append((logits - self.logits(ids, attention, select)).abs().max().item())
            return reduce(logits, *columns)

        return self.policy(ids, attention, select, compared, *columns, prefix=self.cache)

    def logits(self, ids, attention, select):
        self.first = ids.clone() if self.first is None else self.first
        places = torch.arange(ids.shape[1])
        new = torch.zeros_like(places, dtype=torch.bool)
        new[self.part] = True
        real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
        keys = torch.cat([real, real[:, self.part]], 1)[:, None]  # [N, 1, T + new]
        of_old = torch.cat([torch.ones_like(new), torch.zeros_like(places[new], dtype=torch.bool)])
        of_new = torch.cat([~new, torch.ones_like(places[new], dtype=torch.bool)])
        seen = torch.where(of_old.unsqueeze(1), of_old, of_new) & keys  # [N, queries, keys]
        dtype = self.policy.model.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
        both, positions = torch.cat([self.first, ids[:, self.part]], 1), torch.cat([places, places[self.part]])[None]
        logits = self.policy.model(both, attention_mask=bias, position_ids=positions).logits[:, ids.shape[1] :]
        row, position = select[:, self.part].nonzero(as_tuple=True)
        return logits[row, position - self.policy.shift]
