"""Orders, decoders and paths over three positions."""

import itertools

import pytest
import torch
from decoding_cases import rng

from espo_lightning import (
    Decoding,
    Seen,
    Trace,
    left_to_right,
    random_order,
)
from espo_lightning.lab.exact import (
    enumerate_completions,
)
from espo_lightning.lab.tabular import TabularPolicy

V = L = 3
ALL = enumerate_completions(V, L)  # [27, 3]
ORDERS = {  # all steps [orders, L] that a decoder may take, each equally likely whatever the policy says
    "random order": torch.tensor(list(itertools.permutations(range(3)))),
    "random order, two tokens a step": torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
    "left to right": torch.tensor([[0, 1, 2]]),
    "left to right, two tokens a step": torch.tensor([[0, 0, 1]]),
    "one step": torch.tensor([[0, 0, 0]]),
}
DECODERS = {
    "random order": Decoding(3, 3, 3, order=random_order),
    "random order, two tokens a step": Decoding(3, 3, 2, order=random_order),
    "left to right": Decoding(3, 1, 3),
    "left to right, two tokens a step": Decoding(3, 3, 2, order=left_to_right),
    "one step": Decoding(3, 3, 1),
}


def seen_of(steps: torch.Tensor, entropy: torch.Tensor | None = None, **changes) -> Seen:
    trace = Trace(steps, torch.ones(steps.shape) if entropy is None else entropy)
    return Seen.whole(torch.arange(len(steps)), steps.shape[1])._replace(trace=trace, **changes)


def paths(orders: torch.Tensor, completions: torch.Tensor = ALL) -> tuple[torch.Tensor, torch.Tensor]:
    """Every completion in every order: token ids and steps, each [completions x orders, L]."""
    return completions.repeat_interleave(len(orders), 0), orders.repeat(len(completions), 1)


@pytest.fixture(name="policy", scope="module")
def policy_fixture():
    return TabularPolicy(V, L, generator=rng(0))
