"""Signals at random moments: what resumes equals, bit for bit, what never stopped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from interruptions import life
from run_cases import TINY, assert_equal_runs

from espo_lightning import new_policy
from espo_lightning.training.run_folder import checkpoints_in

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")  # imports once
SIZES = ["--data.batches=4", "--checkpoint_every=1", "--data.eval_problems=12", "--keep_checkpoints=2"]


def begin(arguments: list[str]):
    begun = PROCESSES.Event()
    process = PROCESSES.Process(target=life, args=(begun, arguments))
    process.start()
    begun.wait(60)
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[str], float]:
    """A run that nothing stops, its flags, and the seconds that it takes."""
    PROCESSES.set_forkserver_preload(["espo_lightning.fit", "interruptions"])
    folder = tmp_path_factory.mktemp("kills")
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24).save(folder / "tiny")
    flags = [*TINY, *SIZES, f"--model.policy.path={folder / 'tiny'}"]
    for name in ("first", "run"):  # the first one pays for what is loaded once
        start = time.monotonic()
        process = begin([*flags, f"--run_dir={folder / name}"])
        process.join()
        assert process.exitcode == 0
    return folder / "run", flags, time.monotonic() - start


def loadable(run_dir: Path) -> list[Path]:
    """The checkpoints that have their names; each is complete."""
    found = checkpoints_in(run_dir / "checkpoints")
    for path in found:
        assert torch.load(path, weights_only=True)["rollouts"] == int(path.stem[6:])
    return found


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(signal.SIGKILL, 50, -signal.SIGKILL), (signal.SIGTERM, 20, 143), (signal.SIGINT, 20, 130)],
    ids=["kill -9", "SIGTERM", "Ctrl-C"],
)
def test_signals_at_random_moments(whole, number, times, code, tmp_path, monkeypatch):
    """Run after run, each resumed until it is done: all end as the one that nothing stopped."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as the whole run had, or sums round differently
    expected, flags, seconds = whole
    moments, sent, finished, early = random.Random(int(number)), 0, 0, 0
    run_dir, newest = tmp_path / "run", []
    while sent < times or newest or not finished:
        arguments = [f"--ckpt_path={newest[-1]}"] if newest else [*flags, f"--run_dir={run_dir}"]
        process = begin(arguments)
        if sent < times:
            process.join(moments.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid, number)
                sent += 1
        process.join(120)
        over = (run_dir / "summary.json").exists()  # and Python on its way out, where the system's own handler is back
        assert process.exitcode in ((0, code, -number) if over else (0, code))
        newest = loadable(run_dir)
        if process.exitcode == 0:
            assert_equal_runs(run_dir, expected)
            assert json.loads((run_dir / "summary.json").read_text())["rollouts"] == 4
            finished += 1
            newest = []
        early = 0 if newest or process.exitcode == 0 else early + 1
        if early > 2:  # before anything was there, again and again: the machine has become slower
            seconds *= 1.3
        if not newest:
            assert number == signal.SIGKILL or process.exitcode == 0 or not run_dir.exists()
            shutil.rmtree(run_dir, ignore_errors=True)
    assert finished
