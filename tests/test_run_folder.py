"""Whose folder a run is, and kills inside of a replace."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from run_cases import (  # noqa: F401
    checkpoint,
    ends,
    refused,
    resume_flags,
    run_fixture,
    same,
    snapshot,
    stored_fixture,
    tiny_fixture,
    told,
    weights,
    whole_fixture,
)

from espo_lightning import fit
from espo_lightning.training.report import read_metrics
from espo_lightning.training.run_folder import Claim, lock, recover, replace, rewind

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- whose folder it is ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_one_run_does_not_take_the_folder_of_another(run, stored, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(stored, other)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "results.txt").write_text("mine")
    for target in (other, precious):
        before = snapshot(target)
        message = refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}", f"--run_dir={target}")
        assert "exists and is not empty" in message
        assert snapshot(target) == before


def test_a_checkpoint_copied_into_another_run_is_refused(tiny, run, tmp_path, capsys):
    other = tmp_path / "other"
    fit.main([*tiny, "--data.batches=1", "--seed=5", f"--run_dir={other}"])
    shutil.copy(checkpoint(run, 2), other / "checkpoints")
    before = snapshot(other)
    message = refused(capsys, fit, f"--ckpt_path={checkpoint(other, 2)}")
    assert "is another run's" in message
    assert "seed is 5 there, 0 here" in message
    assert snapshot(other) == before


@pytest.mark.parametrize("how", [shutil.copy, lambda source, target: target.symlink_to(source)], ids=["copy", "link"])
@pytest.mark.parametrize("named", [True, False])
def test_a_copied_or_linked_checkpoint_resumes_in_a_folder_of_its_own(stored, how, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = snapshot(stored)
    how(checkpoint(stored, 2), tmp_path / "mine.ckpt")
    assert ends(fit, "--ckpt_path=mine.ckpt", *(["--run_dir=new"] if named else [])) == 0
    new = tmp_path / "new" if named else next((tmp_path / "runs").iterdir())
    assert same(new, stored)
    summary, whole = (json.loads((d / "summary.json").read_text()) for d in (new, stored))
    assert (summary["before"], summary["after"]) == (whole["before"], whole["after"])
    assert snapshot(stored) == before


def test_a_linked_run_folder_is_the_run(run, tmp_path):
    (tmp_path / "latest").symlink_to(run)
    assert ends(fit, f"--ckpt_path={checkpoint(tmp_path / 'latest', 4)}", "--data.batches=5") == 0
    assert json.loads((run / "summary.json").read_text())["rollouts"] == 5


def test_runs_that_start_in_the_same_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    folders = [Claim(None, "a: 1").folder for _ in range(3)]
    assert [str(f) for f in folders] == [f"runs/20260101-000000{end}" for end in ("", "-2", "-3")]


def test_a_folder_is_taken_once_and_given_back_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        claim = Claim(str(tmp_path / name), "a: 1")
        with pytest.raises(ValueError, match="exists and is not empty"):
            Claim(str(tmp_path / name), "b: 2")
        (claim.folder / "logs").mkdir()
        assert claim.release()
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "new").exists()
    claim = Claim(str(tmp_path / "new"), "a: 1")
    (claim.folder / "samples.jsonl").write_text("{}")
    assert not claim.release()


# ---- kills inside of a replace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(4))
def test_a_kill_inside_of_a_replace_leaves_a_complete_copy(tmp_path, monkeypatch, step):
    """Of two complete folders one has the name, or `recover` gives it to one."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        for n in range(4):
            (tmp_path / name / f"{n}").write_text(name)
    left = step

    def dying(function):
        def call(*arguments, **options):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(Path, "rename", dying(Path.rename))
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(os, "rmdir", dying(os.rmdir))
        replace(tmp_path / "new", tmp_path / "old")
    recover(tmp_path / "old")
    contents = {p.read_text() for p in (tmp_path / "old").iterdir()}
    assert len(list((tmp_path / "old").iterdir())) == 4
    assert contents == ({"old"} if step < 2 else {"new"})
    assert not (tmp_path / "old.old").exists()


def test_a_run_that_is_going_on_is_not_resumed_by_another_process(run, capsys):
    held = lock(run)
    before = snapshot(run)
    assert "another process is writing there" in refused(capsys, fit, f"--ckpt_path={checkpoint(run, 4)}")
    assert snapshot(run) == before
    os.close(held)
    assert ends(fit, f"--ckpt_path={checkpoint(run, 4)}") == 0


def test_more_epochs_go_on_and_fewer_batches_than_are_done_are_refused(whole, tmp_path, capsys):
    expected, flags = whole["three"]
    run_dir = tmp_path / "run"
    assert ends(fit, *flags, "--trainer.max_epochs=1", f"--run_dir={run_dir}") == 0
    again = resume_flags(capsys.readouterr().out)
    assert again[2:] == ["--data.batches=6"]
    assert ends(fit, *again[:2], "--trainer.max_epochs=3") == 0
    assert same(run_dir, expected)
    few = refused(capsys, fit, f"--ckpt_path={checkpoint(run_dir, 9)}", "--data.batches=2")
    assert "6 batches altogether, of which 9 are done already" in few


def test_a_resume_with_nothing_left_to_do_says_what_the_run_is(run):
    """As after a signal in the last validation of a run that ended by max_steps."""
    shutil.rmtree(run / "policy")
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}", "--trainer.max_steps=4") == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rollouts"] == 2
    assert summary["settings"]["trainer"]["max_steps"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    assert [row["rollout"] for row in read_metrics(run) if "train/reward" in row] == [1, 2]
    stored = torch.load(checkpoint(run, 2), weights_only=True)["state_dict"]
    assert all(torch.equal(weight, stored[f"policy.{name}"]) for name, weight in weights(run).items())


def test_half_a_line_that_a_kill_left_is_dropped(tmp_path):
    rows = [json.dumps({"rollout": n}) for n in (1, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows)[:-3])
    (tmp_path / "metrics.csv").write_text("rollout,lr,train/reward\n1,,0.5\n,0.1,\n2,,0.25\n3,,0.1\n4,,0.")
    rewind(tmp_path, 2, 2)
    assert (tmp_path / "samples.jsonl").read_text() == "\n".join(rows[:2]) + "\n"
    assert (tmp_path / "metrics.csv").read_text() == "rollout,lr,train/reward\n1,,0.5\n,0.1,\n2,,0.25\n"
    (tmp_path / "metrics.csv").write_text("")
    rewind(tmp_path, 2, 2)
    assert read_metrics(tmp_path) == []


def test_a_row_that_a_kill_lost_after_its_checkpoint_is_logged_by_the_resume(run, stored):
    """The batch's metrics are logged after the checkpoint, which therefore holds them, too."""
    lines = (run / "metrics.csv").read_text().splitlines()
    reward = lines[0].split(",").index("train/reward")
    rollout = lines[0].split(",").index("rollout")
    kept = [line for line in lines[1:] if line.split(",")[rollout] in ("0.0", "1.0") or not line.split(",")[reward]]
    (run / "metrics.csv").write_text("\n".join([lines[0], *kept]) + "\n")
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}") == 0
    assert told(run)[0] == told(stored)[0]
