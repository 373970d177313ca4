"""The policy and the state that the tests of studies look at."""

import pytest

from espo_lightning import (
    Sudoku,
    load_policy,
)
from espo_lightning.lab.studies.states import (
    SUDOKU,
    contested_states,
)

TASK = Sudoku(empty=2)


@pytest.fixture(name="policy", scope="module")
def policy_fixture():
    return load_policy(SUDOKU)


@pytest.fixture(name="state", scope="module")
def state_fixture(policy):
    return contested_states(policy, seed=0, count=1, free=2)[0]
