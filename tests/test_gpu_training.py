"""Training on a GPU gives the weights of the CPU, in every way of training. The default suite runs it on the CPU."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import Letters, fit, parameters, small_module, small_policy
from gpu_cases import EVERYWHERE, GPU, trainer_on, training_policy, wide
from lightning.pytorch import Callback, Trainer

from espo_lightning import (
    ELBO,
    AutoregressiveDecoding,
    BlockDecoding,
    BlockELBO,
    Decoding,
    LoRA,
    PromptDataModule,
    Trajectory,
)
from espo_lightning.evaluate import evaluate
from espo_lightning.policies.load import _checkpoint_layers
from espo_lightning.policies.lora import add_adapter
from espo_lightning.scoring.likelihood import Autoregressive
from espo_lightning.training.strategies import FSDP2

BLOCKS = {"block": 2, "origin": "response"}
WAYS = {  # name: settings of the module, of the policy
    "plain": ({}, {}),
    "micro-batches": ({"micro_batch": 3, "likelihood": ELBO(draws=2)}, {}),
    "view by view": ({"view_by_view": True}, {}),
    "early stop": ({"decoding": Decoding(4, 4, 4, early_stop=True)}, {}),
    "trajectory": ({"likelihood": Trajectory()}, {}),
    "blocks": ({"decoding": BlockDecoding(4, 2, 4), "likelihood": BlockELBO(block=2)}, BLOCKS),
    "causal": ({"decoding": AutoregressiveDecoding(4), "likelihood": Autoregressive()}, {"causal": True}),
}


def mixed(prompt: str, text: str) -> dict[str, float]:
    """A reward that differs between any two texts, so that there is a gradient."""
    return {"reward": sum(map(ord, text)) % 7 / 7}


SGD = partial(torch.optim.SGD, lr=0.1)  # whose steps are as exact as its gradients


def close(device: str) -> dict[str, float]:
    return {"rtol": 1e-6, "atol": 1e-8} if wide(device) == torch.float64 else {"rtol": 1e-2, "atol": 1e-4}


def assert_trained_alike(device: str, make, **settings) -> None:
    """A module on the device and one on the CPU, on the same rollouts."""
    found = {}
    for place in ("cpu", device):
        module = small_module(make(place), optimizer=SGD, **settings)
        before = parameters(module).cpu()
        fit(module, 1, Letters(mixed), **trainer_on(place))
        found[place] = parameters(module).cpu()
        assert not torch.equal(found[place], before)
    torch.testing.assert_close(found[device].double(), found["cpu"].double(), **close(device))


@EVERYWHERE
@pytest.mark.parametrize("name", WAYS)
def test_a_rollout_and_its_updates_give_the_weights_of_the_cpu(device, name):
    settings, made = WAYS[name]
    assert_trained_alike(device, lambda place: training_policy(place, **made), **settings)


def with_adapters(device: str):
    policy = small_policy()
    policy.model = add_adapter(policy.model, LoRA(rank=2, alpha=4))
    return policy.to(device, wide(device))


def recomputing(device: str):
    policy = training_policy(device)
    _checkpoint_layers(policy)
    return policy.train()


@EVERYWHERE
@pytest.mark.parametrize("make", [with_adapters, recomputing])
def test_adapters_and_recomputed_layers_give_the_weights_of_the_cpu(device, make):
    assert_trained_alike(device, make, likelihood=ELBO(draws=2))


@EVERYWHERE
def test_adapters_that_are_made_on_the_device_are_those_of_the_cpu(device):
    policy = small_policy().to(device)
    policy.model = add_adapter(policy.model, LoRA(rank=2, alpha=4))
    expected = dict(with_adapters("cpu").float().named_parameters())
    for name, weight in policy.named_parameters():
        if ".lora_A." in name:
            assert torch.equal(weight.cpu(), expected[name])


@EVERYWHERE
def test_mixed_precision_keeps_float32_weights_near_those_of_float32(device):
    moved = {}
    for precision in ("32-true", "bf16-mixed"):
        module = small_module(small_policy().to(device), optimizer=SGD, likelihood=ELBO(draws=2))
        before = parameters(module).cpu()
        fit(module, 1, precision=precision, **trainer_on(device))
        after = parameters(module).cpu()
        assert after.dtype == torch.float32
        assert after.isfinite().all()
        moved[precision] = after - before
        assert moved[precision].norm() > 0
        rollout = module.last_rollout
        assert rollout.old[0].dtype == torch.float32
        assert float(rollout.old[0].max()) <= 0
    # completions may differ where bfloat16 decides otherwise, so that only the size of the step is compared
    ratio = float(moved["bf16-mixed"].norm() / moved["32-true"].norm())
    assert 0.2 < ratio < 5


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param(GPU, marks=pytest.mark.gpu)]
)  # it compiles
def test_compiled_layers_give_the_same_weights(device):
    backend = {"cpu": "aot_eager", "cuda": "inductor", "mps": "aot_eager"}[device]
    found = []
    for compile_with in (None, backend):
        module = small_module(small_policy().to(device), optimizer=SGD, compile=compile_with)
        fit(module, 1, **trainer_on(device))
        found.append(parameters(module).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # Apple's has no collectives
@pytest.mark.skipif(GPU == "mps", reason="FSDP2 wants NCCL or gloo on the device of the machine")
def test_fsdp2_with_one_process_gives_the_weights_of_one_without(device, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # as it was afterwards: Lightning sets some of them
        monkeypatch.delenv(name)
    plain = small_module(training_policy(device), optimizer=SGD)
    fit(plain, 1, **trainer_on(device))
    sharded, kept = small_module(training_policy(device), optimizer=SGD), []
    whole = sharded.log_step
    sharded.log_step = lambda *given: (whole(*given), kept.extend(p.full_tensor() for p in sharded.policy.parameters()))
    try:
        fit(sharded, 1, **trainer_on(device) | {"strategy": FSDP2()})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    weights = torch.cat([p.detach().flatten() for p in kept]).cpu()
    torch.testing.assert_close(weights, parameters(plain).cpu(), **close(device))


@EVERYWHERE
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(device, tmp_path):
    """Bit for bit on a CPU. A GPU need not add in the same order twice, so there to the last digits."""

    path = tmp_path / "two.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(path)

    def run(callbacks: list, resume=None):
        module = small_module(training_policy(device))
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        settings = {"max_epochs": 1, "limit_val_batches": 0, **dict.fromkeys(quiet, False), **trainer_on(device)}
        data = PromptDataModule(Letters(), batch_size=2, batches=3)
        Trainer(callbacks=callbacks, **settings).fit(module, data, ckpt_path=resume, weights_only=True)
        return parameters(module).cpu()

    whole, resumed = run([Save()]), run([], path)
    if device == "cpu":
        assert torch.equal(resumed, whole)
    torch.testing.assert_close(resumed, whole, **close(device))


@EVERYWHERE
def test_an_evaluation_on_the_device_is_that_of_the_cpu(device, tmp_path):
    found = []
    for place in ("cpu", device):
        policy = small_policy().to(wide(device))
        output = tmp_path / f"{len(found)}.json"
        found.append(evaluate(policy, Letters(), Decoding(4, 4, 4, temperature=0.0), problems=6, batch_size=4,
                              output=str(output), device=place))  # fmt: skip
    assert [s["completion"] for s in found[0]["samples"]] == [s["completion"] for s in found[1]["samples"]]
