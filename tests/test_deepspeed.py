"""ZeRO 1 and 2 by DeepSpeed: two processes against one, resume to and from it, and what it refuses."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import small_policy
from distributed_cases import TINY, refused, start, weights
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from two_processes import ENVIRONMENT, RESUMED, ROUNDED, RUNS, ZERO, assert_same

from espo_lightning import fit
from espo_lightning.lab.evaluation import load_weights
from espo_lightning.training.strategies import check, named
from espo_lightning.training.zero import DEEPSPEED, DeepSpeed

installed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason=f"deepspeed is not installed; `make deepspeed` does that: {DEEPSPEED}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def one(folder) -> dict:
    """Without DeepSpeed."""
    return two_processes.alone(folder)


@pytest.fixture(scope="module")
def two(folder, one) -> dict:
    """Every run on two processes, in both stages."""
    return two_processes.staged(folder, "zero", timeout=900, DS_ACCELERATOR="cpu")


@installed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("name", sorted(RUNS.keys() - ROUNDED))
def test_two_processes_do_what_one_does(one, two, strategy, name):
    """Completions, rewards, metrics (so advantages, ELBOs, losses and the global gradient norm), weights.

    Micro-batches, views, a norm that is clipped, learning rates that rise, adapters, tied weights.
    """
    assert_same(two[strategy, name, "whole"], one[name])


@installed
@pytest.mark.parametrize("strategy", ZERO)
def test_processes_with_different_numbers_of_equal_groups_stay_in_step(two, strategy):
    rollouts = two[strategy, "skip", "whole"]["rollouts"]
    assert any(0 in r["counted"] and max(r["counted"]) > 0 for r in rollouts)
    assert any(max(r["counted"]) == 0 for r in rollouts)


@installed
@pytest.mark.parametrize("strategy", ZERO)
def test_a_nan_gradient_of_one_process_skips_the_update_of_all(two, strategy):
    metrics = two[strategy, "poison", "whole"]["metrics"]
    assert [m["train/skipped_updates"] for m in metrics] == [0, 1, 0, 0]
    assert metrics[1]["train/grad_norm"] != metrics[1]["train/grad_norm"]  # NaN


@installed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_rounded_numbers_are_those_of_ddp(two, strategy, name):
    """Autocast around float32 weights, and adapters on a bfloat16 base; on as many processes, so rounded alike."""
    assert_same(two[strategy, name, "whole"], two["ddp", name, "whole"])


@installed
@pytest.mark.parametrize("strategy", ZERO)
def test_mixed_precision_scores_in_float32_and_never_rounds_a_weight(one, two, strategy):
    result = two[strategy, "bf16", "whole"]
    assert {r["dtype"] for r in result["rollouts"]} == {torch.float32}
    first, rounded, plain = (r["metrics"][0]["train/kl"] for r in (result, one["bf16"], one["sync"]))
    assert abs(first - rounded) < abs(first - plain)  # there was bfloat16 at all
    assert all(w.dtype == torch.float32 for w in result["weights"].values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in result["weights"].values())


@installed
@pytest.mark.parametrize("strategy", ZERO)
def test_a_bfloat16_base_stays_as_it_is(two, strategy):
    result, start = two[strategy, "bf16 base", "whole"], two_processes.lora_policy(torch.bfloat16).state_dict()
    for name, weight in result["weights"].items():
        assert weight.dtype == start[name].dtype
        assert torch.equal(weight, start[name]) != (".lora_" in name)


@installed
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", ZERO)
def test_a_resumed_run_equals_the_whole_one(two, strategy, name):
    assert len(two[strategy, name, "resumed"]["rollouts"]) == 2
    assert_same(two[strategy, name, "resumed"], two[strategy, name, "whole"], exactly=True)


@installed
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("strategy", ZERO)
def test_a_run_goes_from_one_process_without_deepspeed_to_two_with_it_and_back(folder, one, two, strategy, name):
    there = two[strategy, name, "resumed from one process"]
    back = two_processes.run(name, "auto", 1, folder, resume=folder / f"{strategy}_{name}.ckpt")
    for resumed in (there, back):
        assert len(resumed["rollouts"]) == 2
        assert_same(resumed, one[name])


@installed
@pytest.mark.parametrize("strategy", ZERO)
def test_checkpoints_are_those_of_one_process(folder, one, two, strategy):
    """What is trained and its moments, by name, to float tolerance; not the base under adapters."""
    for name in RESUMED:
        paths = [folder / f"{source}_{name}.ckpt" for source in (strategy, "one")]
        mine, other = (torch.load(path, weights_only=True) for path in paths)
        assert mine.keys() == other.keys()
        assert all(mine[key] == other[key] for key in ("lr_schedulers", "loops", "rollouts", "base"))
        ((mine_of_adam,), (other_of_adam,)) = (c["optimizer_states"] for c in (mine, other))
        assert mine_of_adam["param_groups"] == other_of_adam["param_groups"]
        for a, b in ((mine["state_dict"], other["state_dict"]), (mine_of_adam["state"], other_of_adam["state"])):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
        policy = two_processes.lora_policy() if name == "lora" else small_policy()
        load_weights(policy, paths[0])
        trained = {n: w for n, w in policy.named_parameters() if w.requires_grad}
        torch.testing.assert_close(trained, {n: mine["state_dict"][f"policy.{n}"] for n in trained}, check_stride=False)


# ---- the command line ----------------------------------------------------------------------------------------------


@installed
def test_the_command_line_stops_at_ctrl_c_and_goes_on_to_a_complete_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    small_policy().save(tmp_path / "tiny")
    flags = [f"--model.policy.path={tmp_path / 'tiny'}", "--data.batches=4", "--trainer.val_check_interval=2"]
    fit.main([*TINY, *flags, f"--run_dir={tmp_path / 'one'}"])
    two = ["--trainer.strategy=deepspeed", "--trainer.devices=2", f"--run_dir={tmp_path / 'two'}"]
    at = [
        "--trainer.callbacks=interruptions.SignalAt",
        "--trainer.callbacks.moment=batch",
        "--trainer.callbacks.batch=2",
    ]
    process = start([*flags, *two, *at])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    (command,) = [line.strip() for line in output.splitlines() if "--ckpt_path" in line]
    assert Path(command.split()[-1]).is_file()
    process = start([*command.split()[3:], "--trainer.callbacks=null"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=5e-6)


# ---- without the package -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["deepspeed", "deepspeed_stage_1", "DeepSpeed", "DeepSpeed --trainer.strategy.stage=1"]
)
def test_without_the_package_there_is_one_message_and_nothing_written(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # it can be neither found nor imported
    message = refused(capsys, f"--run_dir={tmp_path / 'run'}", *f"--trainer.strategy={name}".split())
    assert f"trainer.strategy=deepspeed needs a package that is not installed: {DEEPSPEED}" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        *(
            [f"--trainer.strategy={name}"]
            for name in ("deepspeed_stage_3", "deepspeed_stage_2_offload", "deepspeed_stage_3_offload")
        ),
        ["--trainer.strategy=DeepSpeed", "--trainer.strategy.stage=3"],
    ],
)
def test_other_stages_and_offloading_are_refused_with_a_way_out(tmp_path, capsys, flags):
    assert "instead of ZeRO-3 use fsdp2, with offloading FSDP" in refused(
        capsys, f"--run_dir={tmp_path / 'run'}", *flags
    )
    assert not (tmp_path / "run").exists()


def test_the_engine_of_lightnings_own_strategy_is_refused():
    strategy = object.__new__(DeepSpeedStrategy)  # its constructor needs the package
    strategy._precision_plugin = None
    with pytest.raises(ValueError, match="own settings: use deepspeed"):
        check(strategy, small_policy())


@installed
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_the_engine_is_told(stage, precision):
    """As DeepSpeed itself reads it: no rounding of weights, no accumulation of its own, no offloading."""
    from deepspeed.runtime.config import DeepSpeedConfig

    strategy = named(f"deepspeed_stage_{stage}")
    strategy.precision_plugin = DeepSpeedPrecision(precision)
    strategy._init_config_if_needed()
    read = DeepSpeedConfig({**strategy.config, "train_micro_batch_size_per_gpu": 1})
    assert read.zero_config.stage == stage
    assert (read.zero_config.offload_optimizer, read.zero_config.offload_param) == (None, None)
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (False, False)
    assert read.torch_autocast_enabled == (precision == "bf16-mixed")
    assert read.torch_autocast_dtype == torch.bfloat16
    assert read.torch_autocast_lower_precision_safe_modules == []
    assert read.gradient_accumulation_steps == 1


@installed
def test_only_float32_weights_are_trained():
    check(named("deepspeed"), small_policy())
    check(named("deepspeed"), two_processes.lora_policy(torch.bfloat16))
    with pytest.raises(ValueError, match=r"deepspeed trains weights of float32, got \['torch.bfloat16'\]"):
        check(DeepSpeed(), small_policy().bfloat16())
