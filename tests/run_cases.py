"""Small runs of fit and sft, and how they are compared."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from espo_lightning import fit, load_policy, new_policy
from espo_lightning.training.report import read_metrics

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


@pytest.fixture(name="tiny", scope="module")
def tiny_fixture(tmp_path_factory) -> list[str]:
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


THREE = ["--data.batches=3", "--trainer.max_epochs=3"]


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tiny, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """Runs that nothing stops, with their flags: of one epoch, and of three."""
    runs = {}
    for name, size in {"one": ["--data.batches=5"], "three": THREE}.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run", [*tiny, *size]
        fit.main([*runs[name][1], f"--run_dir={runs[name][0]}"])
    return runs


def assert_equal_runs(mine: Path, other: Path) -> None:
    assert same(mine, other)
    assert told(mine) == told(other)
    first, second = (json.loads((d / "summary.json").read_text()) for d in (mine, other))
    for key in ("before", "after", "rollouts", "updates", "seed", "chance"):
        assert first[key] == second[key]
    names = [sorted(p.name for p in (d / "checkpoints").glob("*.ckpt")) for d in (mine, other)]
    assert names[0] == names[1]


@pytest.fixture(name="stored", scope="module")
def stored_fixture(tiny, tmp_path_factory) -> Path:
    """A finished run of four batches with all its checkpoints; to be copied."""
    run_dir = tmp_path_factory.mktemp("stored") / "run"
    fit.main([*tiny, "--data.batches=4", "--checkpoint_every=1", "--keep_checkpoints=10", f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture(name="run")
def run_fixture(stored, tmp_path) -> Path:
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
