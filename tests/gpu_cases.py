"""The devices that a test runs on: the CPU in the default suite, and with ``make gpu`` the GPU of the machine, too."""

from collections.abc import Callable

import pytest
import torch
from conftest import small_policy

from espo_lightning import AutoregressiveDecoding, BlockDecoding, Decoding, Policy, new_policy
from espo_lightning.decoding.orders import entropy_order, random_order
from espo_lightning.decoding.schedules import origin_schedule
from espo_lightning.keys import real

GPU = "mps" if torch.backends.mps.is_available() and not torch.cuda.is_available() else "cuda"
EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)])


def trainer_on(device: str) -> dict:
    """Arguments of a Trainer."""
    return {"accelerator": device, "devices": 1}


def wide(device: str) -> torch.dtype:
    """The type in which no rounding changes a token: float64, but on Apple's GPUs."""
    return real(torch.device(device))


def opinionated(device: str, dtype: torch.dtype | None = None, **settings) -> Policy:
    """A policy whose weights are so large that its choices are clear."""
    policy = new_policy(32, 2, 4, 64, seed=1, **settings)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    policy.config.eos_token_id = [policy.tokenizer.eos_token_id, *range(20, 32)]  # so that texts end
    return policy.to(device, dtype or wide(device)).eval()


def decoding(cls: Callable = Decoding, block: int = 6, **settings):
    return cls(12, block, 12, **settings)


IN_BLOCKS = {"block": 6, "origin": "response"}
DECODERS = {  # name: decoder, what it decodes
    "confidence": (decoding(), {}),
    "greedy": (decoding(temperature=0.0), {}),
    "random order": (decoding(order=random_order), {}),
    "entropy, top-p, drawn": (decoding(order=entropy_order, top_p=0.9, order_temperature=0.5), {}),
    "origin": (decoding(block=12, order=random_order, schedule=origin_schedule), {}),
    "threshold": (decoding(threshold=0.7), {}),
    "early stop": (decoding(early_stop=True), {}),
    "threshold, early stop": (decoding(threshold=0.7, early_stop=True), {}),
    "prefix cache": (decoding(prefix_cache=True), {}),
    "corrector": (decoding(corrector=3), {}),
    "blocks": (decoding(BlockDecoding), IN_BLOCKS),
    "blocks, threshold, early stop": (decoding(BlockDecoding, threshold=0.7, early_stop=True), IN_BLOCKS),
    "blocks, global": (decoding(BlockDecoding), {"block": 6, "origin": "global"}),
    "causal": (AutoregressiveDecoding(12), {"causal": True}),
}


def moved(policy: Policy, device: str) -> Policy:
    return policy.to(device, wide(device))


def training_policy(device: str, **settings) -> Policy:
    """As the tests of training have it, in the widest type."""
    return moved(small_policy() if not settings else new_policy(16, 2, 2, 24, **settings), device)
