"""Types of numbers that are slow on the device at hand, and what to say of it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LARGE = 100_000_000  # parameters from which on matrix products are what a GPU spends its time with


def native_bfloat16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether the processor has instructions for bfloat16; true where torch cannot say (before `torch.cpu` could).

    Args:
        capabilities: what `torch.cpu.get_capabilities` says, which is asked by default.
    """
    if capabilities is None:
        ask = getattr(torch.cpu, "get_capabilities", None)
        capabilities = ask() if ask else {"bf16": True}
    return any(bool(has) for name, has in capabilities.items() if "bf16" in name)


def slow_type(policy: nn.Module, mixed: bool = False) -> str | None:
    """What makes computing on this device slow, in a sentence that says what to do; None = nothing that is known.

    Args:
        policy: where it is, and of the type it has, it computes.
        mixed: whether matrices are multiplied in bfloat16, whatever the weights are.
    """
    weights = list(policy.parameters())
    device, bfloat16 = weights[0].device.type, mixed or any(w.dtype == torch.bfloat16 for w in weights)
    if device == "cpu" and bfloat16 and not native_bfloat16():
        return (
            "this processor has no instructions for bfloat16, which is therefore emulated, slower than float32: use "
            "float32 here (dtype=float32, trainer.precision=32-true). Intel's have them from Cooper Lake and Sapphire "
            "Rapids on, AMD's from Zen 4, ARM's with the extension BF16"
        )
    plain = torch.get_float32_matmul_precision() == "highest"
    if device == "cuda" and not bfloat16 and plain and sum(w.numel() for w in weights) >= LARGE:
        return (
            "matrices are multiplied in float32 without TF32, the slowest way of a GPU: use dtype=bfloat16, or "
            "trainer.precision=bf16-mixed in training; or call torch.set_float32_matmul_precision('high')"
        )
    return None


def tell_slow_type(policy: nn.Module, mixed: bool = False) -> None:
    """Warn of `slow_type`, whose arguments these are."""
    if (line := slow_type(policy, mixed)) is not None:
        warnings.warn(line, stacklevel=2)
