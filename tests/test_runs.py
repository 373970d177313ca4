"""Runs that are stopped at any moment and go on bit for bit."""

import json
from pathlib import Path

import pytest
from run_cases import SFT, THREE, assert_equal_runs, ends, resume_flags, same, tiny_fixture, told, whole_fixture  # noqa: F401

from espo_lightning import fit, sft

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


MOMENTS = [("one", "batch", 0), ("one", "saving", 4), ("one", "validation", 4)]
MOMENTS += [("three", "batch", 3), ("three", "saving", 5), ("three", "validation", 6)]
MORE = [("one", "batch", 2), ("one", "saving", 1), ("one", "epoch end", 5), ("three", "batch", 5)]
MORE += [("three", "saving", 2), ("three", "saving", 8), ("three", "epoch end", 3), ("three", "epoch end", 6)]


def stop_at(moment: str, after: int, **settings) -> list[str]:
    given = {"moment": moment, "batch": after, **settings}
    return ["--trainer.callbacks=interruptions.SignalAt", *(f"--trainer.callbacks.{k}={v}" for k, v in given.items())]


@pytest.mark.parametrize(
    ("epochs", "moment", "after"), [*MOMENTS, *(pytest.param(*m, marks=pytest.mark.slow) for m in MORE)]
)
def test_ctrl_c_at_any_moment_resumes_bit_for_bit(whole, epochs, moment, after, tmp_path, capsys):
    """Weights, metrics, samples and summary, in one epoch and over several; what is printed can be pasted."""
    expected, flags = whole[epochs]
    run_dir = tmp_path / "a run"  # whose name must be quoted
    assert ends(fit, *flags, f"--run_dir={run_dir}", *stop_at(moment, after)) == 130
    again = resume_flags(capsys.readouterr().out)
    assert not (run_dir / "summary.json").exists()
    assert ends(fit, *again, "--trainer.callbacks=null") == 0
    assert_equal_runs(run_dir, expected)


@pytest.mark.parametrize(("number", "code", "name"), [(2, 130, "Ctrl-C"), (15, 143, "SIGTERM")])
def test_the_second_signal_stops_at_once_and_says_what_is_left(whole, number, code, name, tmp_path, capsys):
    expected, flags = whole["one"]
    at = stop_at("batch", 3, number=number, times=2)
    assert ends(fit, *flags, f"--run_dir={tmp_path / 'run'}", *at) == code
    printed = capsys.readouterr().out
    assert f"stopped by {name}; resume with" in printed
    again = resume_flags(printed)
    assert again[1].endswith("batch_000002.ckpt")
    assert ends(fit, *again, "--trainer.callbacks=null") == 0
    assert_equal_runs(tmp_path / "run", expected)


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_in_the_first_validation_leaves_nothing_that_blocks_the_next_try(whole, number, tmp_path, capsys):
    _, flags = whole["one"]
    run_dir = tmp_path / "run"
    assert ends(fit, *flags, f"--run_dir={run_dir}", *stop_at("before", 0, number=number)) == 128 + number
    assert "nothing is left" in capsys.readouterr().out
    assert not run_dir.exists()
    assert ends(fit, *flags, f"--run_dir={run_dir}", "--trainer.max_steps=2") == 0


def test_a_signal_in_the_last_validation_is_finished_by_the_resume(whole, tmp_path, capsys):
    expected, flags = whole["one"]
    assert ends(fit, *flags, f"--run_dir={tmp_path / 'run'}", *stop_at("after", 5)) == 130
    assert not (tmp_path / "run" / "summary.json").exists()
    assert ends(fit, *resume_flags(capsys.readouterr().out), "--trainer.callbacks=null") == 0
    assert_equal_runs(tmp_path / "run", expected)


PATIENCE = ["monitor=val/reward", "patience=1", "min_delta=10", "mode=max"]
ENDS = {
    "max_steps": (["--trainer.max_steps=5"], 3),
    "max_time": (["--trainer.max_time={microseconds: 1}"], 1),
    "early stopping": (
        ["--trainer.callbacks=EarlyStopping", *(f"--trainer.callbacks.{value}" for value in PATIENCE)],
        4,
    ),
    "the last batch": (["--data.batches=3"], 3),
}


@pytest.mark.parametrize("name", ENDS)
def test_however_training_ends_there_is_a_checkpoint_and_the_command_that_goes_on(whole, name, tmp_path, capsys):
    """To the end of the whole run, which it then equals."""
    expected, flags = whole["one"]
    limit, last = ENDS[name]
    assert ends(fit, *flags, f"--run_dir={tmp_path / 'run'}", "--checkpoint_every=100", *limit) == 0
    again = resume_flags(capsys.readouterr().out)
    assert again[1].endswith(f"batch_{last:06d}.ckpt")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rollouts"] == last
    assert summary["ended"]
    others = ["--trainer.callbacks=null", "--data.batches=5", "--checkpoint_every=2"]
    assert ends(fit, *again, *others) == 0
    assert same(tmp_path / "run", expected)
    mine, other = told(tmp_path / "run"), told(expected)
    assert [row for row in mine[0] if row in other[0]] == other[0]  # beside the validation where it ended first
    assert mine[1] == other[1]
    assert json.loads((tmp_path / "run" / f"summary_{last:06d}.json").read_text()) == summary


@pytest.mark.parametrize(
    "limit", [["--trainer.max_steps=3"], ["--data.batches=3"], ["--trainer.max_time={microseconds: 1}"]]
)
def test_sft_leaves_a_checkpoint_however_it_ends(limit, tmp_path, capsys):
    flags = [*SFT, "--data.batches=6", f"--run_dir={tmp_path / 'run'}"]
    assert ends(sft, *flags, "--checkpoint_every=100", *limit) == 0
    again = resume_flags(capsys.readouterr().out)
    assert Path(again[1]).exists()


def test_sft_interrupted_equals_sft_uninterrupted(tmp_path, capsys):
    sft.main([*SFT, *THREE, f"--run_dir={tmp_path / 'whole'}"])
    assert ends(sft, *SFT, *THREE, f"--run_dir={tmp_path / 'run'}", *stop_at("batch", 4)) == 130
    printed = capsys.readouterr().out
    assert ends(sft, *resume_flags(printed[printed.index("stopped") :]), "--trainer.callbacks=null") == 0
    assert same(tmp_path / "run", tmp_path / "whole")
