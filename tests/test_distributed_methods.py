"""Every method on two processes does what it does on one: completions, rewards, metrics, weights."""

import pytest
import two_processes
from two_processes import METHODS, assert_same

QUICK = ("gdsd", "spg", "stabledrl", "tracerl")  # of each objective one, which couple completions or groups
SLOW = tuple(name for name in METHODS if name not in QUICK)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> tuple[dict, dict]:
    """Of some methods the runs on one process, and on two."""
    folder = tmp_path_factory.mktemp("methods")
    one = two_processes.alone(folder, request.param)
    return one, two_processes.staged(folder, ",".join(request.param), timeout=1500)


@pytest.mark.parametrize(
    ("results", "name"),
    [
        *(pytest.param(QUICK, name, id=name) for name in QUICK),
        *(pytest.param(SLOW, name, id=name, marks=pytest.mark.slow) for name in SLOW),
    ],
    indirect=["results"],
)
def test_two_processes_do_what_one_does(results, name):
    one, two = results
    assert_same(two["ddp", name, "whole"], one[name])
