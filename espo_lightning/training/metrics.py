"""Metrics of all processes: sums and counts that add up. docs/metrics.md explains each."""

import math

import torch
from torch import Tensor

from espo_lightning.keys import real
from espo_lightning.objectives.advantages import equal_groups
from espo_lightning.policies.policy import Policy
from espo_lightning.training.gradient import Loss
from espo_lightning.training.rollout import Rollout
from espo_lightning.training.strategies import gather

Share = tuple[Tensor | float, float]  # sum and count of one process's values of a metric


def share(values: Tensor) -> Share:
    """Sum and count of the values of this process. The sum stays on its device, where `brought` gets it."""
    return values.to(real(values.device)).sum(), values.numel()


def brought(shares: list[dict[str, Share]]) -> list[dict[str, tuple[float, float]]]:
    """The same with sums that are floats of Python: the device is waited for once, not for every sum."""
    sums = [total for part in shares for total, _ in part.values() if isinstance(total, Tensor)]
    like = {"device": sums[0].device, "dtype": real(sums[0].device)} if sums else {}
    numbers = iter(torch.stack([total.to(**like) for total in sums]).tolist() if sums else [])
    return [{k: (next(numbers) if isinstance(s, Tensor) else s, n) for k, (s, n) in part.items()} for part in shares]


def pool(shares: list[dict[str, Share]]) -> dict[str, float]:
    """Means over the values of all processes, each with its weight; NaN where there is not a single value."""
    totals = {key: tuple(map(sum, zip(*(part[key] for part in shares)))) for key in shares[0]}
    return {key: total / count if count else math.nan for key, (total, count) in totals.items()}


def update_shares(pieces: list[Loss], rollout: Rollout, view: int) -> dict[str, Share]:
    """Of one update, over the completions that have a gradient; without any, there is nothing to be averaged.

    The objective's own statistics, "loss", "score_per_token", and "log_ratio_max", the largest absolute log-ratio.
    """
    counted = rollout.counted
    statistics = {key: torch.cat([p.statistics[key] for p in pieces])[:counted] for key in pieces[0].statistics}
    terms = torch.cat([p.log_probs for p in pieces], 1) * rollout.masks[view].weight
    shares = {key: share(values) for key, values in statistics.items()}
    if "log_ratio" in statistics:
        largest = statistics["log_ratio"].abs().max() if counted else 0.0
        shares["log_ratio_max"] = (largest, 1)
    shares["score_per_token"] = share(terms[:, :counted])
    shares["loss"] = (torch.stack([p.value for p in pieces]).sum(), 0 if rollout.idle else 1)
    return shares


def rollout_shares(rollout: Rollout, policy: Policy) -> dict[str, Share]:
    """Of the completions of this process."""
    lengths = policy.lengths(rollout.decoded)
    left = {}
    if not policy.causal:
        left = {"rollout/mask_tokens": ((rollout.decoded == policy.mask_id).sum(), 1)}
    return {
        "train/reward": share(rollout.rewards),
        "train/reward_std": share(rollout.rewards.std(-1)),
        "train/zero_variance_groups": share(equal_groups(rollout.rewards)),
        "rollout/length": share(lengths),
        "rollout/eos_rate": share(lengths < rollout.decoded.shape[1]),
        **left,
    }


def rollout_row(
    rollout: Rollout, updates: list[dict[str, Share]], seconds: dict[str, float], policy: Policy, world: int
) -> dict[str, float]:
    """The row of metrics of a rollout and its updates, over all ``world`` processes, which must call this together."""
    shares, *updates = brought([rollout_shares(rollout, policy), *updates])
    shares |= {f"time/{phase}": (s, 1) for phase, s in seconds.items()}
    for key in updates[0].keys() - {"log_ratio_max"}:
        shares[f"train/{key}"] = tuple(map(sum, zip(*(metrics[key] for metrics in updates))))
    largest = [metrics["log_ratio_max"][0] for metrics in updates if "log_ratio_max" in metrics and not rollout.idle]
    everyone = gather((shares, largest, rollout.verdicts))
    means = pool([part for part, _, _ in everyone])
    if "log_ratio_max" in updates[0]:
        largest = [value for _, part, _ in everyone for value in part]
        means["train/log_ratio_max"] = float(torch.tensor(largest).max()) if largest else math.nan  # NaN wins
    verdicts = [v for _, _, part in everyone for v in part]
    for key in sorted({key for v in verdicts for key in v} - {"reward"}):
        means[f"reward/{key}"] = sum(v.get(key, 0.0) for v in verdicts) / len(verdicts)
    tokens = rollout.decoded.numel() * world
    means["speed/rollout_tokens_per_s"] = tokens / means["time/rollout"]
    means["speed/update_tokens_per_s"] = tokens * len(updates) / (means["time/score"] + means["time/update"])
    return means
