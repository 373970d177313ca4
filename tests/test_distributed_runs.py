"""The command line on two processes: complete run folders, signals, and processes that fail."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_cases import FIT, start, tiny_fixture, weights, whole_fixture  # noqa: F401
from two_processes import ENVIRONMENT


@pytest.mark.slow
def test_plain_fsdp_on_the_command_line_leaves_a_complete_run_folder(whole, tiny, tmp_path):
    run_dir = tmp_path / "run"
    process = start([
        tiny, "--trainer.strategy=fsdp", "--trainer.devices=2", f"--run_dir={run_dir}", "--data.batches=6",
        "--trainer.val_check_interval=2",
    ])  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    torch.testing.assert_close(weights(run_dir), weights(whole), rtol=1e-4, atol=5e-6)
    mine, expected = (json.loads((d / "summary.json").read_text()) for d in (run_dir, whole))
    assert mine["rollouts"] == expected["rollouts"] == 6
    assert mine["after"] == expected["after"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "moment", "after"), [(2, "batch", 2), (15, "validation", 4)])
@pytest.mark.parametrize(("strategy", "rank"), [("fsdp2", 0), ("ddp", 1)])
def test_a_signal_to_one_process_stops_all_and_they_go_on(whole, tiny, tmp_path, strategy, rank, number, moment, after):
    """From a file under ddp, from a folder of shards under fsdp2."""
    run_dir = tmp_path / "run"
    flags = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--data.batches=6", "--checkpoint_every=1"]
    flags += ["--trainer.val_check_interval=2", f"--run_dir={run_dir}", "--trainer.callbacks=interruptions.SignalAt"]
    at = {"moment": moment, "batch": after, "number": number, "rank": rank}
    process = start([tiny, *flags, *(f"--trainer.callbacks.{key}={value}" for key, value in at.items())])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, output
    (command,) = [line.strip() for line in output.splitlines() if "--ckpt_path" in line]
    checkpoint = Path(command.split()[-1])
    assert checkpoint.name == f"batch_{after + (moment == 'batch'):06d}.ckpt"
    assert checkpoint.is_dir() == (strategy == "fsdp2")
    assert not (run_dir / "policy").exists()
    process = start([*command.split()[3:], "--trainer.callbacks=null"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    torch.testing.assert_close(weights(run_dir), weights(whole), rtol=1e-4, atol=5e-6)


FAILING = ["--trainer.devices=2", "--data.batches=5", "--checkpoint_every=1"]
FAILED = (1, -signal.SIGKILL)  # Lightning kills the first process where it has not ended within 5 s of a lost one


def fail(run_dir: Path, tiny: str, *flags: str) -> tuple[int, str]:
    """Exit code and output of a run in which something happens in the third rollout; its checkpoint must be good."""
    process = start([tiny, *FAILING, f"--run_dir={run_dir}", *flags])
    output, _ = process.communicate(timeout=300)
    (name,) = {p.name for p in (run_dir / "checkpoints").iterdir()} - {"batch_000001.ckpt"}
    assert name == "batch_000002.ckpt"
    assert torch.load(run_dir / "checkpoints" / name, weights_only=True)["rollouts"] == 2
    return process.returncode, output


@pytest.mark.slow
def test_a_process_that_raises_stops_all_and_names_itself_and_the_checkpoint(tiny, tmp_path):
    code, output = fail(tmp_path / "run", tiny, "--data.task.mode=raise", "--trainer.strategy=ddp")
    assert code in FAILED
    assert "rank 1 of 2 failed after 2 batches: KeyError: 'the third batch'" in output
    assert f"Last checkpoint: {tmp_path}/run/checkpoints/batch_000002.ckpt" in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("mode", "message"),
    [("raise", "rank 0 of 2 failed after 2 batches: KeyError"), ("kill", "Local rank 1 was killed by signal 9")],
)
def test_a_process_that_is_lost_stops_all(tiny, tmp_path, strategy, mode, message):
    rank = 0 if mode == "raise" else 1
    flags = (f"--data.task.mode={mode}", f"--data.task.rank={rank}", f"--trainer.strategy={strategy}")
    code, output = fail(tmp_path / "run", tiny, *flags)
    assert code in FAILED, output
    assert message in output


@pytest.mark.slow
def test_a_verifier_slower_than_the_timeout_stops_all(tiny, tmp_path):
    begin = time.monotonic()
    flags = ("--data.task.mode=sleep", "--data.task.rank=1", "--trainer.strategy=ddp", "--timeout=60")
    code, output = fail(tmp_path / "run", tiny, *flags)
    assert code == 1, output
    assert time.monotonic() - begin < 240
    assert "rank 0 of 2 failed after 2 batches" in output
    assert "timeout" in output.lower()


@pytest.mark.slow
def test_torchrun_starts_the_same_run(whole, tiny, tmp_path):
    flags = [tiny, "--trainer.strategy=fsdp2", "--trainer.devices=2", f"--run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *FIT[1:]]
    options = ["--data.batches=6", "--trainer.val_check_interval=2"]
    done = subprocess.run([*command, *flags, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    torch.testing.assert_close(weights(tmp_path / "run"), weights(whole), rtol=1e-4, atol=5e-6)
