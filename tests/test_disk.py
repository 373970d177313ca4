"""Checkpoints on disk: which are kept, kill -9, full disks; and strategies that are refused."""

import json
import multiprocessing
import random
import re
import resource
import shutil
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import small_policy
from distributed_cases import TINY, refused, tiny_fixture, weights, whole_fixture  # noqa: F401
from lightning.pytorch.strategies import ModelParallelStrategy

from espo_lightning import fit
from espo_lightning.training.strategies import FSDP, FSDP2, check, named

# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_best_are_kept(tiny, tmp_path):
    """With a learning rate of 0 every validation is equal, so the first is the best."""
    run_dir = tmp_path / "run"
    often = ["--data.batches=7", "--checkpoint_every=3", "--trainer.val_check_interval=2", "--keep_checkpoints=3"]
    fit.main([*TINY, tiny, *often, f"--run_dir={run_dir}", "--model.optimizer.lr=0"])
    names = sorted(p.name for p in (run_dir / "checkpoints").glob("*.ckpt"))
    assert names == [f"batch_{n:06d}.ckpt" for n in (2, 4, 6, 7)]
    best = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    assert best == {"checkpoint": "batch_000002.ckpt", "batches": 2, "val/reward": pytest.approx(best["val/reward"])}


def test_resuming_forgets_a_best_that_is_still_to_come(tiny, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    old = {"checkpoint": "batch_000006.ckpt", "batches": 6, "val/reward": 2.0}
    (run_dir / "checkpoints" / "best.json").write_text(json.dumps(old))
    resume = ["--data.batches=6", "--trainer.val_check_interval=2"]
    first = sorted((run_dir / "checkpoints").glob("*.ckpt"))[0]
    fit.main([*TINY, tiny, *resume, f"--ckpt_path={first}"])
    assert json.loads((run_dir / "checkpoints" / "best.json").read_text())["val/reward"] < 2
    assert all(torch.equal(w, weights(whole)[k]) for k, w in weights(run_dir).items())


def die_and_resume(tiny: str, run_dir: Path, whole: Path, deaths: int) -> None:
    """kill -9 at random moments, resume from the newest checkpoint each time; the end must be that of one life."""
    processes = multiprocessing.get_context("forkserver")  # imports once
    processes.set_forkserver_preload(["espo_lightning.fit"])
    moments, checkpoints = random.Random(0), run_dir / "checkpoints"
    common = [*TINY, tiny, "--data.batches=6", "--trainer.val_check_interval=2", "--checkpoint_every=1"]
    for life in range(deaths + 1):
        newest = [f"--ckpt_path={p}" for p in sorted(checkpoints.glob("batch_*.ckpt"))[-1:]]
        if not newest:
            shutil.rmtree(run_dir, ignore_errors=True)
        process = processes.Process(target=fit.main, args=([*common, f"--run_dir={run_dir}", *newest],))
        process.start()
        if life < deaths:
            before = len(list(checkpoints.glob("*.ckpt*")))
            while process.is_alive() and len(list(checkpoints.glob("*.ckpt*"))) == before:  # until it gets going
                time.sleep(0.001)
            process.join(moments.uniform(0, 0.1))
            process.kill()
        process.join()
        for path in checkpoints.glob("batch_*.ckpt"):
            assert torch.load(path, weights_only=True)["rollouts"] == int(path.stem[6:])
    assert process.exitcode == 0
    assert all(torch.equal(w, weights(whole)[k]) for k, w in weights(run_dir).items())


def test_kill_9_leaves_a_checkpoint_that_loads(tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as this process, or sums round differently
    die_and_resume(tiny, tmp_path / "run", whole, deaths=1)


@pytest.mark.slow
def test_kill_9_at_20_moments(tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    die_and_resume(tiny, tmp_path / "run", whole, deaths=20)


# ---- errors before training ----------------------------------------------------------------------------------------


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_an_error_before_training(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 10**4))
    message = refused(capsys, tiny, f"--run_dir={tmp_path / 'run'}")
    assert re.search(r"10 kB free, but 4 checkpoints at once and the final policy need about \d+ kB", message)
    assert not (tmp_path / "run").exists()


@contextmanager
def file_size_limit(limit: int):
    """Every write beyond it fails, as on a full disk, even for root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(tiny, tmp_path, capsys):
    with file_size_limit(0):
        message = refused(capsys, tiny, f"--run_dir={tmp_path / 'run'}")
    assert "File too large" in message


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    first = sorted((run_dir / "checkpoints").glob("*.ckpt"))[0]
    resume = [*TINY, tiny, "--data.batches=6", "--trainer.val_check_interval=2", f"--ckpt_path={first}"]
    with file_size_limit(first.stat().st_size // 2), pytest.raises(SystemExit) as error:
        fit.main(resume)
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(r"batch_\d+.ckpt could not be written", printed)
    assert f"--ckpt_path {first}" in printed
    assert "Traceback" not in printed
    assert list((run_dir / "checkpoints").glob("*.part"))
    fit.main(resume)
    assert not list((run_dir / "checkpoints").glob("*.part"))
    assert all(torch.equal(w, weights(whole)[k]) for k, w in weights(run_dir).items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.devices=3"], "data.batch_size 2 is not a multiple of the 3 processes"),
        (["--trainer.precision=bf16-true"], "trainer.precision must be 32-true or bf16-mixed, got bf16-true"),
        (["--timeout=0"], "timeout must lie in (0, 1e9], got 0.0"),
        (["--keep_checkpoints=0"], "keep_checkpoints must be at least 1"),
        (["--trainer.strategy=fdsp"], "fdsp"),
    ],
)
def test_contradictions_are_errors_before_training(tiny, tmp_path, capsys, flags, message):
    assert message in refused(capsys, tiny, f"--run_dir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run").exists()


def test_strategies_by_name():
    assert isinstance(named("fsdp"), FSDP)
    assert isinstance(named("fsdp2"), FSDP2)
    assert named("ddp") == "ddp"


def test_tensor_parallelism_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="use fsdp2"):
        check(ModelParallelStrategy(), small_policy())


def test_fsdp1_refuses_what_it_cannot_shard():
    check(FSDP(), small_policy())
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*use fsdp2"):
        check(FSDP(), two_processes.lora_policy(torch.bfloat16))
    with pytest.raises(ValueError, match="cannot train adapters on one process"):
        check(FSDP(), two_processes.lora_policy())
    compiled = small_policy()
    compiled.compile_network("eager")
    with pytest.raises(ValueError, match="cannot shard compiled layers: use fsdp2"):
        check(FSDP(), compiled)
