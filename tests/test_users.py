"""Rewards that users bring: whatever a function does is a verdict, or refused with a sentence. TRL, reasoning-gym."""

import asyncio
import json
import pickle
import time
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from espo_lightning import Problem, TRLReward, evaluate, fit, new_policy
from espo_lightning.objectives.advantages import leave_one_out, mean_centred, standardised
from espo_lightning.tasks import Countdown, Rows, Weighted
from espo_lightning.tasks.judge import judge, judge_all
from espo_lightning.tasks.rewards import load
from espo_lightning.tasks.verifiers import LARGEST, BrokenVerifier, check_signature, name_of

ROOT = Path(__file__).parents[1]


def problem(verify) -> Problem:
    return Problem("", verify, "")


# ---- what a function can do -----------------------------------------------------------------------------------------


class TimeLimit(BaseException):
    """As the usual timeout helpers raise."""


def raises(error, text):
    raise error


@pytest.mark.parametrize(
    "error",
    [TimeLimit("late"), asyncio.CancelledError(), GeneratorExit(), SystemExit(3), MemoryError(), StopIteration()],
)
def test_an_exception_of_any_class_costs_one_completion(error):
    with pytest.warns(UserWarning, match=type(error).__name__):
        first, second = judge_all([problem(partial(raises, error)), problem(lambda text: {"reward": 1.0})], ["a", "b"])
    assert first == {"reward": 0.0, "failed": 1.0, "timeout": 0.0}
    assert second == {"reward": 1.0, "failed": 0.0, "timeout": 0.0}


def test_ctrl_c_still_ends_everything():
    with pytest.raises(KeyboardInterrupt):
        judge_all([problem(partial(raises, KeyboardInterrupt()))], ["a"])


@dataclass
class Foreign:
    """An array of a library that is not here: one element, and no __float__."""

    value: float

    def item(self):
        return self.value


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, Fraction(1, 2), Decimal("0.5"), Foreign(0.5), np.float32(0.5), np.float64(0.5)),
        *(np.array(0.5), np.array([0.5]), np.array([[0.5]]), torch.tensor(0.5), torch.tensor([0.5])),
        *(torch.tensor([[0.5]], requires_grad=True), torch.tensor(0.5, dtype=torch.bfloat16)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_number_of_any_library_is_a_reward(value):
    assert judge(problem(lambda text: {"reward": value, "exact": value}), "")["reward"] == 0.5
    assert type(judge(problem(lambda text: {"reward": value}), "")["reward"]) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), np.int64(1), torch.tensor(True), 1])
def test_whole_numbers_and_truth_values_too(value):
    assert judge(problem(lambda text: {"reward": value}), "")["reward"] == 1.0


async def coroutine(text):
    return {"reward": 1.0}


def tardy(text):
    return coroutine(text)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # "was never awaited"
@pytest.mark.parametrize(
    ("verify", "sentence"),
    [
        (lambda text: {"reward": np.array([0.5, 1.0])}, "ValueError"),
        (lambda text: {"reward": torch.zeros(0)}, "Error"),
        (lambda text: {"reward": 1j}, "TypeError"),
        (lambda text: {"reward": [1.0]}, "TypeError"),
        (lambda text: 1.0, r"it returned a float, not a dictionary such as \{'reward': 1.0\}"),
        (lambda text: None, "it returned a NoneType, not a dictionary"),
        (lambda text: [1.0], "it returned a list, not a dictionary"),
        (tardy, "it is an async function, which is never run"),
        (lambda text: {"reward": 3e38}, r"reward is 3e\+38, beyond 1e\+16"),
        (lambda text: {"reward": -3e38}, r"reward is -3e\+38, beyond 1e\+16"),
        (lambda text: {"reward": 1e39}, r"reward is 1e\+39, beyond 1e\+16"),
        (lambda text: {"reward": np.float32(3.3e38)}, "beyond"),
        (lambda text: {"reward": 10**400}, "OverflowError"),
    ],
)
def test_what_is_no_verdict_says_why(verify, sentence):
    with pytest.warns(UserWarning, match=sentence):
        assert judge(problem(verify), "") == {"reward": 0.0, "failed": 1.0, "timeout": 0.0}


@pytest.mark.parametrize("advantage", [leave_one_out, mean_centred, standardised])
@pytest.mark.parametrize("rewards", [[LARGEST, -LARGEST], [LARGEST, 0.0], [LARGEST] * 3 + [-LARGEST] * 61])
def test_the_largest_reward_has_finite_advantages(advantage, rewards):
    assert judge(problem(lambda text: {"reward": LARGEST}), "")["failed"] == 0
    advantages = advantage(torch.tensor([rewards]))
    assert advantages.isfinite().all()
    assert (advantages.square().sum()).isfinite()


def test_other_metrics_may_be_huge():
    assert judge(problem(lambda text: {"reward": 0.0, "tokens": 1e30}), "")["tokens"] == 1e30


# ---- a verifier that never works ------------------------------------------------------------------------------------


def late(text):
    raise TimeLimit("late")


def picky(text):
    if "good" not in text:
        raise ValueError("not good")
    return {"reward": 1.0}


def self_reporting(text):
    return {"reward": 0.0, "failed": 1.0}


@pytest.mark.filterwarnings("ignore:a verifier failed")
def test_a_verifier_that_fails_on_every_text_is_refused():
    with pytest.raises(BrokenVerifier, match=r"the verifier test_users\.late failed on every"):
        judge_all([problem(late)] * 3, list("abc"), must_work=True)
    judge_all([problem(late)] * 3, list("abc"))  # not after the first rollout
    judge_all([problem(picky)] * 3, ["a", "good", "b"], must_work=True)
    judge_all([problem(late)], ["a"], must_work=True)  # one text says nothing
    judge_all([problem(self_reporting)] * 3, list("abc"), must_work=True)  # programs that crash, say
    assert name_of(partial(partial(late), 1)) == "test_users.late"


def test_a_part_that_never_works_is_refused_by_its_name():
    task = Weighted(Countdown(), extra={"test_users.late": 0.5})
    problems = [task.problem("train", 0, i) for i in range(4)]
    verdicts = judge_all(problems, list("abcd"))
    assert all(pickle.loads(pickle.dumps(verdict)).causes == verdict.causes for verdict in verdicts)
    with pytest.raises(BrokenVerifier, match=r"test_users\.late failed on every one of 4 texts \(TimeLimit: late\)"):
        judge_all(problems, list("abcd"), must_work=True)


@pytest.mark.filterwarnings("ignore:a verifier failed")
def test_one_that_hangs_on_every_text_is_refused():
    with pytest.raises(BrokenVerifier, match=r"hang.*no verdict after 0.2 s"):
        judge_all([problem(hang)] * 2, list("ab"), limit=0.2, must_work=True)


def hang(text):
    time.sleep(3)


ROWS = '{"prompt": "a"}\n' * 8
TINY = ["--data.batches=2", "--data.batch_size=2", "--data.eval_problems=2", "--data.eval_batch_size=2"]
TINY += ["--model.group_size=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]


def never(row, text):
    return float(len(text))


def of_trl(completions, **columns):
    return [0.0 for _ in completions]


async def late_row(row, text):
    return {"reward": 1.0}


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(tmp_path / "tiny")
    return ["Rows", "path=rows.jsonl", "held_out=0.25"]


def run(program: str, task: list[str], verifier: str) -> None:
    name = {"fit": "data.task", "evaluate": "task"}[program]
    flags = [f"--{name}={task[0]}", *(f"--{name}.{option}" for option in task[1:]), f"--{name}.verifier={verifier}"]
    if program == "fit":
        fit.main([*TINY, *flags, "--model.policy.path=tiny"])
    else:
        short = ["--decoding.length=4", "--decoding.block_length=4", "--decoding.steps=2", "--device=cpu"]
        evaluate.main([*flags, *short, "--policy.path=tiny", "--output=result.json"])


@pytest.mark.filterwarnings("ignore:a verifier failed")
@pytest.mark.parametrize("program", ["fit", "evaluate"])
def test_the_run_ends_after_its_first_rollout_with_exit_code_2(program, small, capsys):
    with pytest.raises(SystemExit) as error:
        run(program, small, "test_users.never")
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "the verifier test_users.never failed on every one of" in printed
    assert "it returned a float, not a dictionary such as {'reward': 1.0}" in printed


@pytest.mark.parametrize("program", ["fit", "evaluate"])
@pytest.mark.parametrize(
    ("verifier", "sentence"),
    [
        (
            "of_trl",
            "takes (completions, **columns), but is called with (row, text), for a dictionary with 'reward'; a re",
        ),
        ("late_row", "test_users.late_row is an async function, which is never run"),
        ("of_verl", "takes (data_source, solution_str, ground_truth, extra_info=None), but is called with (row, text)"),
    ],
)
def test_another_signature_is_refused_before_anything_is_written(program, verifier, sentence, small, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(program, small, f"test_users.{verifier}")
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["rows.jsonl"]


def test_signatures():
    for function in (of_trl, of_verl, never):
        with pytest.raises(ValueError, match="but is called with"):
            check_signature(function, "text")
    for function in (lambda text: 0, lambda *a: 0, partial(never, {}), len, str.count, TRLReward(of_trl)):
        check_signature(function, *(["row", "text"] if isinstance(function, TRLReward) else ["text"]))
    with pytest.raises(ValueError, match="TRLReward"):
        load("test_users.of_trl")
    with pytest.raises(ValueError, match="a verifier is a function"):
        Rows(path="x", verifier="text")
    with pytest.raises(ValueError, match="weights are finite"):
        Weighted(Countdown(), weight=float("nan"))


# ---- TRL ------------------------------------------------------------------------------------------------------------

ROW = {"prompt": "2 + 2?", "solution": "4", "completion": "4"}
CHAT = {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"}


def accuracy(completions, solution, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(s in text) for text, s in zip(texts, solution)]


def strict_accuracy(completions, solution):  # without **kwargs
    return accuracy(completions, solution)


def seen(prompts, completions, completion_ids=None, **columns):
    assert completion_ids is None
    assert set(columns) <= {"solution"}
    return [float(len(prompts) == len(completions) == len(columns["solution"]) == 1)]


async def slowly(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(completions)


def undecided(completions, **kwargs):
    return [None] * len(completions)


@pytest.mark.parametrize("row", [ROW, CHAT])
def test_functions_of_trl_are_verifiers(row):
    for function in (accuracy, strict_accuracy):
        verifier = pickle.loads(pickle.dumps(TRLReward(function)))
        assert [verifier(row, text) for text in ("It is 4.", "5")] == [{"reward": 1.0}, {"reward": 0.0}]
    assert TRLReward(seen)(row, "x") == {"reward": 1.0}
    assert TRLReward(accuracy, weight=0.5)(row, "4") == {"reward": 0.5}
    assert TRLReward(slowly)(row, "x") == {"reward": 0.25}
    assert TRLReward(undecided)(row, "x") == {"reward": 0.0}
    assert TRLReward(lambda completions, **k: torch.tensor([0.5]))(row, "x") == {"reward": 0.5}
    assert TRLReward(lambda completions, **k: np.array([0.5]))(row, "x") == {"reward": 0.5}


def test_several_functions_of_trl_are_a_weighted_sum():
    verdict = TRLReward(accuracy, extra={"test_users.slowly": 2.0})(ROW, "4")
    assert verdict["reward"] == 1.5
    assert (verdict["accuracy/reward"], verdict["slowly/reward"], verdict["failed"]) == (1.0, 0.25, 0.0)


@pytest.mark.parametrize(
    "wrong", [lambda completions, **k: 1.0, lambda completions, **k: [1.0, 1.0], lambda completions, **k: []]
)
def test_other_results_of_trl_functions_fail_with_a_sentence(wrong):
    with pytest.warns(UserWarning, match="it is to return a list of one reward per completion"):
        assert judge(problem(partial(TRLReward(wrong), ROW)), "x")["failed"] == 1


@pytest.mark.parametrize(
    ("function", "options", "sentence"),
    [
        (lambda row, text: 1.0, {}, "a reward function of TRL takes"),
        (lambda completions, trainer_state, **k: 1.0, {}, "needs 'trainer_state', which only TRL's trainer has"),
        (lambda completions, completion_ids, **k: 1.0, {}, "needs 'completion_ids'"),
        (accuracy, {"weight": float("inf")}, "weights are finite"),
        (accuracy, {"extra": {"test_users.accuracy": 1.0}}, "share a name"),
        (accuracy, {"extra": {"test_users.nothing": 1.0}}, "no import path"),
        ("accuracy", {}, "is no function"),
    ],
)
def test_what_trl_reward_refuses(function, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TRLReward(function, **options)


@pytest.mark.filterwarnings("ignore:a verifier failed")
def test_trl_rewards_train_from_the_command_line(small, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROW | {"n": n}) + "\n" for n in range(8)))
    flags = ["--data.task=Rows", "--data.task.path=rows.jsonl", "--data.task.held_out=0.25"]
    flags += ["--data.task.verifier=espo_lightning.TRLReward", "--data.task.verifier.function=test_users.accuracy"]
    flags += ['--data.task.verifier.extra={"test_users.slowly": 0.5}', "--model.policy.path=tiny"]
    fit.main([*TINY, *flags])
    assert "reward/slowly/reward" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    fit.main(["--config=run/config.yaml", "--run_dir=again"])  # what is stored can be repeated
    flags[-2] = "--data.task.verifier.function=test_users.of_verl"
    with pytest.raises(SystemExit):
        fit.main([*TINY[:-1], "--run_dir=third", *flags])
    assert "a reward function of TRL takes (completions, **columns)" in capsys.readouterr().err
