"""Settings that contradict each other or are out of range, refused before anything begins."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.objectives.objective import Objective
from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts, check_numbers, check_whole
from espo_lightning.scoring.likelihood import Likelihood


def check_settings(
    policy: Policy,
    decoding: Decoder,
    likelihood: Likelihood,
    objective: Objective,
    group_size: int,
    updates: int,
    micro_batch: int | None,
    reference_sync: int | None,
) -> None:
    """Raises ValueError if the arguments of `ESPOModule` that these are do not fit together."""
    check_whole(group_size=group_size, updates=updates, micro_batch=micro_batch)
    check_counts(1, reference_sync=reference_sync)
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2: an advantage compares completions; got {group_size}")
    if updates < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(f"updates and micro_batch must be at least 1, got {updates} and {micro_batch}")
    if objective.groups and micro_batch is not None and micro_batch % group_size:
        raise ValueError(
            f"micro_batch must be a multiple of group_size {group_size}, as {type(objective).__name__} weighs the "
            f"completions of a prompt against each other; got {micro_batch}"
        )
    if reference_sync is not None:
        if not objective.reference:
            raise ValueError("reference_sync has no effect with beta=0: there is no reference; set beta or drop it")
        if policy.has_adapters:
            raise ValueError("reference_sync is not possible with adapters: the reference is the base without them")
    decoding.check(policy)
    if decoding.temperature == 0:
        raise ValueError("decoding.temperature is 0: the completions of a group would all be equal; set it above 0")
    likelihood.check(policy, decoding.length, updates)
    likelihood.check_decoding(decoding, updates)
    objective.check(likelihood, decoding)


def check_updates(warmup: int, max_grad_norm: float | None, max_skipped: int) -> None:
    """Raises ValueError for a number of `ESPOModule` that is out of range; a negative norm would reverse a gradient."""
    check_counts(0, warmup=warmup, max_skipped=max_skipped)
    check_numbers("(0, inf]", max_grad_norm=max_grad_norm)


def check_training(
    policy: Policy, optimizer: Callable[[Any], torch.optim.Optimizer], length: int, max_prompt_length: int, seed: int
) -> None:
    """Raises ValueError if a policy cannot be trained like this, by RL or supervised, on a canvas of ``length``."""
    check_counts(1, max_prompt_length=max_prompt_length)
    check_counts(0, seed=seed)
    policy.check_canvas(length)
    if any(weight.dtype == torch.float16 for weight in policy.parameters()):
        raise ValueError(
            "policy.dtype must be float32 or bfloat16 to train, got float16: gradients are not scaled, so that small "
            "ones would be lost in it, and a step could make weights infinite"
        )
    check_optimizer(optimizer, {p.ndim for p in policy.parameters() if p.requires_grad} or {2})


def check_optimizer(make: Callable[[Any], torch.optim.Optimizer], dimensions: Iterable[int]) -> None:
    """Try an optimizer on weights of 0 with gradients of 1: two steps must lower them, or leave them where they are.

    Args:
        dimensions: those of the weights, as some optimizers take matrices only.

    Raises:
        ValueError: it cannot be made, needs a closure, or does what no descent does.
    """
    weights = [nn.Parameter(torch.zeros([2] * n)) for n in sorted(dimensions)]
    try:
        optimizer = make(weights)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer cannot be made: {error}") from error
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must make a torch.optim.Optimizer, got a {name}")
    try:
        for _ in range(2):  # momentum begins with the second
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
    except TypeError as error:
        raise ValueError(f"optimizer {name} cannot take a step from gradients alone: {error}") from error
    except (AssertionError, RuntimeError):  # made for another device, or for sparse gradients: the first update tells
        return
    moved = torch.cat([weight.detach().flatten() for weight in weights])
    if not moved.isfinite().all():
        raise ValueError(f"optimizer {name} makes weights NaN or infinite in two steps: check lr and its other numbers")
    if moved.max() > 0:
        raise ValueError(
            f"optimizer {name} climbs, it moves weights along their gradients, but a loss is to be minimised: check "
            "maximize, and the signs of its numbers"
        )
