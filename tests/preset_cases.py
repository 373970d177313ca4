"""Training runs of the presets of all methods."""

import warnings
from functools import partial

import pytest
import torch
from conftest import fit, parameters, small_module, small_policy
from lightning.pytorch import Callback
from two_processes import METHODS

SGD = {"optimizer": partial(torch.optim.SGD, lr=2.0)}
EACH = pytest.mark.parametrize("name", METHODS)


class Metrics(Callback):
    def __init__(self):
        self.rows, self.rollouts = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.rollouts.append(module.last_rollout)


def train(batches: int = 2, task=None, **settings) -> tuple[torch.Tensor, Metrics]:
    """Final parameters and metrics of some rollouts with four completions of padded prompts."""
    policy = settings.pop("policy", small_policy)()
    module, metrics = small_module(policy, **SGD | settings), Metrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the gradient is NaN or infinite")
        fit(module, batches, task=task, callbacks=[metrics])
    return parameters(module), metrics


def first_only(prompt: str, text: str, seen: list) -> dict[str, float]:
    seen.append(text)
    return {"reward": float(len(seen) % 2) if len(seen) <= 8 else 0.0, "exact": 0.0}
