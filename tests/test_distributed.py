"""Two processes against one: the same rollouts, updates, metrics and checkpoints under every strategy."""

from pathlib import Path

import pytest
import torch
import two_processes
from conftest import small_policy
from lightning.pytorch.strategies import DDPStrategy
from two_processes import RESUMED, ROUNDED, RUNS, SHARDED, STRATEGIES, assert_same

from espo_lightning import new_policy
from espo_lightning.lab.evaluation import load_weights
from espo_lightning.training.strategies import FSDP2, check_resume, named, weights_in


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
