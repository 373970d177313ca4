"""What training shows while it goes on, and how short names are read."""

import re
import sys

import pytest
from fit_cases import (
    TINY,
    folder_fixture,  # noqa: F401
)
from lightning.pytorch.callbacks import TQDMProgressBar

from espo_lightning import Problem, fit, load_policy
from espo_lightning.training.data import unknown_tokens
from espo_lightning.training.report import limits, told, with_interval
from espo_lightning.training.samples import extremes, shown
from espo_lightning.training.screen import progress

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--model.objective.kl=k3", "espo_lightning.k3"),
        ("--model.objective.ratio=token_ratio", "espo_lightning.token_ratio"),
        ("--model.advantage=standardised", "espo_lightning.standardised"),
        ("--model.decoding.order=random_order", "espo_lightning.random_order"),
        ("--model.decoding.schedule=dream_schedule", "espo_lightning.dream_schedule"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["=", "space"])
def test_functions_have_short_names_as_classes_do(flag, path, apart, capsys):
    outputs = []
    for value in (flag, f"{flag.split('=')[0]}={path}"):
        with pytest.raises(SystemExit) as done:
            fit.main(["--print_config", *(value.split("=") if apart else [value])])
        assert done.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert path.rsplit(".", 1)[1] in outputs[0]


def test_what_is_seen_while_a_run_goes_on(folder, tmp_path, capsys):
    """Where it writes, at the start; the progress; held-out results as they come; and in the end what there is."""
    fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={tmp_path / 'run'}", "--data.batches=12"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"writing to {tmp_path / 'run'}"
    order = ["held-out before training:", "rollout 1 of 12:", "held-out after rollout 10:", "rollout 12 of 12:"]
    found = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found == sorted(found)
    text = "\n".join(lines)
    assert "failed" not in text
    assert "timeout" not in text
    assert re.search(
        r"12 rollouts, seed 0, [\d.]+ s, 1 thread: decoding [\d.]+, verifying and scoring [\d.]+, updates [\d.]+", text
    )
    for name in ("summary.json", "metrics.csv", "samples.jsonl", "reward.png", "policy", "checkpoints"):
        assert f"{tmp_path / 'run' / name}  " in text


def test_the_sample_table_shows_different_prompts_with_the_best_and_the_worst():
    rewards = [0.0, 0.5, 1.0, 0.2, 0.2, 0.2, 0.9, 0.1, 0.3]
    assert extremes(rewards, 3, 4) == [(0, 2), (0, 0), (1, 3), (1, 4), (2, 6), (2, 7)]
    assert extremes(rewards, 3, 2) == [(0, 2), (0, 0), (1, 3), (1, 4)]
    problems = [Problem("2 + 2", len, "4"), Problem([{"role": "user", "content": "1 +\n1"}], len, "")]
    made = [(problems[q], f"text {i}", {"reward": i / 4}) for q in (0, 1) for i in (3, 1)]
    assert shown(21, made).splitlines() == [
        "rollout 21: the best and the worst completion of 2 prompts, by reward",
        "  prompt  2 + 2",
        "  right   4",
        "    0.75  text 3",
        "    0.25  text 1",
        "",
        "  prompt  1 + 1",
        "    0.75  text 3",
        "    0.25  text 1",
    ]


def test_failures_are_shown_only_if_there_are_any():
    means = {"exact": 0.5, "failed": 0.0, "n": 4, "ci95": {"exact": [0.1, 0.9], "failed": [0.0, 0.4]}}
    assert told(means) == ["exact"]
    assert told(means, means | {"failed": 0.25}) == ["exact", "failed"]
    assert with_interval(means) == "exact 0.500 [0.100, 0.900]"


@pytest.mark.parametrize(
    ("values", "expected"), [([0.2, 0.9], (0, 1)), ([], (0, 1)), ([-1.0, 0.5], (-1.1, 1)), ([0.5, 3.0], (0, 3.15))]
)
def test_the_curve_shows_all_rewards(values, expected):
    assert limits(values) == pytest.approx(expected)


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    def kinds(*arguments):
        return [type(c).__name__ for c in progress(*arguments)]

    assert kinds("rollout", True, []) == ["Lines", "Validations"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert kinds("rollout", True, []) == ["Bar", "Validations"]
    assert kinds("rollout", False, []) == ["Lines", "Validations"]
    assert kinds("rollout", True, [TQDMProgressBar()]) == ["Validations"]


def test_letters_that_the_policy_cannot_read_are_named(folder):
    policy = load_policy(folder)
    problems = [Problem("Où est B?", len, "là"), Problem([{"role": "user", "content": "abc"}], len, "")]
    prompts, answers = unknown_tokens(policy, problems)
    assert "does not know 25 % of the prompts (such as 'O', 'ù', 'B')" in prompts
    assert "50 % of the answers (such as 'à')" in answers
    assert unknown_tokens(policy, problems[1:]) == []
