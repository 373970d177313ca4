"""What the benchmarks share: clocks, memory, the processor, fresh processes, models of a given size."""

import gc
import multiprocessing
import platform
import re
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning import Policy
from espo_lightning.policies.tiny import character_tokenizer


def user_seconds() -> float:
    """User CPU seconds of this process so far. With one thread, the fairest clock on a machine that is shared."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_peak(size: int = 1024, repeats: int = 5) -> float:
    """FLOP per user CPU second of a large square float32 matrix product; the best of several runs of 10."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    best = 0.0
    for _ in range(repeats):
        start = user_seconds()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * size**3 / (user_seconds() - start))
    return best


def resident_peak(function: Callable[[], Any]) -> float:
    """By how many MiB the resident memory of this process rises while ``function`` runs (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def host() -> dict[str, Any]:
    """What a timing depends on: the processor, its bfloat16 instructions (none: emulated), torch and its vectors."""
    text = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "processor": name[1] if name else platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [f for f in ("avx512_bf16", "amx_bf16", "bf16") if flags and f in flags[1].split()],
        "torch": torch.__version__,
    }


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """The result of ``function`` in a new one-thread Python process: no warm caches, no memory of earlier runs."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *args).result()


def random_policy(
    hidden_size: int, layers: int, heads: int, intermediate_size: int, vocabulary: int = 64, seed: int = 0
) -> Policy:
    """A random diffusion LM of LLaDA's architecture. Weights are large enough for distinct greedy choices."""
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, hidden_size**-0.5, generator=generator)
    return Policy(model, tokenizer, mask_id=tokenizer.mask_token_id)
