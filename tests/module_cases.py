"""What the tests of the training module share."""

from conftest import fit, parameters
from lightning.pytorch import Callback


class Record(Callback):
    """Keeps the metrics of every rollout, and a copy of the parameters before it."""

    def __init__(self):
        self.metrics, self.before, self.rollouts = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append(parameters(module).clone())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.rollouts.append(module.last_rollout)


def run(module, batches: int = 2, **settings) -> Record:
    record = Record()
    fit(module, batches, callbacks=[record], **settings)
    return record
