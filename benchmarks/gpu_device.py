"""What `gpu.py` measures, and its clocks: a policy of LLaDA's shape made on a device, and seconds of what it does."""

import gc
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning import LoRA, Policy
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.lora import add_adapter
from espo_lightning.policies.tiny import character_tokenizer


@dataclass(frozen=True)
class Size:
    """A network of LLaDA's shape, and the authors' settings for it."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 12288
    vocabulary: int = 126464
    rank: int = 128
    prompt: int = 400
    length: int = 256
    block: int = 32
    group: int = 6
    draws: int = 2
    updates: int = 8
    product: int = 8192  # of the matrices by which the card's peak is measured


SIZES = {"8B": Size(), "1B": Size(2048, 16, 16, 6144), "tiny": Size(32, 2, 2, 64, 96, 4, 12, 16, 4, 2, 1, 2, 64)}


def make_policy(size: Size, device: torch.device) -> Policy:
    """Frozen bfloat16 weights and float32 adapters."""
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
        logits_shift=0,
        mask_token_id=tokenizer.mask_token_id,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    policy = Policy(model, tokenizer, mask_id=tokenizer.mask_token_id)
    policy.model = add_adapter(policy.model, LoRA(rank=size.rank, alpha=size.rank / 2))
    return policy.to(device)


def in_blocks(policy: Policy, block: int) -> Policy:
    """The same weights, read as a block-causal policy."""
    made = Policy(policy.language_model, policy.tokenizer, mask_id=policy.mask_id, layout=Layout(block, "response"))
    made.model = policy.model
    return made


# ---- clocks ----------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> float:
    """Seconds on the clock, once the device has done all that it was sent."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_gigabytes(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    """Give memory back, and begin to note its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured_peak(size: int, device: torch.device, repeats: int = 10) -> float:
    """TFLOP/s of a square bfloat16 product, the best of three."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(3):
        start = wait(device)
        for _ in range(repeats):
            a @ b
        best = max(best, 2 * size**3 * repeats / (wait(device) - start) / 1e12)
    return best


class Enough(Exception):
    """As many steps as are to be timed."""


class Stopwatch:
    """Times passes of a policy: from the one after ``skipped``, ``passes`` of them, and then ends the rollout."""

    def __init__(self, policy: Policy, skipped: int, passes: int, deadline: float):
        self.device, self.skipped, self.passes, self.deadline = policy.device, skipped, passes, deadline
        self.count, self.start, self.seconds, self.measured = 0, 0.0, 0.0, 0
        self.hook = policy.register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        if self.count == self.skipped:
            self.start = wait(self.device)
        late = self.count > self.skipped and time.monotonic() > self.deadline
        if self.count == self.skipped + self.passes or late:
            self.stop()
            raise Enough
        self.count += 1

    def stop(self) -> None:
        self.seconds, self.measured = wait(self.device) - self.start, self.count - self.skipped


def card(device: torch.device) -> dict:
    """What it was measured on."""
    facts: dict[str, Any] = {"device": device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "memory_GB": properties.total_memory / 1e9}
        facts["capability"] = list(torch.cuda.get_device_capability(device))
        try:
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            facts["driver"] = None
    return facts
