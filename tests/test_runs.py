"""However training ends, something is left to resume, and what resumes equals what never stopped."""

import contextlib
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from espo_lightning import fit, load_policy, new_policy, sft
from espo_lightning.training import resume
from espo_lightning.training.report import read_metrics
from espo_lightning.training.run_checkpoint import RECORD
from espo_lightning.training.run_folder import Claim, lock, recover, replace, rewind

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


MOMENTS = [("one", "batch", 0), ("one", "saving", 4), ("one", "validation", 4)]
MOMENTS += [("three", "batch", 3), ("three", "saving", 5), ("three", "validation", 6)]
MORE = [("one", "batch", 2), ("one", "saving", 1), ("one", "epoch end", 5), ("three", "batch", 5)]
MORE += [("three", "saving", 2), ("three", "saving", 8), ("three", "epoch end", 3), ("three", "epoch end", 6)]
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


# ---- resume knows what changed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory) -> Path:
    """A finished run of four batches with all its checkpoints; to be copied."""
    run_dir = tmp_path_factory.mktemp("stored") / "run"
    fit.main([*tiny, "--data.batches=4", "--checkpoint_every=1", "--keep_checkpoints=10", f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def run(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def checkpoint(run_dir: Path, batch: int) -> Path:
    return run_dir / "checkpoints" / f"batch_{batch:06d}.ckpt"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys, program, *arguments) -> str:
    assert ends(program, *arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err.split("error: ", 1)[1]


CHANGED = {
    "learning rate": (["--model.optimizer.lr=1e-5"], "model.optimizer.lr", [0.01, 1e-5]),
    "weight decay": (["--model.optimizer.weight_decay=0.5"], "model.optimizer.weight_decay", [0.01, 0.5]),
    "warm-up": (["--model.warmup=100"], "model.warmup", [0, 100]),
    "objective": (["--model.objective.beta=0.1"], "model.objective.beta", [0.003, 0.1]),
    "decoding": (["--model.decoding.temperature=0.5"], "model.decoding.temperature", [1.0, 0.5]),
    "batches": (["--data.batches=6"], "data.batches", [4, 6]),
    "evaluation": (["--data.eval_problems=5"], "data.eval_problems", [6, 5]),
    "logging": (["--trainer.log_every_n_steps=2"], "trainer.log_every_n_steps", [1, 2]),
    "memory": (["--model.micro_batch=4"], "model.micro_batch", [None, 4]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_may_change_does_and_is_recorded(run, name):
    flags, setting, values = CHANGED[name]
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}", *flags) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] == [{"checkpoint": str(checkpoint(run, 2)), "batches": 2, "changed": {setting: values}}]
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("seed", "model", "data", "trainer"):
        assert summary["settings"][key] == config[key]
    flat = resume.flat(config)
    assert flat[setting] == values[1]
    assert summary["rollouts"] == flat["data.batches"]


def test_a_changed_learning_rate_is_that_of_the_updates_and_the_schedule(run, stored):
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}", "--model.optimizer.lr=1e-5", "--model.warmup=10") == 0
    rates = [row["train/lr"] for row in read_metrics(run) if "train/lr" in row]
    expected = [
        0.01,
        0.01,
        *(1e-5 * (n + 0.5) / 10 for n in (5, 7)),
    ]  # the mean over two updates, of which n - 1 are done
    assert rates == pytest.approx(expected, rel=1e-4)
    before = torch.load(checkpoint(stored, 2), weights_only=True)["state_dict"]
    moved = max((w - before[f"policy.{k}"]).abs().max() for k, w in weights(run).items())
    assert 0 < moved < 1e-4


def test_a_changed_schedule_of_sft_is_that_of_a_run_of_that_length(tmp_path):
    flags = [*SFT, "--checkpoint_every=3", "--keep_checkpoints=9"]
    sft.main([*flags, "--data.batches=9", f"--run_dir={tmp_path / 'long'}"])
    sft.main([*flags, "--data.batches=6", f"--run_dir={tmp_path / 'run'}"])
    assert ends(sft, f"--ckpt_path={checkpoint(tmp_path / 'run', 6)}", "--data.batches=9") == 0
    groups = [
        torch.load(checkpoint(tmp_path / name, 9), weights_only=True)["optimizer_states"][0]["param_groups"][0]
        for name in ("long", "run")
    ]
    assert groups[0]["lr"] == groups[1]["lr"]


FIXED = {
    "seed": (["--seed=1"], "seed is 0 there, 1 here"),
    "prompts": (["--data.batch_size=4"], "data.batch_size is 2 there, 4 here"),
    "completions": (["--model.group_size=2"], "model.group_size is 4 there, 2 here"),
    "updates": (["--model.updates=1"], "model.updates is 2 there, 1 here"),
    "task": (["--data.task.mode=raise"], "data.task.mode is 'none' there, 'raise' here"),
    "another task": (["--data.task=Sudoku"], "data.task is 'failing_tasks.Failing' there, "),
    "adapters": (["--model.policy.lora.rank=2"], "model.policy.lora"),
    "optimizer": (
        ["--model.optimizer=SGD", "--model.optimizer.lr=0.01"],
        "model.optimizer is 'torch.optim.AdamW' there",
    ),
    "reference": (["--model.reference_sync=2"], "model.reference_sync is None there, 2 here"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_may_not_change_is_refused_with_both_values_and_nothing_is_touched(run, name, capsys):
    flags, message = FIXED[name]
    before = snapshot(run)
    assert message in refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}", *flags)
    assert snapshot(run) == before


def test_a_lora_run_goes_on_without_its_flags_and_another_rank_is_refused(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    lora = ["--model.policy.lora.rank=2", "--model.policy.lora.alpha=4"]
    fit.main([*tiny, *lora, "--data.batches=2", f"--run_dir={run_dir}"])
    capsys.readouterr()
    rank = refused(capsys, fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--model.policy.lora.rank=4")
    assert "model.policy.lora.rank is 2 there, 4 here" in rank
    none = refused(capsys, fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--model.policy.lora=null")
    assert "model.policy.lora" in none
    assert ends(fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--data.batches=3") == 0


def test_a_checkpoint_of_another_policy_is_refused(run, tmp_path, capsys):
    new_policy(hidden_size=32, layers=2, heads=2, intermediate_size=24).save(tmp_path / "larger")
    before = snapshot(run)
    message = refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}", f"--model.policy.path={tmp_path / 'larger'}")
    assert "does not fit model.policy" in message or "belongs to another base" in message
    assert snapshot(run) == before


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_checkpoint_is_named_with_another(run, damage, capsys):
    path = checkpoint(run, 3)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other": b"hello" * 100}[damage])
    message = refused(capsys, fit, f"--ckpt_path={path}")
    assert f"ckpt_path {path} is damaged, or no checkpoint" in message
    assert f"such as {checkpoint(run, 4)}" in message


def test_a_checkpoint_of_the_other_program_is_refused(run, capsys):
    assert "resume it with python -m espo_lightning.fit" in refused(capsys, sft, f"--ckpt_path={checkpoint(run, 2)}")


def test_a_checkpoint_with_settings_that_are_gone_is_refused_in_a_sentence(run, capsys):
    content = torch.load(checkpoint(run, 2), weights_only=True)
    settings = yaml.safe_load(content[RECORD]["config"])
    settings["model"] |= {"beta": 0.1}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    del content[RECORD]  # as earlier versions wrote them
    torch.save(content, checkpoint(run, 2))
    before = snapshot(run)
    assert "was made by another version of this library" in refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}")
    assert snapshot(run) == before


def test_an_earlier_checkpoint_starts_another_future(run, stored):
    """What was after it is set aside or dropped: no rollout counts twice; the newest checkpoint is this future's."""
    assert ends(fit, f"--ckpt_path={checkpoint(run, 1)}", "--data.batches=2", "--model.optimizer.lr=1e-5") == 0
    assert [row["rollout"] for row in read_metrics(run) if "train/reward" in row] == [1, 2]
    samples = [json.loads(line)["rollout"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == [1] * 4 + [2] * 4
    assert [p.name for p in sorted((run / "checkpoints").glob("*.ckpt"))] == ["batch_000001.ckpt", "batch_000002.ckpt"]
    assert len(list((run / "checkpoints" / "superseded").glob("*.ckpt"))) == 3
    assert json.loads((run / "summary_000004.json").read_text())["rollouts"] == 4


def test_an_earlier_before_is_measured_again_if_it_would_be_about_other_problems(run):
    assert ends(fit, f"--ckpt_path={checkpoint(run, 4)}", "--data.eval_problems=5") == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["n"] == summary["after"]["n"] == 5


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
