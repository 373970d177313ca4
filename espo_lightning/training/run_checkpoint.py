"""When a run saves: between training batches, before validations, at every end; and what it says when it fails."""

import json
import math
import signal
import sys
import time
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from espo_lightning.ranges import check_counts
from espo_lightning.training.report import read_metrics
from espo_lightning.training.run_folder import (
    Metrics,
    checkpoints_in,
    recover,
    recover_all,
    replace,
    rewind,
    write_text,
)
from espo_lightning.training.signals import Signals, Stopped
from espo_lightning.training.strategies import full_state_dict, gather, lost_ranks

RECORD = "espo_run"  # in a checkpoint: what `RunCheckpoint` knows of the run


class RunCheckpoint(Checkpoint):
    """Checkpoints between training batches, where nothing is half done, so that resume is exact.

    Lightning's own ModelCheckpoint counts optimizer steps and, on Ctrl-C, would save in the middle of a
    rollout's updates. Here a signal lets the batch finish, saves and stops; the second stops at once (`Signals`).
    One clock numbers the checkpoints: batches over all epochs. A checkpoint has its name only once it is complete:
    ``kill -9`` leaves the one before, and a ``.part``.

    There is one every so many batches, before every validation, and after the last batch, however training ends. A
    validation that was due at a checkpoint is made when training resumes from it.

    A process that raises says which it is, in which batch, and what can be resumed; then it takes the
    others down, which would wait for it in vain.

    Args:
        run_dir: gets ``checkpoints/batch_000010.ckpt`` and so on, files or folders, and ``policy/``, the final policy
            in Hugging Face form.
        every: batches between checkpoints.
        keep: how many to keep, the newest; and the best by ``val/reward``, which ``best.json`` names.
        signals: of the program; by default those of nobody.
        record: of the run, plain values that every checkpoint carries: the configuration and the like.
    """

    def __init__(
        self, run_dir: Path, every: int, keep: int = 2, signals: Signals | None = None, record: dict | None = None
    ):
        check_counts(1, checkpoint_every=every, keep_checkpoints=keep)
        self.run_dir, self.every, self.keep = run_dir, every, keep
        self.signals, self.record = signals or Signals(), record or {}
        self.done = 0  # batches, over all epochs
        self.saved: int | None = None  # of the newest checkpoint
        self.interrupted = False  # by a signal, which all processes have agreed on
        self.begun = self.policy_saved = False
        self.resumed: dict = {}  # the record in the checkpoint from which this run goes on
        self.start, self.seconds = time.perf_counter(), 0.0
        self._due = False  # a validation, right after this batch

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.run_dir / "checkpoints"

    @property
    def policy_folder(self) -> Path:
        """Where the final policy is."""
        return self.run_dir / "policy"

    @property
    def complete(self) -> list[Path]:
        """The checkpoints that can be resumed, oldest first."""
        return checkpoints_in(self.folder)

    @property
    def best(self) -> dict:
        """Name and held-out reward of the best checkpoint so far; empty before the first validation."""
        path = self.folder / "best.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # ---- signals and failures --------------------------------------------------------------------------

    def stopping(self, trainer: Trainer) -> bool:
        """Whether any process was told to stop; the same answer on all."""
        if trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False):
            self.interrupted = True
            self.signals.received = next(number for number in gather(self.signals.received) if number is not None)
        return self.interrupted

    def halt(self, trainer: Trainer) -> None:
        """End training after this batch, whatever must still be run, and without a validation, which a resume makes."""
        trainer.should_stop = True
        trainer.limit_val_batches = 0
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.signals.patient = False
        hang = self.signals.at_once or not isinstance(exception, Stopped)  # the others, in a collective
        if trainer.world_size == 1 or not hang:
            return
        if not isinstance(exception, Stopped):
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
            trainer.strategy.launcher.kill(signal.SIGKILL)

    # ---- resume ----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_dir = Path(trainer.strategy.broadcast(str(self.run_dir)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """What the record says at this moment; with the batch's metrics, which are logged only after the checkpoint."""
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k or k in ("rollout", "update")}
        row = {key: value for key, value in logged.items() if not key.startswith("val/")}
        now = {"seconds": self.elapsed, "validation_due": self._due, "row": row | {"epoch": trainer.current_epoch}}
        checkpoint[RECORD] = {**self.record, **now}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """A batch that was the last one is not, if there are to be more now."""
        self.resumed = checkpoint.get(RECORD, {})
        self.seconds = self.resumed.get("seconds", 0.0)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = progress["current"]["ready"] >= trainer.datamodule.batches

    @property
    def elapsed(self) -> float:
        """Seconds of training, over resumes."""
        return self.seconds + time.perf_counter() - self.start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(trainer, pl_module)
        self.signals.take()  # Lightning has put its own handler of SIGTERM in their place
        self.signals.patient = True
        if trainer.ckpt_path is not None:
            loader = trainer.train_dataloader  # whose state Lightning forgets where a schedule has asked for its length
            loader.position = trainer.fit_loop.epoch_loop.batch_progress.current.ready % loader.batches
            self._validate_if_due(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored; only now is the run folder touched."""
        self.begun, self.start = True, time.perf_counter()
        self.done = self.saved = trainer.fit_loop.total_batch_idx + 1
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            recover_all(self.folder)
            recover(self.policy_folder)
            if trainer.ckpt_path is not None:
                rewind(self.run_dir, self.done, getattr(pl_module, "rollouts", self.done))
                if "config" in self.record:
                    write_text(self.run_dir / "config.yaml", self.record["config"])
                log_lost_row(trainer, self.run_dir, self.resumed.get("row", {}))
        trainer.strategy.barrier("run folder")

    def _validate_if_due(self, trainer: Trainer) -> None:
        """The checkpoint is from before the validation of its batch, as the states of all callbacks are."""
        if self.resumed.get("validation_due") and trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    # ---- checkpoints -----------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        self.done = trainer.fit_loop.total_batch_idx + 1
        self._due = validation_due(trainer, self.done, batch_idx + 1)
        last = batch_idx + 1 == trainer.num_training_batches or 0 <= trainer.max_steps <= trainer.global_step
        stop = self.stopping(trainer)
        if stop or last or self._due or trainer.should_stop or self.done % self.every == 0:
            self.save(trainer)
            stop = stop or self.stopping(trainer)  # a signal that came meanwhile
        if stop:
            self.halt(trainer)

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
        self.saved = self.done
        if trainer.is_global_zero:
            replace(part, path)
            for old in self.complete[: -self.keep]:
                if old.name != self.best.get("checkpoint"):
                    trainer.strategy.remove_checkpoint(old)
            for logger in trainer.loggers:
                logger.save()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.take()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.saved != self.done:
            self._due = True  # by the clock on the wall, which nobody can foresee
            self.save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        """The checkpoint of this moment is there already, and a resume makes the whole validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.stopping(trainer):
            raise Stopped

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
        self.signals.patient = False
        self.seconds, self.start = self.elapsed, time.perf_counter()
        if not self.stopping(trainer):
            self.save_policy(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.begun:  # nothing was left to train, so that no training began or ended
            self.begin(trainer, pl_module)
            self.seconds, self.start = self.elapsed, time.perf_counter()
        if not self.interrupted and not self.policy_saved:
            self.save_policy(trainer, pl_module)

    def save_policy(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``policy/``."""
        weights = full_state_dict(pl_module.policy)
        if trainer.is_global_zero:
            part = self.policy_folder.with_name(f"{self.policy_folder.name}.part")
            pl_module.policy.save(part, weights)
            replace(part, self.policy_folder)
        self.policy_saved = True


def log_lost_row(trainer: Trainer, run_dir: Path, row: dict[str, float]) -> None:
    """Log the metrics of the last rollout, if the process was killed between its checkpoint and its row."""
    done = row.get("rollout")
    if done is not None and not any(r["rollout"] == done and "train/reward" in r for r in read_metrics(run_dir)):
        for logger in trainer.loggers:
            if isinstance(logger, Metrics):
                logger.log_metrics(row, step=int(row["update"]))


def validation_due(trainer: Trainer, done: int, in_epoch: int) -> bool:
    """Whether Lightning is about to validate after this batch, by the count of batches."""
    interval, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or interval is None or math.isinf(interval):
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    return (done if epochs is None else in_epoch) % interval == 0
