"""Decodings with approximate caches, of a canvas of 12 tokens."""

from dataclasses import replace

from espo_lightning import Decoding, dream_schedule, entropy_order

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
