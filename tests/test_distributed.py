"""Two processes against one: the same rollouts, updates and metrics under every strategy, resume, and failures."""

import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import small_policy
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from two_processes import ENVIRONMENT, RESUMED, ROUNDED, RUNS, SHARDED, STRATEGIES, assert_same

from espo_lightning import fit, load_policy, new_policy
from espo_lightning.lab.evaluation import load_weights
from espo_lightning.training.strategies import FSDP, FSDP2, check, check_resume, named, weights_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder) -> dict:
    return two_processes.alone(folder)


@pytest.fixture(scope="module")
def two(folder, one) -> dict:
    """Every run on two processes, under each strategy; and on one, those whose checkpoints are folders."""
    return two_processes.staged(folder, "before", "two", "after", timeout=1500)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
@pytest.mark.parametrize("name", sorted(RUNS.keys() - ROUNDED))
def test_two_processes_do_what_one_does(one, two, strategy, name):
    """Completions, rewards, metrics (so advantages, ELBOs, losses and the global gradient norm), weights."""
    assert_same(two[strategy, name, "whole"], one[name])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_processes_with_different_numbers_of_equal_groups_stay_in_step(two, strategy):
    """One process has nothing to train on, the other has, and then neither has: nothing hangs, nothing is lost."""
    rollouts = two[strategy, "skip", "whole"]["rollouts"]
    assert any(0 in r["counted"] and max(r["counted"]) > 0 for r in rollouts)
    assert any(max(r["counted"]) == 0 for r in rollouts)
    group = RUNS["skip"]["group_size"]  # one group stays, so that the optimizer takes its step
    assert all(r["rows"] == (max(group, *r["counted"]),) * 2 for r in rollouts)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_a_nan_gradient_of_one_process_skips_the_update_of_all(one, two, strategy):
    for result in (one["poison"], two[strategy, "poison", "whole"]):
        assert [m["train/skipped_updates"] for m in result["metrics"]] == [0, 1, 0, 0]


def test_the_norm_is_that_of_all_processes_whatever_torch_returns(two):
    norm = two["norm in parts"]
    assert type(norm) is torch.Tensor
    assert norm == 3 + 4


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_gathering_once_per_rollout_saves_all_gathers(two, strategy):
    """Of the same run: 4 rollouts x 4 steps x 3 units, less the first of each, and validation."""
    plain, scattered = (two[strategy, name, "whole"]["collectives"]["gathers"] for name in ("plain", "scattered"))
    assert plain <= scattered - 4 * 3 * 2


def test_fsdp2_reduces_adapters_once_per_update_and_all_weights_in_every_pass(two):
    """4 rollouts x 2 updates, of 2 layers and the root, where no adapter is; 3 micro-batches, each of M = 2 views."""
    plain, lora = (two["fsdp2", name, "whole"]["collectives"]["reductions"] for name in ("plain", "lora in pieces"))
    assert (plain, lora) == (8 * 3 * 3, 8 * 2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_mixed_precision_scores_in_float32(one, two, strategy):
    result = two[strategy, "bf16", "whole"]
    assert {r["dtype"] for r in result["rollouts"]} == {torch.float32}
    first, expected = (r["metrics"][0]["train/score_per_token"] for r in (result, one["bf16"]))
    assert first == pytest.approx(expected, rel=0.02)
    assert all(w.dtype == torch.float32 for w in result["weights"].values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_float32_adapters_train_on_a_bfloat16_base(one, two, strategy):
    result, start = two[strategy, "bf16 base", "whole"], two_processes.lora_policy(torch.bfloat16).state_dict()
    for name, weight in result["weights"].items():
        assert weight.dtype == start[name].dtype
        assert torch.equal(weight, start[name]) != (".lora_" in name)
    first, expected = (r["metrics"][0]["train/score_per_token"] for r in (result, one["bf16 base"]))
    assert first == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_one_process_stops_after_any_rollout_and_goes_on_bit_for_bit(folder, one, name, after):
    checkpoint = folder / f"one_{name}.ckpt"
    if after != 2:  # which is there already
        checkpoint = folder / f"one_{name}_{after}.ckpt"
        two_processes.run(name, "auto", 1, folder, save=checkpoint, after=after)
    resumed = two_processes.run(name, "auto", 1, folder, resume=checkpoint)
    assert len(resumed["rollouts"]) == 4 - after
    assert_same(resumed, one[name], exactly=True)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_the_whole_one(one, two, strategy, name):
    assert len(two[strategy, name, "resumed"]["rollouts"]) == 2
    assert_same(two[strategy, name, "resumed"], two[strategy, name, "whole"], exactly=True)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_one_process_goes_on_with_two(one, two, strategy, name):
    assert len(two[strategy, name, "resumed from one process"]["rollouts"]) == 2
    assert_same(two[strategy, name, "resumed from one process"], one[name])


@pytest.mark.parametrize(
    ("strategy", "name"), [*SHARDED, *((s, n) for s in ("ddp", "fsdp", "fsdp2 full") for n in RESUMED)]
)
def test_a_run_on_two_processes_goes_on_with_one(folder, one, two, strategy, name):
    if (strategy, name) in SHARDED:
        resumed = two[strategy, name, "resumed from two processes"]
    else:
        resumed = two_processes.run(name, "auto", 1, folder, resume=folder / f"{strategy}_{name}.ckpt")
    assert len(resumed["rollouts"]) == 2
    assert_same(resumed, one[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_hold_what_training_changes(two, folder, strategy):
    """The adapters and their moments, not the base; and every weight, without a frozen reference but with a synced."""
    for name, policy, references in (("lora", two_processes.lora_policy(), 0), ("sync", small_policy(), 1)):
        path = folder / f"{strategy}_{name}.ckpt"
        names = weights_in(path)[1] if path.is_dir() else set(torch.load(path, weights_only=True)["state_dict"])
        trained = {f"policy.{n}" for n, p in policy.named_parameters() if p.requires_grad}
        assert names == trained | {f"reference.{n}" for n in trained if references}


def test_adapters_are_not_resumed_on_another_base(folder, one):
    path = folder / "one_lora.ckpt"
    other = two_processes.lora_policy()
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad).add_(1e-3)
    with pytest.raises(ValueError, match="the checkpoint belongs to another base"):
        two_processes.run("lora", "auto", 1, folder, resume=path, policy=lambda: other)
    with pytest.raises(ValueError, match="its adapters are for another base"):
        load_weights(other, path)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_form_of_checkpoint_can_be_evaluated(folder, two, strategy, name):
    """Those in shards hold the same weights as the one file of the same run."""
    make = two_processes.lora_policy if name == "lora" else small_policy
    policies = make(), make()
    for policy, source in zip(policies, (strategy, "ddp")):
        load_weights(policy, folder / f"{source}_{name}.ckpt")
    torch.testing.assert_close(policies[0].state_dict(), policies[1].state_dict(), rtol=1e-4, atol=5e-6)
    assert any(not torch.equal(w, start) for w, start in zip(policies[0].parameters(), make().parameters()))
    with pytest.raises(ValueError, match=r"does not fit the policy: .* only one of them"):
        load_weights(new_policy(hidden_size=16, layers=3, heads=2), folder / f"{strategy}_{name}.ckpt")


def test_a_folder_of_shards_needs_the_strategy_that_wrote_it(folder, two, tmp_path):
    wrote = {"fsdp": folder / "fsdp sharded_sync.ckpt", "fsdp2": folder / "fsdp2_sync.ckpt"}
    for name, checkpoint in wrote.items():
        check_resume(named(name), checkpoint)
        for other in {"fsdp", "fsdp2", "ddp"} - {name}:
            strategy = DDPStrategy() if other == "ddp" else named(other)
            with pytest.raises(ValueError, match=f"that only {name} reads.*set trainer.strategy={name}$"):
                check_resume(strategy, checkpoint)
    check_resume(DDPStrategy(), folder / "ddp_sync.ckpt")
    with pytest.raises(ValueError, match="is a folder without shards"):
        check_resume(FSDP2(), tmp_path)


# ---- the command line ----------------------------------------------------------------------------------------------

TINY = [
    "--data.task=failing_tasks.Failing",  # which does not, unless told to
    "--data.batch_size=2",
    "--data.eval_problems=8",
    "--data.eval_batch_size=8",
    "--model.group_size=4",
    "--model.optimizer.lr=0.01",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]
FIT = [sys.executable, "-m", "espo_lightning.fit", *TINY]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    small_policy().save(path)
    return f"--model.policy.path={path}"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run on one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    fit.main([*TINY, tiny, f"--run_dir={run_dir}", "--data.batches=6", "--trainer.val_check_interval=2"])
    base = small_policy().state_dict()
    assert max((w - base[k]).abs().max() for k, w in weights(run_dir).items()) > 0.05  # there is something to compare
    return run_dir


def weights(run_dir: Path) -> dict:
    return load_policy(run_dir / "policy").state_dict()


def start(arguments, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen([*FIT, *map(str, arguments)], **pipes | options)


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


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, *map(str, arguments)])
    assert error.value.code == 2
    return capsys.readouterr().err


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
        (["--timeout=0"], "timeout must be positive"),
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
