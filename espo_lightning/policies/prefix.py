"""Parts of a forward pass: cached prefixes, a last layer that runs where it is read, a head in chunks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYERS = {"LlamaDecoderLayer": "llama", "Qwen2DecoderLayer": "qwen2", "Qwen3DecoderLayer": "qwen3"}
HEAD_BYTES = 64 * 2**20  # float32 logits held at once; larger heads run in recomputed chunks


def _empty(room: int | None, renewed: tuple[int, int] | None = None) -> Any:
    from espo_lightning.policies.room import empty

    return empty(room, renewed)


class Prefix:
    """Keys and values of positions that passed through the network once and are not computed again.

    In a causal network that is exact. In a bidirectional one they depend on everything that follows, so that later
    passes are approximate.

    Args:
        width: keep those of the first ``width`` positions, from the first pass; None = of all, from every pass.
        room: hold so many positions at most, written in place, for passes without a gradient; None = any number,
            copied with every pass.
        stop: keep those of all positions of the first pass; later passes compute only the ones from ``width`` to
            ``stop``, and write them anew. None = later passes compute everything that follows the prefix.
    """

    def __init__(self, width: int | None, room: int | None = None, stop: int | None = None):
        self.width, self.room, self.stop = width, room, stop
        self.cache = _empty(room, None if stop is None else (width or 0, stop))

    def __len__(self) -> int:
        """Positions that are known."""
        return self.cache.get_seq_length()

    @property
    def computed(self) -> slice:
        """The positions that the next pass computes."""
        first = self.stop is None or not self.cache.layers  # which computes all that follows
        return slice(len(self), None if first else self.stop)

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
        if self.stop is not None or self.width is None or self.width == len(self):
            return
        if self.width:
            self.cache.crop(self.width - len(self))
        else:  # a cache without positions would still insist on its rows
            self.cache = _empty(self.room)

    def of(self, rows: Tensor, stop: int | None = None) -> "Prefix":
        """Some rows, int64 indices that may repeat, and positions before ``stop``, as a store of its own.

        Without ``room``, gradients flow through it.
        """
        from espo_lightning.policies.room import filled

        known, count = Prefix(self.width, self.room), len(self.cache.layers[0].keys)
        times, rest = divmod(len(rows), count)
        # all rows some times over, whose gradient is a plain sum, and that of an index a scattered one
        plain = rest == 0 and torch.equal(rows, torch.arange(count, device=rows.device).repeat(times))

        def some(x: Tensor) -> Tensor:
            x = x[:, :, :stop]
            return x.repeat(times, 1, 1, 1) if plain else x.index_select(0, rows)

        known.cache = filled([(some(layer.keys), some(layer.values)) for layer in self.cache.layers], self.room)
        return known

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, an index."""
        self.cache.batch_select_indices(rows)


def selectable(layer: nn.Module | None) -> bool:
    """Whether a layer is transformers' own of Llama, Qwen2 or Qwen3, as `selective_layer` needs it."""
    # by name, as none of these modules need be imported
    family = LAYERS.get(type(layer).__name__)
    return type(layer).__module__ == f"transformers.models.{family}.modeling_{family}"


def selective_layer(layer: nn.Module, hidden_states: Tensor, rows: Tensor | None = None, **arguments: Any) -> Tensor:
    """The last decoder layer of Llama, Qwen2 and Qwen3: [N, T, d] -> [n, d], its MLP only where a token is predicted.

    The same numbers for less: nothing reads the last layer's output at other positions. On a 4-layer policy this saves
    about an eighth of every pass. Without ``rows`` it is the layer as it was. It is never checkpointed: the backward
    pass begins here. A pass that predicts nothing is for the cache alone, see `write_keys`.
    """
    if rows is None:
        return type(layer).forward(layer, hidden_states, **arguments)
    if not len(rows) and arguments.get("past_key_values") is not None:
        write_keys(layer, hidden_states, arguments["past_key_values"], arguments["position_embeddings"])
        return hidden_states.flatten(0, 1)[:0]
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    hidden = (hidden_states + attended).flatten(0, 1)[rows]
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def write_keys(layer: nn.Module, hidden_states: Tensor, cache: Any, rotation: tuple[Tensor, Tensor]) -> None:
    """Keys and values of a layer into the cache, [N, T, d] -> nothing: its queries and its output are left out.

    rotation: cosines and sines, as `selective_layer` gets them.
    """
    attention = layer.self_attn  # whose class keeps its module, where FSDP gives the layer another
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    hidden = layer.input_layernorm(hidden_states)
    keys, values = (
        project(hidden).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):  # Qwen3
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    cache.update(rotate(keys, keys, *rotation)[1], values, attention.layer_idx)


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
