"""A callback that sends this process a signal at a moment of its run."""

import os
import signal

from lightning.pytorch import Callback

from espo_lightning import fit
from espo_lightning.training.signals import Signals


class SignalAt(Callback):
    """Sends a signal, once or several times, at a moment.

    Args:
        moment: "before", "batch", "saving", "validation", "epoch end" or "after".
        batch: how many batches are done by then.
        number: which signal.
        times: how often.
        rank: of the process.
    """

    def __init__(self, moment: str, batch: int = 0, number: int = int(signal.SIGINT), times: int = 1, rank: int = 0):
        self.moment, self.batch, self.number, self.times, self.rank = moment, batch, number, times, rank

    def at(self, moment: str, trainer) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if self.moment == moment and done == self.batch and self.times and trainer.global_rank == self.rank:
            times, self.times = self.times, 0
            for _ in range(times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, *_) -> None:
        self.at("batch", trainer)

    def on_save_checkpoint(self, trainer, *_) -> None:
        self.at("saving", trainer)

    def on_train_epoch_end(self, trainer, *_) -> None:
        self.at("epoch end", trainer)

    def on_validation_batch_start(self, trainer, *_) -> None:
        during = {"fit": "validation", "validate": "after" if trainer.global_step else "before"}
        self.at(during[trainer.state.fn], trainer)


def life(begun, arguments: list[str]) -> None:
    """A training program in a process of its own, which tells when it listens to signals."""
    take = Signals.take

    def listening(signals: Signals) -> None:
        take(signals)
        begun.set()

    Signals.take = listening
    fit.main(arguments)
