"""Run folders: checkpoints between batches, Ctrl-C, sample completions."""

import json
import signal
import sys
import threading
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

RESUME = "python -m {command} --config {folder}/config.yaml --ckpt_path {checkpoint}"


class RunCheckpoint(Checkpoint):
    """Checkpoints between training batches, where nothing is half done, so that resume is exact.

    Lightning's own ModelCheckpoint counts optimizer steps and, on Ctrl-C, would save in the middle of a
    rollout's updates. Here the first Ctrl-C finishes the batch, saves and stops; the second stops at once.

    Args:
        folder: where to write ``batch_000010.ckpt`` and so on.
        every: batches between checkpoints.
        keep: how many to keep, the newest.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"checkpoint_every and keep must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep = folder, every, keep
        self.latest: Path | None = None
        self.interrupted = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def _interrupt(self, number: int, frame) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)
        if rank_zero_only.rank == 0:
            sys.stderr.write("\nCtrl-C: finishing this batch, then saving a checkpoint; press again to stop at once.\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        done = batch_idx + 1
        stop = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)  # ranks agree
        if stop or done % self.every == 0 or done == trainer.num_training_batches:
            self.save(trainer, done)
        trainer.should_stop = trainer.should_stop or stop
        self.interrupted = stop

    def save(self, trainer: Trainer, batches: int) -> None:
        """Write the checkpoint of this moment, then remove the oldest ones."""
        folder = Path(trainer.strategy.broadcast(str(self.folder)))
        self.latest = folder / f"batch_{batches:06d}.ckpt"
        trainer.save_checkpoint(self.latest)
        if trainer.is_global_zero:
            for old in sorted(folder.glob("batch_*.ckpt"))[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)


class SampleLog(Callback):
    """Writes sample completions with their verdicts to a JSONL file, and shows a few now and then.

    Args:
        path: the file; lines are appended.
        count: completions per rollout.
        show_every: rollouts between two tables on the screen; 0 = never.
    """

    def __init__(self, path: Path, count: int = 8, show_every: int = 20):
        self.path, self.count, self.show_every = path, count, show_every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        rollout = pl_module.last_rollout
        group = len(rollout.texts) // len(batch)
        rows = [
            {"rollout": pl_module.rollouts, "prompt": batch[i // group].prompt, "completion": text, "verdict": verdict}
            for i, (text, verdict) in enumerate(zip(rollout.texts[: self.count], rollout.verdicts))
        ]
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.show_every and batch_idx % self.show_every == 0:
            shown = [(r["verdict"]["reward"], *(_line(r[k]) for k in ("prompt", "completion"))) for r in rows[:4]]
            table = [f"  {reward:6.2f}  {prompt:<40}  {completion}" for reward, prompt, completion in shown]
            pl_module.print("\n".join([f"rollout {pl_module.rollouts}: reward, prompt, completion", *table]))


def _line(text, width: int = 40) -> str:
    text = " ".join((text if isinstance(text, str) else text[-1]["content"]).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
