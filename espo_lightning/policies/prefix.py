"""Parts of a forward pass: cached prefixes, a last layer that runs where it is read, a head in chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

HEAD_BYTES = 64 * 2**20  # float32 logits held at once; larger heads run in recomputed chunks


class _Room(DynamicLayer):
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


class Prefix:
    """Keys and values of positions that passed through the network once and are not computed again.

    In a causal network that is exact. In a bidirectional one they depend on everything that follows, so that later
    passes are approximate.

    Args:
        width: keep those of the first ``width`` positions, from the first pass; None = of all, from every pass.
        room: hold so many positions at most, written in place, for passes without a gradient; None = any number,
            copied with every pass.
    """

    def __init__(self, width: int | None, room: int | None = None):
        self.width, self.room = width, room
        self.cache = self._empty()

    def _empty(self) -> Cache:
        return DynamicCache() if self.room is None else Cache(layer_class_to_replicate=partial(_Room, self.room))

    def __len__(self) -> int:
        """Positions that are known."""
        return self.cache.get_seq_length()

    @contextmanager
    def filled(self, network: nn.Module, recomputes: bool) -> Iterator[None]:
        """A pass of ``network`` that writes into the cache, which then forgets all but the prefix.

        recomputes: its layers are recomputed in a backward pass, and would ignore the cache unless in eval mode.
        """
        if recomputes:
            network.eval()
        try:
            yield
        finally:
            if recomputes:
                network.train()
        if self.width is None or self.width == len(self):
            return
        if self.width:
            self.cache.crop(self.width - len(self))
        else:  # a cache without positions would still insist on its rows
            self.cache = self._empty()

    def of(self, rows: Tensor, stop: int | None = None) -> "Prefix":
        """Some rows, int64 indices that may repeat, and positions before ``stop``, as a store of its own.

        Without ``room``, gradients flow through it.
        """
        known, count = Prefix(self.width, self.room), len(self.cache.layers[0].keys)
        times, rest = divmod(len(rows), count)
        # all rows some times over, whose gradient is a plain sum, and that of an index a scattered one
        plain = rest == 0 and torch.equal(rows, torch.arange(count, device=rows.device).repeat(times))
        for number, layer in enumerate(self.cache.layers):
            keys, values = (x[:, :, :stop] for x in (layer.keys, layer.values))
            keys, values = (x.repeat(times, 1, 1, 1) if plain else x.index_select(0, rows) for x in (keys, values))
            if self.room is None:  # its update would copy them once more
                known.cache.layers.append(copy := DynamicLayer())
                copy.lazy_initialization(keys, values)
                copy.keys, copy.values = keys, values
            else:
                known.cache.update(keys, values, number)
        return known

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, an index."""
        self.cache.batch_select_indices(rows)


def selective_layer(layer: nn.Module, hidden_states: Tensor, rows: Tensor | None = None, **arguments: Any) -> Tensor:
    """The last decoder layer of Llama, Qwen2 and Qwen3: [N, T, d] -> [n, d], its MLP only where a token is predicted.

    The same numbers for less: nothing reads the last layer's output at other positions. On a 4-layer policy this saves
    about an eighth of every pass. Without ``rows`` it is the layer as it was. It is never checkpointed: the backward
    pass begins here.
    """
    if rows is None:
        return type(layer).forward(layer, hidden_states, **arguments)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    hidden = (hidden_states + attended).flatten(0, 1)[rows]
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def symbols_of(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """How many logits a head makes of one of the hidden states [n, d]; one that is no linear layer is asked."""
    if isinstance(head, nn.Linear):
        return head.weight.shape[0]
    with torch.no_grad():
        return head(hidden.new_zeros(1, hidden.shape[-1])).shape[-1]


def apply_head(
    head: Callable[[Tensor], Tensor], hidden: Tensor, reduce: Callable[..., Any], columns: tuple[Tensor, ...]
) -> Any:
    """``reduce(head(hidden).float(), *columns)`` in chunks of at most HEAD_BYTES of logits.

    With several chunks, the backward pass recomputes each one's logits instead of keeping them.

    Args:
        hidden: [n, d].
        columns: tensors [n], split along with ``hidden``.
    """

    def run(hidden: Tensor, *columns: Tensor) -> Any:
        return reduce(head(hidden).float(), *columns)

    chunk = max(1, HEAD_BYTES // (4 * symbols_of(head, hidden)))
    if len(hidden) <= chunk:
        return run(hidden, *columns)
    pieces = zip(hidden.split(chunk), *(c.split(chunk) for c in columns))
    if torch.is_grad_enabled():
        outputs = [checkpoint(run, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        outputs = [run(*piece) for piece in pieces]
    return torch.cat(outputs) if isinstance(outputs[0], Tensor) else tuple(torch.cat(x) for x in zip(*outputs))
