"""Two processes against one: the same rollouts, updates and metrics under every strategy, resume, and failures."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_processes
from two_processes import RESUMED, RUNS, STRATEGIES

from espo_lightning.strategies import FSDP2

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder) -> dict:
    """Every run on one process: the oracle."""
    return {
        name: two_processes.run(name, "auto", 1, folder, save=folder / f"one_{name}.ckpt" if name in RESUMED else None)
        for name in RUNS
    }


@pytest.fixture(scope="module")
def two(folder, one) -> dict:
    """Every run on two processes, under each strategy."""
    command = [sys.executable, HERE / "two_processes.py", folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "results.pt", weights_only=False)


def assert_same(result: dict, expected: dict, exactly: bool = False) -> None:
    """The last rollouts of a run, as many as it has, its metrics, its validation and its final weights."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 5e-6}
    start = len(expected["rollouts"]) - len(result["rollouts"])
    for mine, other in zip(result["rollouts"], expected["rollouts"][start:], strict=True):
        assert mine["texts"] == other["texts"]
        assert torch.equal(mine["rewards"], other["rewards"])
    for mine, other in zip(result["metrics"], expected["metrics"][start:], strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, **tolerance)
    torch.testing.assert_close(result["val"], expected["val"], **tolerance)
    assert result["weights"].keys() == expected["weights"].keys()
    torch.testing.assert_close(result["weights"], expected["weights"], **tolerance)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"bf16"}))
def test_two_processes_do_what_one_does(one, two, strategy, name):
    """Completions, rewards, metrics (so advantages, ELBOs, losses and the global gradient norm), weights."""
    assert_same(two[strategy, name, "whole"], one[name])
