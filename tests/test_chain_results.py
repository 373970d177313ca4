"""What docs/results.md says of the longer canvas is what the kept runs say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "website"))

import results

from espo_lightning.lab.evidence import interval


def gained(measure: str) -> list[float]:
    return [run["after"][measure] - run["before"][measure] for run in results.kept("chain")]


def test_the_prose_says_what_the_intervals_say():
    assert [run["seed"] for run in results.kept("chain")] == [0, 1, 2, 3, 4]
    assert {run["rollouts"] for run in results.kept("chain")} == {20}
    for measure in ("step", "reward"):
        assert interval(gained(measure))[0] > 0
        assert min(gained(measure)) > 0
    low, high = interval(gained("exact"))
    assert low < 0 < high


def test_the_runs_began_with_the_same_policy():
    assert len({run["before"]["step"] for run in results.kept("chain")}) == 1
    assert {run["before"]["clusters"] for run in results.kept("chain")} == {26}
