"""The policy and the state that the tests of studies look at."""

from concurrent.futures import Future

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


class Inline:
    """An executor without processes."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except RuntimeError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options):
        pass
