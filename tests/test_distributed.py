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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_processes_with_different_numbers_of_equal_groups_stay_in_step(two, strategy):
    """One process has nothing to train on, the other has, and then neither has: nothing hangs, nothing is lost."""
    rollouts = two[strategy, "skip", "whole"]["rollouts"]
    assert any(0 in r["counted"] and max(r["counted"]) > 0 for r in rollouts)
    assert any(max(r["counted"]) == 0 for r in rollouts)
    assert all(r["rows"] == (max(r["counted"]),) * 2 for r in rollouts)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_a_nan_gradient_of_one_process_skips_the_update_of_all(one, two, strategy):
    for result in (one["poison"], two[strategy, "poison", "whole"]):
        assert [m["train/skipped_updates"] for m in result["metrics"]] == [0, 1, 0, 0]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_gathering_once_per_rollout_saves_all_gathers(two, strategy):
    """Of the same run: 4 rollouts x 4 steps x 3 units, less the first of each, and validation."""
    plain, scattered = (two[strategy, name, "whole"]["gathers"] for name in ("plain", "scattered"))
    assert plain <= scattered - 4 * 3 * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_mixed_precision_scores_in_float32(one, two, strategy):
    result = two[strategy, "bf16", "whole"]
    assert {r["dtype"] for r in result["rollouts"]} == {torch.float32}
    first, expected = (r["metrics"][0]["train/elbo_per_token"] for r in (result, one["bf16"]))
    assert first == pytest.approx(expected, rel=0.02)
    assert all(w.dtype == torch.float32 for w in result["weights"].values())


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_the_whole_one(one, two, strategy, name):
    assert len(two[strategy, name, "resumed"]["rollouts"]) == 2
    assert_same(two[strategy, name, "resumed"], two[strategy, name, "whole"], exactly=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_one_process_goes_on_with_two(one, two, strategy):
    assert_same(two[strategy, "sync", "resumed from one process"], one["sync"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2 full"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_on_two_processes_goes_on_with_one(folder, one, two, strategy, name):
    resumed = two_processes.run(name, "auto", 1, folder, resume=folder / f"{strategy}_{name}.ckpt")
    assert_same(resumed, one[name])
