"""Tabular policies, targets and losses of the tests of balances and of SEPO."""

import math
from pathlib import Path

import torch
from decoding_cases import PROMPT, rng
from trajectory_cases import ORDERS, paths, seen_of

from espo_lightning import (
    Scores,
    Trajectory,
)
from espo_lightning.lab.tabular import TabularPolicy

GOLDEN = Path(__file__).parent / "golden" / "methods"
CLOSE = {"rtol": 0, "atol": 1e-12}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy_of(values) -> TabularPolicy:
    """A joint law [27], or free conditionals [64, 3, 3]."""
    table = torch.as_tensor(values, dtype=torch.float64)
    policy = TabularPolicy(3, 3, generator=rng(0), consistent=table.ndim == 1)
    policy.table.data = table.clone()
    return policy


def path_scores(policy, name: str) -> Scores:
    """Of every completion in every order that a decoder takes: [T, 27 orders, 3]."""
    completion, steps = paths(ORDERS[name])
    seen = seen_of(steps)
    masks = Trajectory().masks(seen.keys, seen)
    new = Trajectory().log_probs(policy, PROMPT.repeat_each(len(completion)), completion, masks)
    return Scores(new, None, None, masks.weight.double(), torch.full((len(completion),), 3))


def path_law(policy, name: str) -> torch.Tensor:
    """log P of every path: [27 orders]."""
    scores = path_scores(policy, name)
    return scores.terms.sum(-1).mean(0) - math.log(len(ORDERS[name]))


def total_variation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum()) / 2


def completion_law(policy, name: str = "random order") -> torch.Tensor:
    return path_law(policy, name).exp().view(27, -1).sum(1).detach()
