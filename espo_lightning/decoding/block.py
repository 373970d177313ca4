"""Decoding of block-causal policies, block by block, with a key-value cache that is exact. Everything random is keyed.

What a finished block was is all that later blocks see of it, so one pass over its tokens writes its keys and values for
good: a step costs a block, not a canvas. Steps, orders, schedules and thresholds are those of `Decoding`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.decoding.decoder import Trace
from espo_lightning.decoding.masked import Decoding, _note, _proposer, end
from espo_lightning.decoding.proposals import require_finite
from espo_lightning.decoding.schedules import Step, commit
from espo_lightning.decoding.steps import needing, step_noise, true_places


@dataclass(frozen=True)
class BlockDecoding(Decoding):
    """How a block-causal policy's completions are decoded.

    ``block_length`` is that of the policy, and ``steps`` counts its steps per block, times the blocks of the canvas.
    Where a prompt's last tokens lie in the first block (`Layout`, origin global), this block has fewer positions to
    fill, and the canvas ends in a block that has fewer, too.

    Args:
        length, block_length, steps, temperature, order, top_p, order_temperature, schedule, threshold, early_stop: as
            in `Decoding`.
        prefix_cache, refresh, dual_cache, corrector: must be off: three are about an approximation, and this cache is
            exact; the last one changes finished blocks.
        cache: keep keys and values of finished blocks; false computes all of them in every step, to the same
            completions.

    Raises:
        ValueError: what `Decoding` raises, prefix_cache, and a corrector.
    """

    cache: bool = True

    def __post_init__(self):
        if self.prefix_cache:
            raise ValueError(
                "prefix_cache is superfluous with BlockDecoding, whose own cache is exact: drop it (cache: false "
                "computes everything in every step)"
            )
        if self.corrector:
            raise ValueError(
                "corrector draws tokens of finished blocks anew, which later blocks have already seen: it must be 0 "
                f"with BlockDecoding, got {self.corrector}"
            )
        super().__post_init__()

    @property
    def passes(self) -> int:
        """The most steps of a completion, whose positions may lie in one block more than their number asks for."""
        return super().passes // self.blocks * (self.blocks + (self.block_length > 1))

    def check(self, policy) -> None:
        layout = getattr(policy, "layout", None)
        if policy.mask_id is None:
            super().check(policy)
        if layout is None or layout.block is None:
            raise ValueError(
                "decoding=BlockDecoding needs a block-causal policy, but this one has full attention, where keys and "
                "values of a finished block change with every token after it and a cache would be inexact: use "
                "Decoding, or make it block-causal by sft (load_policy with block)"
            )
        if layout.block != self.block_length:
            raise ValueError(
                f"decoding.block_length is {self.block_length}, but the policy has {layout}: set it to {layout.block}, "
                "and decoding.length to a multiple of it"
            )
        if self.cache and not getattr(policy, "selective", True):
            raise ValueError(
                "the cache of BlockDecoding needs a Llama, Qwen2 or Qwen3 network, without its own code or "
                "whole_last_layer: set decoding.cache to false"
            )
        policy.check_canvas(self.length)

    def decode(
        self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more
    ) -> tuple[Tensor, Trace]:
        return decode_blocks(policy, prompts, keys, self, agree, traced=True)

    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        return decode_blocks(policy, prompts, keys, self, agree, traced=False)[0]


class _View(NamedTuple):
    """What all passes over a block of some rows have in common; see `Policy.forward`.

    rows: int64 [n]. stop: places that a pass looks at, T. sees: bool [n, T or a block, T]; None = a
    block sees them all. positions: int64 [n, T]. known: keys and values of these rows, None = nothing is cached.
    """

    rows: Tensor
    stop: int
    sees: Tensor | None
    positions: Tensor
    known: Any


class _Canvas:
    """Prompts and canvases in slots, and the passes over them; see `Slots`. ids: int64 [B, T]."""

    def __init__(self, policy, prompts, decoding: BlockDecoding):
        policy.check_tokens(prompts.ids.shape[1] + decoding.length)
        self.policy, self.slots = policy, policy.layout.slots(prompts, decoding.length)
        canvas = F.pad(prompts.ids, (0, decoding.length), value=policy.mask_id)
        self.ids, self.owned = self.slots.show(canvas, empty=policy.mask_id), self.slots.owned()
        self.known = policy.prefix(room=self.ids.shape[1]) if decoding.cache else None
        self.view = None  # of the last pass

    def hidden(self, rows: Tensor, places: slice) -> Tensor:
        """Positions of the canvas without a token yet: bool [n, places]."""
        return (self.ids[rows, places] == self.policy.mask_id) & self.owned[rows, places]

    def finish(self, stop: int) -> None:
        """Write keys and values of all clean places before ``stop`` that are not in the cache yet."""
        if self.known is None or stop == (start := len(self.known)):
            return
        self.known.width = None
        everything, nothing = self.ids[:, :stop], torch.zeros_like(self.owned[:, :stop])
        sees = self.slots.sees(slice(start, stop), slice(0, stop))
        positions = self.slots.positions[:, :stop]
        passed = {"prefix": self.known, "positions": positions}
        self.policy(everything, sees, nothing, lambda logits, none: none, everything[:0, 0], **passed)

    def look(self, rows: Tensor, places: slice) -> _View:
        """At the block at ``places``, in some rows."""
        stop, everyone = places.stop, len(rows) == len(self.ids)
        slots = self.slots if everyone else self.slots.of(rows)
        positions = slots.positions[:, :stop]
        if self.known is None:
            return _View(rows, stop, slots.sees(slice(0, stop), slice(0, stop)), positions, None)
        sees = slots.sees(places, slice(0, stop))
        known = self.known if everyone else self.known.of(rows)
        known.width = places.start
        return _View(rows, stop, None if sees.all() else sees, positions, known)

    def run(self, rows: Tensor, places: slice, hidden: Tensor, reduce: Callable[..., tuple], *columns: Tensor) -> tuple:
        """Predict the ``hidden`` positions of the block at ``places``, in some rows."""
        if self.view is None or self.view.rows is not rows or self.view.stop != places.stop:
            self.view = self.look(rows, places)
        _, stop, sees, positions, known = self.view
        options = {} if known is None else {"prefix": known}
        select = F.pad(hidden, (places.start, 0))
        ids = self.ids[rows, :stop]
        return self.policy(ids, sees, select, reduce, *columns, positions=positions, **options)

    def stop_ended(self, rows: Tensor) -> None:
        """Fill what is hidden after the end of a complete text."""
        where = self.slots.where[rows]
        completion = end(self.ids[rows].gather(1, where), self.policy)
        self.ids[rows] = self.ids[rows].scatter(1, where, completion)


@torch.no_grad()
def decode_blocks(
    policy, prompts, keys: Tensor, decoding: BlockDecoding, agree: Callable[[bool], bool], *, traced: bool
) -> tuple[Tensor, Trace | None]:
    """Fill the canvas block by block; a completion depends on its key and its prompt only.

    Args:
        policy: a block-causal `Policy`.
        prompts: `Prompts` of B rows and width P.
        keys: int64 [B], the randomness of each completion; noise is numbered by (key, step, position).
        agree: see `generate`; asked where the number of passes depends on the data, or on the prompts.
        traced: whether to note a `Trace`.

    Returns:
        Token ids [B, L] without a mask token, and their trace.
    """
    canvas, length, plan = _Canvas(policy, prompts, decoding), decoding.length, decoding.plan
    finite: list[Tensor] = []
    slots, propose = canvas.slots, _proposer(decoding, canvas.ids.new_full((), policy.mask_id), traced, finite.append)
    everyone = torch.arange(len(canvas.ids), device=keys.device)
    steps, nats = torch.full_like(canvas.ids, -1), torch.zeros(canvas.ids.shape, device=keys.device)  # of the trace
    ask = decoding.data_dependent or policy.layout.origin == "global"  # then blocks differ from prompt to prompt
    busy = sum(step != Step(0) for step in plan)
    for block in range(slots.count):
        places = slice(slots.width + block * slots.block, slots.width + (block + 1) * slots.block)
        if block and ask and not agree(bool(canvas.hidden(everyone, slice(slots.width, None)).any())):
            break
        canvas.finish(places.start)
        rows, taken, left = everyone, block * busy, slots.block  # of every row, if that is foreseen
        for number, step in enumerate(plan, block * len(plan)):
            if step == Step(0):
                continue
            hidden = canvas.hidden(rows, places)  # [n, b]
            count, left = left * len(rows), left - step.count
            if ask or not decoding.foreseen:
                each = hidden.sum(1).tolist()  # the one time that a step waits for the device
                count = sum(each)
            if ask:
                if not agree(count > 0):
                    break
                if not all(each):
                    rows = rows[needing(hidden, each)]
                    hidden = canvas.hidden(rows, places)
            position = torch.arange(places.start, places.stop, device=keys.device) - slots.where[rows, :1]
            noise = step_noise(keys[rows], number, position.clamp(0, length - 1), length)
            u_token, u_order = noise.flatten(1)[:, true_places(hidden, count)]
            tokens, priority, *noted = canvas.run(rows, places, hidden, propose, u_token, u_order)
            chosen, old = commit(hidden, priority, step), canvas.ids[rows, places]
            canvas.ids[rows, places] = torch.where(chosen, old.masked_scatter(hidden, tokens), old)
            for entropy in noted:
                found = torch.zeros_like(hidden, dtype=nats.dtype).masked_scatter(hidden, entropy)
                _note(Trace(steps, nats), (rows, places), chosen, taken, found)
            taken += 1
            if decoding.early_stop:
                canvas.stop_ended(rows)
    require_finite(torch.cat(finite))
    completion, *trace = (x.gather(1, slots.where) for x in (canvas.ids, steps, nats))
    return completion, Trace(*trace) if traced else None
