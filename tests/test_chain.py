"""Chains of sums: problems, demonstrations, and what the verifier says."""

import pickle
import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from espo_lightning import fit, sft
from espo_lightning.tasks import Chain
from espo_lightning.tasks.chain import KEYS, draw_chain, verify

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TOLD = {"+": 1, "-": -1}


def follows(key: str, before: int, after: int) -> bool:
    """Stated once more."""
    return (2 * before if key == "*" else before + TOLD[key]) % 10 == after


@pytest.mark.parametrize("steps", [8, 16, 64])
def test_right_demonstrations_are_right_and_as_long_as_the_canvas(steps):
    task = Chain(steps)
    for index in range(30):
        problem = task.problem("train", 3, index)
        start, target = map(int, problem.prompt.split(">"))
        digits = [start, *map(int, problem.answer[1::2])]
        assert len(problem.answer) == 2 * steps
        assert all(follows(*step) for step in zip(problem.answer[::2], digits, digits[1:]))
        assert digits[-1] == target
        assert problem.verify(problem.answer) == {"reward": 1.0, "exact": 1.0, "step": 1.0, "end": 1.0}


def test_the_others_slip_once_at_any_step_and_end_where_they_should():
    places, wrong = Counter(), 0
    for index in range(400):
        problem = Chain(8, right=0.3).problem("train", 0, index)
        start = int(problem.prompt[0])
        digits = [start, *map(int, problem.answer[1::2])]
        slips = [not follows(*step) for step in zip(problem.answer[::2], digits, digits[1:])]
        assert sum(slips) <= 1
        assert problem.verify(problem.answer)["end"] == 1.0
        places += Counter(i for i, slip in enumerate(slips) if slip)
        wrong += sum(slips)
    assert abs(wrong - 280) < 4 * (400 * 0.7 * 0.3) ** 0.5
    assert set(places) == set(range(8))


def test_every_end_can_be_reached_from_every_start():
    for start, target in product(range(10), repeat=2):
        for slip in (None, 0, 7):
            assert draw_chain(start, target, 8, slip, random.Random(0))[-1] == str(target)


RIGHT = "+8+9-8*6+7-6*2+3"


@pytest.mark.parametrize(
    ("text", "exact", "step", "end"),
    [
        (RIGHT, 1, 1, 1),
        (" ".join(RIGHT) + "\n", 1, 1, 1),
        (RIGHT[:-2] + "-1", 0, 1, 0),  # another end
        ("+9" + RIGHT[2:], 0, 6 / 8, 1),  # two steps are wrong: into the 9, and out of it
        (RIGHT[:-2] + "*3", 0, 7 / 8, 1),
        (RIGHT[:-2], 0, 0, 0),
        (RIGHT + "+4", 0, 0, 0),
        (RIGHT.replace("*", "/"), 0, 0, 0),
        (RIGHT.replace("8", "８"), 0, 0, 0),
        (RIGHT + RIGHT, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_verdicts(text, exact, step, end):
    for reward in ("exact", "step"):
        graded = exact if reward == "exact" else (8 * step + end) / 9
        expected = {"reward": graded, "exact": exact, "step": step, "end": end}
        assert verify(7, 3, 8, reward, text) == pytest.approx(expected)


def test_facts_by_hand():
    assert [KEYS["+"](9), KEYS["-"](0), KEYS["*"](7)] == [0, 9, 4]


def test_problems_depend_on_their_arguments_only_and_pickle():
    task = Chain(8, right=0.5)
    problems = [task.problem(split, seed, 5) for split in ("train", "test") for seed in (0, 1)]
    assert len({(p.prompt, p.answer) for p in problems}) == 4
    again = pickle.loads(pickle.dumps(task)).problem("train", 0, 5)
    assert (again.prompt, again.answer) == (problems[0].prompt, problems[0].answer)
    assert pickle.loads(pickle.dumps(again)).verify(again.answer)["end"] == 1.0


@pytest.mark.parametrize(("settings", "message"), [({"steps": 7}, "steps"), ({"right": 1.5}, "between 0 and 1")])
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Chain(**settings)
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        Chain().problem("dev", 0, 0)


@pytest.mark.slow
def test_its_recipes_make_a_policy_and_train_it(tmp_path, monkeypatch):
    """On the smallest canvas: sft from scratch, and a rollout of RL."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.task.steps=8", "--data.batches=2", "--data.batch_size=2", "--trainer.accelerator=cpu"]
    base = ["--config", str(EXPERIMENTS / "chain_base.yaml"), "--run_dir=runs/chain_base", "--model.length=16"]
    sft.main([*base, *small])
    canvas = ["--model.decoding.length=16", "--model.decoding.steps=16", "--data.eval_problems=2"]
    rl = ["--config", str(EXPERIMENTS / "chain_tiny.yaml"), "--run_dir=run", "--model.group_size=2"]
    rl += ["--model.policy.path=runs/chain_base/policy"]
    fit.main([*rl, *canvas, *small])
    assert (tmp_path / "run" / "summary.json").exists()
