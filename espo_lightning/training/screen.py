"""What a user of the command lines sees while a program runs; `quiet` says what not."""

import sys
import time
from datetime import timedelta

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from espo_lightning.training.report import with_interval


def progress(noun: str, wanted: bool, callbacks: list[Callback]) -> list[Callback]:
    """What shows the progress: a bar on a terminal, lines elsewhere; a bar of the user's takes the place of the bar.

    Args:
        noun: what a batch is called.
        wanted: whether there is to be a bar.
        callbacks: the user's.
    """
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return [Validations(noun)]
    return [Bar(noun), Validations(noun)] if wanted and sys.stdout.isatty() else [Lines(noun), Validations(noun)]


class Bar(TQDMProgressBar):
    """A bar: "rollout 12 of 50" with the reward, and the time that is left."""

    BAR_FORMAT = "{desc} {n_fmt} of {total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"

    def __init__(self, noun: str):
        super().__init__()
        self.noun = noun

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.format_num = lambda n: str(round(n))
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *args: object) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description_str(epoch(trainer) + self.noun)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict:
        return {k: f"{v:.3f}" for k, v in trainer.progress_bar_metrics.items() if k != "updates"}


class Lines(Callback):
    """A line for the first and the last batch, and between them whenever ``every`` seconds have passed."""

    def __init__(self, noun: str, every: float = 10.0):
        self.noun, self.every = noun, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first, self.begun, self.shown = trainer.fit_loop.total_batch_idx, time.monotonic(), -1e9

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        now, total = time.monotonic(), trainer.num_training_batches
        if now - self.shown < self.every and batch_idx + 1 != total:
            return
        self.shown = now
        each = (now - self.begun) / (trainer.fit_loop.total_batch_idx - self.first)
        metrics = "  ".join(f"{k} {v:.3f}" for k, v in trainer.progress_bar_metrics.items() if k != "updates")
        left = timedelta(seconds=round(each * (total - batch_idx - 1)))
        pl_module.print(
            f"{epoch(trainer)}{self.noun} {batch_idx + 1} of {total}:  {metrics}  ({each:.1f} s each, {left} left)"
        )


class Validations(Callback):
    """Held-out results as they come."""

    def __init__(self, noun: str):
        self.noun = noun

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = getattr(pl_module, "rollouts", None)
        if trainer.sanity_checking or done is None or (trainer.state.fn != "fit" and done):
            return
        moment = f"after {self.noun} {done}" if done else "before training"
        pl_module.print(f"held-out {moment}:  {with_interval(pl_module.summary)}")


def epoch(trainer: Trainer) -> str:
    """Which epoch it is, if there are several."""
    several = trainer.max_epochs is not None and trainer.max_epochs != 1
    of = f" of {trainer.max_epochs}" if several and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of}, " if several else ""
