"""Training checkpoints between batches: what they hold, when they are written, Ctrl-C and failures."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from espo_lightning.policies.policy import fingerprint
from espo_lightning.training.run_folder import replace, write_text
from espo_lightning.training.strategies import full_state_dict


class PolicyModule(LightningModule):
    """A module with a ``policy``, whose checkpoints hold what training changes, and of the rest a fingerprint.

    The rest is made again from where it came: the base under adapters, and a frozen reference.
    """

    def leave_out_frozen(self, but: str | None = None) -> None:
        """Leave frozen weights out of checkpoints; to be called once, before anything is trained or sharded.

        Args:
            but: names that begin like this are stored nevertheless.
        """
        weights = self.named_parameters(remove_duplicate=False)
        frozen = {n: p for n, p in weights if not (p.requires_grad or (but and n.startswith(but)))}
        self.left_out, self.base = set(frozen), fingerprint(frozen.values())
        self.strict_loading = not frozen
        self.trained = [name for name, p in self.named_parameters() if p.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        for name in self.left_out & state.keys():
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Optimizers number the weights that they train, FSDP all of them: names mean the same to both."""
        checkpoint["base"] = self.base
        for state in checkpoint.get("optimizer_states", []):
            groups = state.get("param_groups", [])
            names = dict(zip((i for group in groups for i in group["params"]), self.trained))
            if all(isinstance(i, int) for i in names):
                state["state"] = {names[i]: moments for i, moments in state.get("state", {}).items()}
                for group in groups:
                    group["params"] = [names[i] for i in group["params"]]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raises ValueError if what the checkpoint leaves out was something else."""
        if checkpoint["base"] != self.base:
            raise ValueError(
                f"the checkpoint belongs to another base ({checkpoint['base']}, this one is {self.base}): give "
                "model.policy the path and the dtype with which the run began"
            )


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its disk, where Lightning makes two copies first: in memory and in /tmp."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def check_space(folder: Path, module: PolicyModule, checkpoints: int) -> None:
    """Refuse to begin a run whose checkpoints will not fit.

    A checkpoint is counted as the module's state and two moments of each trainable weight, as Adam has.

    Args:
        checkpoints: at most on the disk at once.

    Raises:
        OSError: the folder cannot be written to, or there is not enough space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ".probe", "whether anything can be written at all")
    (folder / ".probe").unlink()
    state = module.state_dict()
    stored = sum(weight.nbytes for weight in state.values())
    policy = sum(weight.nbytes for name, weight in state.items() if name.startswith("policy."))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    needed, free = checkpoints * (stored + 2 * trained) + policy, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"run_dir {folder} has {free / 1e9:.1f} GB free, but {checkpoints} checkpoints at once and the final "
            f"policy need about {needed / 1e9:.1f} GB: free some, name another run_dir, or lower keep_checkpoints"
        )


class RunCheckpoint(Checkpoint):
    """Checkpoints between training batches, where nothing is half done, so that resume is exact.

    Lightning's own ModelCheckpoint counts optimizer steps and, on Ctrl-C, would save in the middle of a
    rollout's updates. Here the first Ctrl-C finishes the batch, saves and stops; the second stops at once.
    A checkpoint has its name only once it is complete: ``kill -9`` leaves the one before, and a ``.part``.

    A process that raises says which it is, in which batch, and what can be resumed; then it takes the
    others down, which would wait for it in vain.

    Args:
        folder: where to write ``batch_000010.ckpt`` and so on, files or folders.
        every: batches between checkpoints; there is one before every validation and after the last batch, too.
        keep: how many to keep, the newest; and the best by ``val/reward``, which ``best.json`` names.
        policy_folder: where the final policy goes, in Hugging Face form.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2, policy_folder: Path | None = None):
        if every < 1 or keep < 1:
            raise ValueError(f"checkpoint_every and keep_checkpoints must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep, self.policy_folder = folder, every, keep, policy_folder
        self.done = 0  # batches
        self.requested = self.interrupted = False  # Ctrl-C: seen by this process; agreed on by all

    @property
    def complete(self) -> list[Path]:
        """The checkpoints that can be resumed, oldest first."""
        return sorted(self.folder.glob("batch_*.ckpt"))

    @property
    def best(self) -> dict:
        """Name and held-out reward of the best checkpoint so far; empty before the first validation."""
        path = self.folder / "best.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # ---- Ctrl-C and failures ---------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.part"):  # of a process that was killed
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGINT, self._previous)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt):
            return
        last = self.complete[-1] if self.complete else "none"
        lines = [
            f"rank {trainer.global_rank} of {trainer.world_size} failed after {self.done} batches: "
            f"{type(exception).__name__}: {exception}",
            *lost_ranks(trainer),
            f"A lost connection or a timeout is another rank's failure, or its being slow. Last checkpoint: {last}",
        ]
        sys.stderr.write("\n" + "\n".join(lines) + "\n")
        sys.stderr.flush()
        if hasattr(trainer.strategy.launcher, "kill"):
            trainer.strategy.launcher.kill(signal.SIGKILL)  # they may hang in a collective

    def _interrupt(self, number: int, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
        if rank_zero_only.rank == 0:
            sys.stderr.write("\nCtrl-C: finishing this batch, then saving a checkpoint; press again to stop at once.\n")

    # ---- checkpoints -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        best = self.best
        if trainer.is_global_zero and best.get("batches", 0) > self.done:  # of a future that is about to change
            (self.folder / "best.json").unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        self.done = batch_idx + 1
        # a Ctrl-C during this very line counts for the next batch
        self.interrupted = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        moments = (self.every, trainer.num_training_batches, trainer.val_check_batch)
        if self.interrupted or any(self.done % moment == 0 for moment in moments if moment):
            self.save(trainer)
        trainer.should_stop = trainer.should_stop or self.interrupted

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of this moment, then remove those that are neither new nor best.

        Raises:
            OSError: it could not be written; earlier ones are as they were.
        """
        path = self.folder / f"batch_{self.done:06d}.ckpt"
        part = path.with_name(f"{path.name}.part")
        try:
            trainer.save_checkpoint(part)
        except (OSError, RuntimeError) as error:  # torch's writers have errors of their own
            raise OSError(f"checkpoint {path} could not be written: {error}; earlier ones are intact") from error
        if trainer.is_global_zero:
            replace(part, path)
            for old in self.complete[: -self.keep]:
                if old.name != self.best.get("checkpoint"):
                    trainer.strategy.remove_checkpoint(old)
            for logger in trainer.loggers:
                logger.save()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reward = trainer.callback_metrics.get("val/reward")
        path = self.folder / f"batch_{self.done:06d}.ckpt"
        if trainer.state.fn != "fit" or trainer.sanity_checking or reward is None or not trainer.is_global_zero:
            return
        if path.exists() and float(reward) > self.best.get("val/reward", -math.inf):
            best = {"checkpoint": path.name, "batches": self.done, "val/reward": float(reward)}
            write_text(self.folder / "best.json", json.dumps(best))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the policy, while all processes are there to give their parts of it."""
        if self.interrupted or self.policy_folder is None:
            return
        weights = full_state_dict(pl_module.policy)
        if trainer.is_global_zero:
            part = self.policy_folder.with_name(f"{self.policy_folder.name}.part")
            pl_module.policy.save(part, weights)
            replace(part, self.policy_folder)


def lost_ranks(trainer: Trainer, patience: float = 1.0) -> list[str]:
    """A sentence for each process that Lightning started from this one and that has ended, with its exit code."""
    lines = []
    for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), 1):
        try:
            code = process.wait(patience)  # its connections close a moment before it is gone
        except subprocess.TimeoutExpired:
            continue
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines.append(f"Local rank {rank} {how}.")
    return lines
