"""Caches of transformers: one that grows with every pass, one whose room is taken once, one that is renewed in part."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class Room(DynamicLayer):
    """Keys and values of a layer in room for ``size`` positions, written in place: a pass copies its own ones only.

    What they were before is gone, so that nothing can be differentiated through them.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.room = size, ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = tuple(x.new_empty(*x.shape[:2], self.size, x.shape[3]) for x in (key_states, value_states))
        start, stop = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = tuple(room[indices] for room in self.room)
        self.keys, self.values = (room[:, :, : self.get_seq_length()] for room in self.room)


class Renewed(DynamicLayer):
    """Keys and values of a layer at all positions of its first pass; later passes write some of them anew, in place.

    Its length is what stands before those, as that is what is not computed again in front of them.
    """

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[:, :, self.start : self.stop] = new
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.start if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2] if self.is_initialized else query_length, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]


def empty(room: int | None, renewed: tuple[int, int] | None = None) -> Cache:
    """A cache without positions. room: see `Prefix`. renewed: the positions of `Renewed`, instead of ``room``."""
    if renewed is not None:
        return Cache(layer_class_to_replicate=partial(Renewed, *renewed))
    return DynamicCache() if room is None else Cache(layer_class_to_replicate=partial(Room, room))


def filled(layers: list[tuple[Tensor, Tensor]], room: int | None) -> Cache:
    """A cache that holds these keys and values, one pair a layer; without ``room``, themselves and not copies."""
    cache = empty(room)
    for number, (keys, values) in enumerate(layers):
        if room is None:
            cache.layers.append(layer := DynamicLayer())
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:
            cache.update(keys, values, number)
    return cache
