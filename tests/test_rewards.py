"""Composable rewards: sums, keys, failures, import paths."""

import pickle
from functools import partial

import pytest

from espo_lightning.tasks import rewards
from espo_lightning.tasks.base import Problem, Task
from espo_lightning.tasks.rewards import Weighted, brevity, load, tags, weighted


def says(word: str, text: str) -> dict[str, float]:
    return {"reward": float(word in text), "exact": float(word == text)}


def broken(text: str) -> dict[str, float]:
    raise KeyError(text)


class Words(Task):
    def problem(self, split: str, seed: int, index: int) -> Problem:
        return Problem("Say yes.", partial(says, "yes"), "yes")


def test_weighted_sum_logs_every_part():
    parts = {"a": (2.0, partial(says, "x")), "b": (-0.5, partial(says, "y")), "c": (1.0, brevity)}
    verdict = weighted("xy", parts)
    assert verdict["reward"] == pytest.approx(2.0 - 0.5 - 0.002)
    assert verdict["exact"] == 0.0
    assert verdict["failed"] == 0.0
    assert {k: v for k, v in verdict.items() if "/" in k} == {
        "a/failed": 0.0,
        "a/reward": 1.0,
        "a/exact": 0.0,
        "b/failed": 0.0,
        "b/reward": 1.0,
        "b/exact": 0.0,
        "c/failed": 0.0,
        "c/reward": -0.002,
    }


def test_a_part_that_raises_scores_zero_and_is_counted():
    verdict = weighted("x", {"good": (1.0, partial(says, "x")), "bad": (1.0, broken)})
    assert verdict["reward"] == 1.0
    assert verdict["failed"] == verdict["bad/failed"] == 1.0
    assert verdict["exact"] == verdict["good/exact"] == 1.0


@pytest.mark.parametrize("verdict", [{"reward": float("nan")}, {"exact": 1.0}, {"reward": "much"}, None])
def test_a_part_without_a_finite_reward_scores_zero_and_is_counted(verdict):
    total = weighted("x", {"good": (1.0, partial(says, "x")), "bad": (1.0, lambda _: verdict)})
    assert (total["reward"], total["failed"], total["bad/failed"], total["good/failed"]) == (1.0, 1.0, 1.0, 0.0)


def test_a_part_that_reports_a_failure_is_counted():
    timeout = {"reward": 0.0, "failed": 1.0, "timeout": 1.0}
    total = weighted("", {"a": (1.0, lambda _: timeout), "b": (1.0, partial(says, "x"))})
    assert (total["failed"], total["timeout"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<reasoning>a</reasoning><answer>b</answer>", 1.0),
        ("x <reasoning>a</reasoning>\n<answer></answer> y", 1.0),
        ("<answer>b</answer><reasoning>a</reasoning>", 0.0),
        ("<reasoning>a</reasoning><answer>b", 0.0),
        ("<reasoning>a</reasoning><answer>b</answer><answer>c</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags(text, reward):
    assert tags(text) == {"reward": reward}


def test_brevity():
    assert [brevity("x" * n, free=10, limit=20)["reward"] for n in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="free < limit"):
        brevity("", free=5, limit=5)


def test_load():
    assert load("espo_lightning.tasks.rewards.tags") is tags
    for path in ("tags", "", "no.such.module", "espo_lightning.tasks.rewards.nothing", ".x"):
        with pytest.raises(ValueError, match="import path"):
            load(path)
    with pytest.raises(ValueError, match="not a function"):
        load("espo_lightning.tasks.rewards.__doc__")


def test_weighted_task():
    task = Weighted(Words(), weight=2.0, extra={"espo_lightning.tasks.rewards.tags": 0.5})
    problem = pickle.loads(pickle.dumps(task.problem("train", 0, 0)))
    assert (problem.prompt, problem.answer) == ("Say yes.", "yes")
    assert problem.verify("yes")["reward"] == 2.0
    verdict = problem.verify("yes <reasoning></reasoning><answer></answer>")
    assert verdict["reward"] == 2.5
    assert (verdict["task/reward"], verdict["tags/reward"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="share a name"):
        Weighted(Words(), extra={f"{rewards.__name__}.tags": 1.0, "a.tags": 1.0, "b.task": 1.0}).problem("train", 0, 0)
