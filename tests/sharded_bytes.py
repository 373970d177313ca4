"""What two processes really hold and exchange, under each strategy: ``python tests/sharded_bytes.py FOLDER``."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Letters, small_module
from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import lora_policy

from espo_lightning import PromptDataModule, new_policy
from espo_lightning.training.strategies import FSDP2

RUNS = {
    "ddp": ("ddp", {}),
    "fsdp2": (FSDP2, {"gather_rollouts": False}),
    "fsdp2, gathered": (FSDP2, {}),
    "fsdp2, LoRA": (FSDP2, {"policy": lora_policy, "gather_rollouts": False}),
    "ddp, LoRA": ("ddp", {"policy": lora_policy}),
}


def policy():
    """Every matrix has an even number of rows, so that both halves are equal."""
    return new_policy(hidden_size=16, layers=3, heads=2, intermediate_size=24)


def local(tensors) -> int:
    """Bytes of the tensors that this process has."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


class Received(TorchDispatchMode):
    """Bytes that this process receives in gathers of weights and in reductions of gradients by FSDP2."""

    gathered = reduced = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather_base" in function.__name__:
            self.gathered += args[0].nbytes // 2
        if "reduce_scatter_base" in function.__name__:
            self.reduced += args[0].nbytes
        return function(*args, **(kwargs or {}))


class Held(Callback):
    """Bytes that this process holds, at the last step of the optimizer."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = local(p.grad for p in module.policy.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        reference = [] if module.policy.has_adapters else module.reference.parameters()
        self.bytes = {
            "weights": local(module.policy.parameters()),
            "gradients": self.gradients,
            "optimizer": local(moments),
            "reference": local(reference),
        }
        self.masks = module.last_rollout.masks
        self.width = module.last_rollout.prompts.ids.shape[1] + module.decoding.length


def run(strategy, folder: Path, **settings) -> dict:
    make = settings.pop("policy", policy)
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    module = small_module(make(), micro_batch=3, skip_equal_groups=False, optimizer=optimizer, **settings)
    held = Held()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy if isinstance(strategy, str) else strategy(), max_epochs=1,
        precision="bf16-mixed", default_root_dir=folder, callbacks=[held], limit_val_batches=0,
        **dict.fromkeys(quiet, False),
    )  # fmt: skip
    with Received() as received:
        trainer.fit(module, PromptDataModule(Letters(), batch_size=4, batches=1))
    sizes = {"gathered": received.gathered, "reduced": received.reduced}
    return {"held": held.bytes, "received": sizes, "masks": held.masks, "width": held.width, "group": module.group_size}


def main(folder: Path) -> None:
    results = {name: run(strategy, folder, **settings) for name, (strategy, settings) in RUNS.items()}
    if dist.get_rank() == 0:
        torch.save(results, folder / "bytes.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
