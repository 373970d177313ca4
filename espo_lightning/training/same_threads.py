"""The number of threads of `threads.py`, in every process that a trainer starts."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Threads(Callback):
    """Gives every process of a trainer the same number of threads, once the processes are there: Lightning shares the
    cores among those that it starts, whatever there is to compute.
    """

    def __init__(self, number: int):
        self.number = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.set_num_threads(trainer.strategy.broadcast(self.number))
