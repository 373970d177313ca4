"""The shape of a network: all that counting needs."""

import json
from dataclasses import dataclass
from pathlib import Path

from espo_lightning.policies.files import resolve
from espo_lightning.policies.formats import make_config


@dataclass(frozen=True)
class Network:
    """The shape of a Llama-like network; the names are those of transformers' configs."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    qkv_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    shift: int = 0  # 1 if the state before a token predicts it

    @property
    def attention(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of q_proj, k_proj, v_proj and o_proj."""
        h, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h)]

    @property
    def mlp(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of gate_proj, up_proj and down_proj."""
        h, f = self.hidden_size, self.intermediate_size
        return [(h, f), (h, f), (f, h)]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        linears = self.attention + self.mlp
        bias = sum(n for _, n in self.attention[:3]) if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return sum(m * n for m, n in linears) + bias + norms

    @property
    def parameters(self) -> int:
        """All parameters (N)."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.layers * self.layer_parameters + embeddings + self.hidden_size

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all seven linear layers, as in `LoRA`."""
        return self.layers * rank * sum(m + n for m, n in self.attention + self.mlp)


# their config.json on the hub; Dream's is that of Qwen2.5-7B, and SDAR's that of Qwen3-8B, from which they were made
LLADA_8B = Network(4096, 32, 32, 32, 128, 12288, 126464)
DREAM_7B = Network(3584, 28, 28, 4, 128, 18944, 152064, qkv_bias=True, shift=1)
SDAR_8B = Network(4096, 36, 32, 8, 128, 12288, 151936, qk_norm=True)
KNOWN = {
    "GSAI-ML/LLaDA-8B-Instruct": LLADA_8B,
    "Dream-org/Dream-v0-Instruct-7B": DREAM_7B,
    "JetLM/SDAR-8B-Chat": SDAR_8B,
}


def read_network(policy: str) -> Network:
    """The shape of a checkpoint: of a hub id in `KNOWN`, a folder or ``bundled:NAME``. Nothing is downloaded.

    Raises:
        ValueError: anything else, or a config.json that is of none of the formats.
    """
    if policy in KNOWN:
        return KNOWN[policy]
    if not policy.startswith("bundled:") and not Path(policy).expanduser().is_dir():
        raise ValueError(
            f"policy must be a folder with a config.json, bundled:NAME or {' or '.join(KNOWN)}: {policy!r}"
        )
    config = make_config(json.loads((resolve(policy) / "config.json").read_text(encoding="utf-8")))
    return Network(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        qkv_bias=config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        tied=config.tie_word_embeddings,
        qk_norm=config.model_type == "qwen3",
        shift=getattr(config, "logits_shift", 0),
    )
