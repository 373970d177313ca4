"""However training ends, something is left to resume, and what resumes equals what never stopped."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from espo_lightning import fit, load_policy, new_policy, sft
from espo_lightning.training.report import read_metrics

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

TINY = [
    "--data.batch_size=2",
    "--data.eval_problems=6",
    "--data.eval_batch_size=4",
    "--data.task=failing_tasks.Failing",
    "--model.group_size=4",
    "--model.decoding.length=4",
    "--model.decoding.block_length=4",
    "--model.decoding.steps=4",
    "--model.optimizer.lr=0.01",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--checkpoint_every=2",
]
SFT = [
    "--data.batch_size=4",
    "--data.task=failing_tasks.Failing",
    "--model.length=4",
    "--model.policy.hidden_size=16",
    "--model.policy.heads=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--checkpoint_every=2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24).save(path)
    return [*TINY, f"--model.policy.path={path}"]


def weights(run_dir: Path) -> dict:
    return load_policy(run_dir / "policy").state_dict()


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[key], second[key]) for key in first)


def ends(program, *arguments) -> int:
    """The exit code of a program."""
    try:
        program.main(list(map(str, arguments)))
    except SystemExit as done:
        return done.code
    return 0


def resume_flags(text: str) -> list[str]:
    """The arguments of the one command in what a run has printed, as a shell would split it."""
    (command,) = [line.strip() for line in text.splitlines() if "--ckpt_path" in line]
    return shlex.split(command)[3:]


def told(run_dir: Path) -> list[list]:
    """What a run has recorded, its metrics, validations and samples, without what takes time, and Lightning's clocks.

    (A validation that ends an epoch and is made by a resume counts as the next epoch's there.)
    """
    dropped = ("time/", "speed/", "step", "epoch")
    read = [{k: v for k, v in row.items() if not k.startswith(dropped)} for row in read_metrics(run_dir)]
    return [read, [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]]


MOMENTS = [("batch", 0), ("batch", 2), ("saving", 1), ("saving", 4), ("validation", 4), ("epoch end", 5)]
IN_EPOCHS = [("batch", 3), ("batch", 5), ("saving", 2), ("saving", 5), ("saving", 8), ("validation", 6), ("epoch end", 6)]
THREE = ["--data.batches=3", "--trainer.max_epochs=3"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """Runs that nothing stops, with their flags: of one epoch, and of three."""
    runs = {}
    for name, size in {"one": ["--data.batches=5"], "three": THREE}.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run", [*tiny, *size]
        fit.main([*runs[name][1], f"--run_dir={runs[name][0]}"])
    return runs


def stop_at(moment: str, after: int, **settings) -> list[str]:
    given = {"moment": moment, "batch": after, **settings}
    return ["--trainer.callbacks=interruptions.SignalAt", *(f"--trainer.callbacks.{k}={v}" for k, v in given.items())]


def assert_equal_runs(mine: Path, other: Path) -> None:
    assert same(mine, other)
    assert told(mine) == told(other)
    first, second = (json.loads((d / "summary.json").read_text()) for d in (mine, other))
    for key in ("before", "after", "rollouts", "updates", "seed", "chance"):
        assert first[key] == second[key]
    names = [sorted(p.name for p in (d / "checkpoints").glob("*.ckpt")) for d in (mine, other)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("epochs", "moment", "after"), [*(("one", *m) for m in MOMENTS), *(("three", *m) for m in IN_EPOCHS)]
)
def test_ctrl_c_at_any_moment_resumes_bit_for_bit(whole, epochs, moment, after, tmp_path, capsys):
    """Weights, metrics, samples and summary, in one epoch and over several; the command that is printed can be pasted."""
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


ENDS = {
    "max_steps": (["--trainer.max_steps=5"], 3),
    "max_time": (["--trainer.max_time={microseconds: 1}"], 1),
    "early stopping": (
        ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/reward"]
        + ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=10", "--trainer.callbacks.mode=max"],
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


@pytest.mark.parametrize("limit", [["--trainer.max_steps=3"], ["--data.batches=3"], ["--trainer.max_time={microseconds: 1}"]])
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
