"""The runs that the tests of strategies compare: the same four rollouts on one process and on two, under each strategy.

As a program, it does a stage of them and saves what the first process saw: ``python tests/two_processes.py FOLDER
before|two|after``, in this order, where FOLDER holds one_sync.ckpt and one_lora.ckpt, of runs on one process. Before
and after all the runs on two processes, there are runs on one that exchange sharded checkpoints with them. The stage
``zero`` is the runs under DeepSpeed, for which its package must be there, and those that are compared with ddp's. Names
of methods, separated by commas, are a stage of their own: under ddp, as methods differ in their losses only, which no
strategy sees.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from conftest import Letters, small_module, small_policy
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import TorchDispatchMode

from espo_lightning import (
    BlockDecoding,
    BlockELBO,
    BlockViews,
    LoRA,
    OneMasked,
    PolicyGradient,
    PromptDataModule,
    new_policy,
    sequence_ratio,
)
from espo_lightning.lab.methods import Method, read_method
from espo_lightning.policies.load import _checkpoint_layers
from espo_lightning.policies.lora import add_adapter
from espo_lightning.training.strategies import FSDP, FSDP2, clip_grad_norm, full_state_dict, gather
from espo_lightning.training.zero import DeepSpeed

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp": FSDP,
    "fsdp sharded": partial(FSDP, state_dict_type="sharded"),
    "fsdp2": FSDP2,
    "fsdp2 full": partial(FSDP2, save_distributed_checkpoint=False),
}
# a bucket has room for some of the weights, and not for the largest
ZERO = {f"deepspeed_stage_{stage}": partial(DeepSpeed, stage=stage, bucket_size=1000) for stage in (1, 2)}


def lora_policy(base=torch.float32):
    """Adapters of float32 on a base of another type, as `load_policy` makes them."""
    policy = small_policy()
    policy.model = add_adapter(policy.model.to(base), LoRA(rank=2, alpha=4))
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return policy


def checkpointed_tied_policy():
    policy = small_policy()
    policy.model.config.tie_word_embeddings = True
    policy.model.lm_head.weight = policy.model.model.embed_tokens.weight
    _checkpoint_layers(policy)
    return policy.train()


def block_policy():
    """Prompts of 2 to 4 tokens, so that a completion has two blocks or three."""
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, block=2, origin="global")


def uneven_policy(make=small_policy):
    """Of many tokens that end a text, so that completions differ in length; float64, so that no rounding flips one."""
    policy = make().double()
    policy.config.eos_token_id = [policy.config.eos_token_id, *range(20, 35)]
    return policy


def uneven_block_policy():
    return uneven_policy(block_policy)


def small_method(method: Method) -> dict:
    """The settings of a method on a canvas of 4 tokens."""
    likelihood = method.likelihood
    if isinstance(likelihood, BlockViews):
        likelihood = replace(likelihood, block=2)
    if isinstance(likelihood, OneMasked):
        likelihood = replace(likelihood, draws=2)
    settings = {"objective": method.objective, "advantage": method.advantage, "likelihood": likelihood}
    if likelihood.traced:  # whose temperature and order belong together
        settings["decoding"] = replace(method.decoding, length=4, block_length=4, steps=4)
        settings["seed"] = 5  # with others, no completion of the first rollouts has a reward
    # a step at which no loss diverges, where roundings would grow
    sgd = {"optimizer": partial(torch.optim.SGD, lr=0.05)}
    policy = uneven_policy
    if isinstance(likelihood, BlockELBO):
        policy = uneven_block_policy
        settings |= {"likelihood": replace(likelihood, block=2), "decoding": BlockDecoding(4, 2, 4)}
    return {"policy": policy, "updates": min(method.updates, 3), **settings, **sgd}


ADAM = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "warmup": 6}
RUNS = {  # settings of the module; "policy", "precision" and "poison" are taken out first
    "plain": {"max_grad_norm": 1e-3, "micro_batch": 3},
    "skip": {"beta": 0.0, "micro_batch": 2, "group_size": 3},
    "scattered": {"gather_rollouts": False, "max_grad_norm": 1e-3, "micro_batch": 3},
    "sync": {"reference_sync": 2, **ADAM},
    "lora": {"policy": lora_policy, **ADAM},
    "lora in pieces": {"policy": lora_policy, "micro_batch": 3, "view_by_view": True, **ADAM},
    "poison": {"poison": True},
    "checkpointed tied": {"policy": checkpointed_tied_policy, "view_by_view": True, "micro_batch": 3},
    "bf16 base": {"policy": partial(lora_policy, torch.bfloat16), **ADAM},
    "bf16": {"precision": "bf16-mixed", **ADAM},
    "blocks": {"policy": block_policy, "decoding": BlockDecoding(4, 2, 4), "likelihood": BlockELBO(2, block=2), **ADAM},
}
PRESETS = sorted((HERE.parent / "experiments" / "methods").glob("*.yaml"))
METHODS = {path.stem: small_method(read_method(path)) for path in PRESETS}
RESUMED = ("sync", "lora")
ROUNDED = ("bf16", "bf16 base")  # another order of additions, or number of rows, may flip a token
# whose checkpoints are folders; FSDP1 does not train adapters on one process
SHARDED = (("fsdp sharded", "sync"), ("fsdp2", "sync"), ("fsdp2", "lora"))


class Record(Callback):
    """What every rollout was on all processes together, in the order of the ranks, and its metrics."""

    def __init__(self, poison: bool, save: Path | None, after: int):
        self.poison, self.save, self.after, self.rollouts, self.metrics = poison, save, after, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.poison:  # one process is enough
            bad = batch_idx == 1 and module.global_rank == trainer.world_size - 1
            module.objective = PolicyGradient(ratio=nan_ratio if bad else sequence_ratio)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rollout = module.last_rollout
        terms = None if rollout.old[-1] is None else rollout.old[-1].dtype
        parts = gather((rollout.texts, rollout.rewards, len(rollout.completion), rollout.counted))
        texts, rewards, rows, counted = zip(*parts)
        both = {"texts": [t for part in texts for t in part], "rewards": torch.cat(rewards)}
        self.rollouts.append({**both, "rows": rows, "counted": counted, "dtype": terms})
        timed = ("time/", "speed/")
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(timed)})
        if self.save and module.rollouts == self.after:
            trainer.save_checkpoint(self.save)


def nan_ratio(scores):
    log_ratio, weight = sequence_ratio(scores)
    return log_ratio * math.nan, weight


class CountCollectives(TorchDispatchMode):
    """Counts this thread's all-gathers, those of weights and a few others, and reductions, of gradients by FSDP."""

    gathers = reductions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.gathers += "allgather" in function.__name__
        self.reductions += "reduce_scatter" in function.__name__
        return function(*args, **(kwargs or {}))


def run(
    name: str,
    strategy,
    devices: int,
    folder: Path,
    save: Path | None = None,
    after: int = 2,
    resume: Path | None = None,
    **changes,
) -> dict:
    """Four rollouts of four prompts: what happened, the complete final weights, the number of all-gathers.

    Args:
        save: a checkpoint to write after so many rollouts.
        resume: a checkpoint to begin with.
        changes: of the settings.
    """
    settings = {"optimizer": partial(torch.optim.SGD, lr=10.0), **(RUNS | METHODS)[name], **changes}
    poison, precision = settings.pop("poison", False), settings.pop("precision", "32-true")
    module = small_module(settings.pop("policy", small_policy)(), **settings)
    data = PromptDataModule(Letters(), batch_size=4, batches=4, eval_problems=4, eval_batch_size=4)
    record = Record(poison, save, after)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[record], val_check_interval=4, check_val_every_n_epoch=None, inference_mode=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    counted = name in ("plain", "scattered", "lora in pieces")
    with CountCollectives() if counted else nullcontext() as collectives:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return {
        "rollouts": record.rollouts,
        "metrics": record.metrics,
        "val": {k: v for k, v in module.summary.items() if k != "ci95"},
        "weights": {k: v.clone() for k, v in full_state_dict(module.policy).items()},
        "collectives": collectives and {"gathers": collectives.gathers, "reductions": collectives.reductions},
    }


def clipped_norm_in_parts() -> torch.Tensor:
    """What `clip_grad_norm` makes of a norm of which either process has a part, 3 and 4; torch 2.13 returns none."""
    mesh = init_device_mesh("cpu", (2,))
    part = DTensor.from_local(torch.tensor(3.0 + dist.get_rank()), mesh, [Partial()])
    with patch("torch.nn.utils.clip_grad_norm_", return_value=part):
        return clip_grad_norm(nn.Linear(1, 1), DDPStrategy(), 1.0)


def alone(folder: Path, names: Iterable[str] = RUNS) -> dict:
    """The runs on one process: the oracle. Those that are resumed leave their checkpoints in the folder."""
    saved = {name: folder / f"one_{name}.ckpt" for name in RESUMED}
    return {name: run(name, "auto", 1, folder, save=saved.get(name)) for name in names}


def staged(folder: Path, *stages: str, timeout: float, **environment: str) -> dict:
    """What this program saved in the stages, one after the other, each on as many processes as it wants."""
    results = {}
    for stage in stages:
        command = [sys.executable, __file__, folder, stage]
        env = ENVIRONMENT | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        results |= torch.load(folder / f"{stage}.pt", weights_only=False)
    return results


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


def main(folder: Path, stage: str) -> None:
    results, devices = {}, 1 if stage in ("before", "after") else 2
    plain, resumed = {"two": (("ddp", "fsdp", "fsdp2"), STRATEGIES), "zero": (ZERO, ZERO)}.get(stage, ((), ()))

    def do(strategy: str, name: str, how: str = "whole", **files: Path) -> None:
        results[strategy, name, how] = run(name, (STRATEGIES | ZERO)[strategy](), devices, folder, **files)

    for name in stage.split(",") if stage.split(",")[0] in METHODS else ():
        do("ddp", name)
    for strategy, name in SHARDED if devices == 1 else ():
        if stage == "before":
            do(strategy, name, save=folder / f"one_{strategy}_{name}.ckpt")
        else:
            do(strategy, name, "resumed from two processes", resume=folder / f"{strategy}_{name}.ckpt")
    for strategy in plain:
        for name in RUNS:
            if name not in RESUMED and (strategy, name) != ("fsdp", "bf16 base"):
                do(strategy, name)
    for strategy in resumed:
        for name in RESUMED:
            own = folder / f"{strategy}_{name}.ckpt"
            do(strategy, name, save=own)
            do(strategy, name, "resumed", resume=own)
            one = folder / (f"one_{strategy}_{name}.ckpt" if (strategy, name) in SHARDED else f"one_{name}.ckpt")
            do(strategy, name, "resumed from one process", resume=one)
    if stage == "zero":
        for name in ROUNDED:
            do("ddp", name)
    if stage == "two":
        results["norm in parts"] = clipped_norm_in_parts()
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{stage}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
