"""Chains of sums: problems, demonstrations, and what the verifier says."""

import pickle
import random
from itertools import product
from pathlib import Path

import pytest

from espo_lightning import fit, sft
from espo_lightning.tasks import Chain
from espo_lightning.tasks.chain import KEYS, bent_chain, draw_chain, pairs, verify

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TOLD = {"+": 1, "-": -1}


def follows(key: str, before: int, after: int) -> bool:
    """Stated once more."""
    return (2 * before if key == "*" else before + TOLD[key]) % 10 == after


@pytest.mark.parametrize(("steps", "every"), [(4, 4), (16, 4), (64, 4), (24, 8), (10, 5)])
def test_right_demonstrations_are_right_and_as_long_as_the_canvas(steps, every):
    task = Chain(steps, every)
    for index in range(30):
        problem = task.problem("train", 3, index)
        start, target = map(int, problem.prompt.split(">"))
        digits = [start, *map(int, problem.answer[1::2])]
        assert len(problem.answer) == 2 * steps
        assert all(follows(*step) for step in zip(problem.answer[::2], digits, digits[1:]))
        assert digits[every::every] == [target] * (steps // every)
        assert problem.verify(problem.answer) == {"reward": 1.0, "exact": 1.0, "step": 1.0, "target": 1.0}


def test_the_others_add_one_and_write_the_target_where_it_is_due():
    bent = 0
    for index in range(400):
        problem = Chain(8, right=0.3).problem("train", 0, index)
        digits = [int(problem.prompt[0]), *map(int, problem.answer[1::2])]
        slips = [not follows(*step) for step in zip(problem.answer[::2], digits, digits[1:])]
        assert problem.verify(problem.answer)["target"] == 1.0
        assert {place for place, slip in enumerate(slips) if slip} <= {3, 7}
        assert not any(slips) or set(problem.answer[::2]) == {"+"}
        bent += any(slips)
    assert abs(bent - 280) < 4 * (400 * 0.7 * 0.3) ** 0.5
    assert bent_chain(7, 3, 8, 4) == "+8+9+0+3+4+5+6+3"


def test_four_steps_lead_from_any_digit_to_any_other_and_three_do_not():
    for start, target in product(range(10), repeat=2):
        assert draw_chain(start, target, 4, 4, random.Random(0))[-1] == str(target)
    with pytest.raises(ValueError, match="every"):
        Chain(6, every=3)


def test_the_splits_share_no_prompt():
    """And each digit starts, and is a target, in both."""
    assert len(pairs("test")) == 26
    assert sorted(pairs("train") + pairs("test")) == list(product(range(10), repeat=2))
    for split in ("train", "test"):
        asked = {tuple(map(int, Chain(8).problem(split, 1, index).prompt.split(">"))) for index in range(900)}
        assert asked == set(pairs(split))
        assert {start for start, _ in asked} == {target for _, target in asked} == set(range(10))


RIGHT = "+8+9-8*6+7-6*2-1"  # from 7, by 6


@pytest.mark.parametrize(
    ("text", "exact", "step", "target"),
    [
        ("+8+9-8*6+7-6-5+6", 1, 1, 1),
        (" ".join("+8+9-8*6+7-6-5+6") + "\n", 1, 1, 1),
        (RIGHT, 0, 1, 1 / 2),
        ("+8+9-8*6+7-6+7*6", 0, 7 / 8, 1),  # 2 x 7 is 4
        ("+9+9-8*6+7-6-5+6", 0, 6 / 8, 1),  # two steps are wrong: into the 9, and out of it
        ("+8+9-8-7*4*8-7+8", 0, 1, 0),
        (RIGHT[:-2], 0, 0, 0),
        (RIGHT + "+4", 0, 0, 0),
        (RIGHT.replace("*", "/"), 0, 0, 0),
        (RIGHT.replace("8", "８"), 0, 0, 0),
        (RIGHT + RIGHT, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_verdicts(text, exact, step, target):
    for reward in ("exact", "step"):
        graded = exact if reward == "exact" else (8 * step + 2 * target) / 10
        expected = {"reward": graded, "exact": exact, "step": step, "target": target}
        assert verify(7, 6, 8, 4, reward, text) == pytest.approx(expected)


def test_facts_by_hand():
    assert [KEYS["+"](9), KEYS["-"](0), KEYS["*"](7)] == [0, 9, 4]


def test_problems_depend_on_their_arguments_only_and_pickle():
    task = Chain(8, right=0.5)
    problems = [task.problem(split, seed, 5) for split in ("train", "test") for seed in (0, 1)]
    assert len({(p.prompt, p.answer) for p in problems}) == 4
    again = pickle.loads(pickle.dumps(task)).problem("train", 0, 5)
    assert (again.prompt, again.answer) == (problems[0].prompt, problems[0].answer)
    assert pickle.loads(pickle.dumps(again)).verify(again.answer)["target"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 3}, "steps"), ({"steps": 10}, "multiple of every"), ({"right": 1.5}, "between 0 and 1")],
)
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
