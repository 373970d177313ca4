"""Policies, prompts, keys and the test of laws that the tests of decoding share."""

import pytest
import torch

from espo_lightning import (
    Prompts,
    new_policy,
)
from espo_lightning.keys import fold_in

PROMPT = Prompts(torch.zeros(1, 2, dtype=torch.int64), None)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_of(seed: int, n: int) -> torch.Tensor:
    return fold_in(seed, torch.arange(n))


def assert_law(observed: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square test of counts [cells] at the level 1e-4, fixed once for all; cells of probability 0 stay empty."""
    assert observed[probabilities == 0].sum() == 0
    observed, probabilities = observed[probabilities > 0], probabilities[probabilities > 0].double()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    expected = observed.sum() * probabilities / probabilities.sum()
    assert expected.min() >= 5  # else the chi-square law is no approximation
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2) > 1e-4


def peaky_policy(seed: int = 0):
    """A small random policy with spread logits: proposals and confidences are nowhere near a tie."""
    policy = new_policy(hidden_size=32, layers=2, heads=2, intermediate_size=48, seed=seed)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(20)
        for layer in policy.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return policy.eval()


@pytest.fixture(name="policy", scope="module")
def policy_fixture():
    return peaky_policy()


def some_prompts(rows: int, width: int = 5, seed: int = 0) -> Prompts:
    return Prompts(torch.randint(7, 60, (rows, width), generator=rng(seed)), None)


class Recorder:
    """A policy that notes every canvas and selection it is called with."""

    def __init__(self, policy):
        self.policy, self.canvases, self.selections = policy, [], []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, ids, attention, select, reduce, *columns, **prefix):
        self.canvases.append(ids.clone())
        self.selections.append(select.clone())
        return self.policy(ids, attention, select, reduce, *columns, **prefix)


class Constant:
    """The same logits at every position."""

    def __init__(self, logits: list[float], mask_id: int):
        self.logits, self.mask_id = torch.tensor(logits), mask_id

    def __call__(self, ids, attention, select, reduce, *columns):
        return reduce(self.logits.expand(int(select.sum()), -1), *columns)


def nucleus(probabilities: list[float], top_p: float) -> list[float]:
    """The nucleus of one row, as a law."""
    kept, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda v: -probabilities[v]):
        if total <= top_p:
            kept.add(token)
        total += probabilities[token]
    total = sum(probabilities[v] for v in kept)
    return [p / total if v in kept else 0.0 for v, p in enumerate(probabilities)]
