"""Every method on two processes does what it does on one: completions, rewards, metrics, weights."""

import pytest
import two_processes
from two_processes import METHODS, assert_same

QUICK = ("gdsd", "spg", "stabledrl", "tracerl")  # of each objective one, which couple completions or groups
SLOW = tuple(name for name in METHODS if name not in QUICK)


def one_and_two(names: tuple[str, ...], folder) -> tuple[dict, dict]:
    one = two_processes.alone(folder, names)
    return one, two_processes.staged(folder, ",".join(names), timeout=1500)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, dict]:
    return one_and_two(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> tuple[dict, dict]:
    return one_and_two(SLOW, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_do_what_one_does(quick, name):
    one, two = quick
    assert_same(two["ddp", name, "whole"], one[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_do_what_one_does_in_every_other_method(slow, name):
    one, two = slow
    assert_same(two["ddp", name, "whole"], one[name])
