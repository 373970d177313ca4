"""Keys and values that a bidirectional policy computes once for several steps: when anew, and which of them.

An approximation: after the first attention, every position depends on every other, so that each commit changes all.
"""

from torch import Tensor

from espo_lightning.ranges import check_counts


def check_caching(decoding) -> None:
    """Raise a ValueError for what the caches of a `Decoding` cannot do, and for what would have no effect."""
    check_counts(1, refresh=decoding.refresh)
    steps, blocks = decoding.steps, decoding.blocks
    if not decoding.prefix_cache:
        if decoding.refresh is not None or decoding.dual_cache:
            raise ValueError("refresh and dual_cache are about prefix_cache, which is off: set it, or drop them")
        return
    if steps == blocks:
        raise ValueError(
            f"prefix_cache has no effect with one step per block (steps {steps}, {blocks} blocks): a block's first "
            "step is always a full pass; raise steps, or drop it"
        )
    if decoding.refresh is not None and decoding.refresh >= steps // blocks:
        raise ValueError(
            f"refresh must be below the steps of a block, {steps // blocks}, or null (in its first step only); got "
            f"{decoding.refresh}"
        )
    if decoding.dual_cache and blocks == 1:
        raise ValueError("dual_cache has no effect with one block, which nothing follows: drop it")


class Caching:
    """What the steps of one block keep, at its places of the canvas: nothing, unless ``prefix_cache`` is on."""

    def __init__(self, policy, decoding, active: slice):
        self.policy, self.decoding, self.active = policy, decoding, active
        self.passes, self.held = 0, {}

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, an index."""
        for prefix in self.held.values():
            prefix.keep(rows)

    def of_next_pass(self) -> dict:
        """Arguments of a policy's next pass, which is a full one if its keys and values are due."""
        decoding, active = self.decoding, self.active
        due = self.passes == 0 or (decoding.refresh is not None and self.passes % decoding.refresh == 0)
        if decoding.prefix_cache and due:
            part = {"stop": active.stop} if decoding.dual_cache else {}
            self.held = {"prefix": self.policy.prefix(active.start, **part)}
        self.passes += 1
        return self.held
