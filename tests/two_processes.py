"""The runs that test_distributed.py compares, each a function of nothing but its name, its strategy and the number of
processes. As a program, it does all of them on two processes and saves what the first one saw:

python tests/two_processes.py FOLDER
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Letters, small_module, small_policy
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from espo_lightning import LoRA, PromptDataModule
from espo_lightning.checkpoint import _add_adapter
from espo_lightning.strategies import FSDP, FSDP2, full_state_dict, gather

SGD = partial(torch.optim.SGD, lr=10.0)
STRATEGIES = {"ddp": lambda: "ddp", "fsdp": FSDP, "fsdp2": FSDP2}


def lora_policy(dtype=torch.float32):
    policy = small_policy()
    policy.model = _add_adapter(policy.model.to(dtype), LoRA(rank=2, alpha=4))
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return policy


def poisoned_on_the_last_rank(rollout, module):
    bad = rollout == 1 and module.global_rank == module.trainer.world_size - 1
    return (lambda new, old: (new - old).mean((0, 2))[:, None] * math.nan) if bad else None


# settings of the module; "policy", "precision" and "poison" are taken out first
RUNS = {
    "plain": {"max_grad_norm": 1e-3, "micro_batch": 3},
    "adam": {"optimizer": partial(torch.optim.Adam, lr=3e-3), "warmup": 3},
    "skip": {"beta": 0.0, "micro_batch": 2, "group_size": 3},
    "views": {"view_by_view": True, "micro_batch": 3},
    "scattered": {"gather_rollouts": False},
    "sync": {"reference_sync": 2},
    "lora": {"policy": lora_policy},
    "poison": {"poison": True},
    "bf16": {"precision": "bf16-mixed", "optimizer": partial(torch.optim.SGD, lr=0.1)},
}


class Record(Callback):
    """Metrics, completions, rewards and advantages of every rollout, in the order of the ranks; all-gathers of weights."""

    def __init__(self, poison: bool, save: Path | None):
        self.poison, self.save, self.rollouts, self.metrics = poison, save, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.poison:
            module.ratio = poisoned_on_the_last_rank(batch_idx, module) or _ratio

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        r = module.last_rollout
        mine = r.texts, r.rewards, len(r.completion), r.counted
        texts, rewards, rows, counted = zip(*gather(mine))
        self.rollouts.append({"texts": sum(texts, []), "rewards": torch.cat(rewards), "rows": rows, "counted": counted})
        timeless = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(("time/", "speed/"))}
        self.metrics.append(timeless)
        if self.save and batch_idx == 1:
            trainer.save_checkpoint(self.save)


def _ratio(new, old):
    return (new - old).mean((0, 2)).exp()[:, None]


def run(name: str, strategy, devices: int, folder: Path, save: Path | None = None, resume: Path | None = None) -> dict:
    """Four rollouts of one of the runs; what happened, and the complete final weights."""
    settings = {"optimizer": SGD, **RUNS[name]}
    poison, precision = settings.pop("poison", False), settings.pop("precision", "32-true")
    module = small_module(settings.pop("policy", small_policy)(), **settings)
    data = PromptDataModule(Letters(), batch_size=4, batches=4, eval_problems=4, eval_batch_size=4)
    record = Record(poison, save)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[record], val_check_interval=4, check_val_every_n_epoch=None, inference_mode=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    with CountAllGathers() as gathers:
        trainer.fit(module, data, ckpt_path=resume)
    whole = {k: v.clone() for k, v in full_state_dict(module.policy).items()}
    val = {k: v for k, v in module.summary.items() if k != "ci95"}
    return {"rollouts": record.rollouts, "metrics": record.metrics, "val": val, "weights": whole, "gathers": gathers.count}


class CountAllGathers(TorchDispatchMode):
    """Counts the all-gathers of this thread, those of weights and the few others."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in function.__name__
        return function(*args, **(kwargs or {}))


def main(folder: Path, names, strategies) -> None:
    results = {}
    for strategy in strategies:
        for name in names:
            print(strategy, name, flush=True)
            try:
                results[strategy, name] = run(name, STRATEGIES[strategy](), 2, folder)
            except Exception as e:
                import traceback; traceback.print_exc()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(",") if len(sys.argv) > 2 else list(RUNS), sys.argv[3].split(",") if len(sys.argv) > 3 else list(STRATEGIES))
