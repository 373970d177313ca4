"""Which of Lightning's Trainer flags mean something else here, and what to use instead.

docs/trainer_flags.md says of every flag what it does; a test compares the two, flag by flag, with the signature of
Trainer.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

# refused, unless left as they are: flag -> what to use here
REFUSED = {
    "barebones": "benchmarks/ times a step without anything around it",
    "default_root_dir": "a run writes into --run_dir, all of it",
    "enable_checkpointing": "a run always leaves something to resume; --checkpoint_every=N makes checkpoints rare",
    "fast_dev_run": "use --data.batches=1, with --data.eval_problems=8 and a --run_dir to throw away",
    "limit_predict_batches": "nothing is predicted; python -m espo_lightning.evaluate decodes problems",
    "limit_test_batches": "nothing is tested; python -m espo_lightning.evaluate decodes problems of the test split",
    "limit_train_batches": "use --data.batches=N",
    "model_registry": "upload RUN/policy, a Hugging Face folder",
    "overfit_batches": "--data.batches=N with --trainer.max_epochs=M goes over the same N batches M times",
    "reload_dataloaders_every_n_epochs": "a batch depends on --seed and its index only: there is nothing to reload",
}
MANUAL = {  # where updates are made by the module itself
    "accumulate_grad_batches": "a rollout is one batch; --model.micro_batch=N splits it into passes that add up",
    "gradient_clip_algorithm": "gradients are clipped by their global norm, --model.max_grad_norm=X",
    "gradient_clip_val": "use --model.max_grad_norm=X",
}
UNVALIDATED = {  # where there is no validation
    "limit_val_batches": "supervised training does not validate; python -m espo_lightning.evaluate decodes problems",
    "val_check_interval": "supervised training does not validate; --checkpoint_every=N says when it saves",
    "check_val_every_n_epoch": "supervised training does not validate; --checkpoint_every=N says when it saves",
    "num_sanity_val_steps": "supervised training does not validate",
}
PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")
OTHER_PRECISIONS = "gradients are not scaled, and the type of the weights themselves is --model.policy.dtype"
STRATEGIES = ("spawn", "fork", "notebook")  # in their names
CALLBACKS = {
    BackboneFinetuning: "a policy has no backbone apart; --model.policy.lora.rank=R trains adapters on a frozen policy",
    BatchSizeFinder: "sizes are --data.batch_size, --model.group_size and, in memory, --model.micro_batch",
    GradientAccumulationScheduler: MANUAL["accumulate_grad_batches"],
    LearningRateFinder: "it takes optimizer steps of its own; try several --model.optimizer.lr with --data.batches=10",
    ModelPruning: "it replaces weights by masked ones of other names, which no checkpoint here can hold",
    OnExceptionCheckpoint: "it saves in the middle of a rollout; the run's own checkpoints are between two of them",
    StochasticWeightAveraging: "it counts epochs; EMAWeightAveraging and WeightAveraging count steps",
}


EVERYTHING = {  # values that say no more than the default
    "enable_checkpointing": True,
    "limit_predict_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_train_batches": 1.0,
}


def check_flags(given: Mapping[str, Any], defaults: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Refuse what would do nothing, or something else than its name says.

    Args:
        given: the values of ``--trainer``.
        defaults: those where nobody says anything.
        refused: flag -> what to use here.

    Raises:
        ValueError: naming the flag, and what to use.
    """
    for name, advice in refused.items():
        value = given[name]
        if value != defaults[name] and (type(value), value) != (type(EVERYTHING.get(name)), EVERYTHING.get(name)):
            raise ValueError(f"trainer.{name}={value} is not possible here: {advice}")
    strategy = given["strategy"]
    if isinstance(strategy, str) and any(part in strategy for part in STRATEGIES):
        raise ValueError(
            f"trainer.strategy={strategy} is not possible here: its processes would receive the policy from the first "
            f"one; trainer.strategy={strategy.split('_')[0]} starts processes that make it themselves"
        )
    if (precision := given["precision"]) is not None and str(precision) not in PRECISIONS:
        raise ValueError(f"trainer.precision must be 32-true or bf16-mixed, got {precision}: {OTHER_PRECISIONS}")
    if (given["max_epochs"] is not None and given["max_epochs"] < -1) or given["max_epochs"] == 0:
        raise ValueError(f"trainer.max_epochs must be at least 1, or -1 without a limit, got {given['max_epochs']}")
    if not given["val_check_interval"] and given["val_check_interval"] is not None:
        raise ValueError("trainer.val_check_interval=0 is not possible here: --trainer.limit_val_batches=0 is")


def check_callbacks(callbacks: list[Callback], strategy: Strategy) -> None:
    """Raise ValueError for a callback that cannot work with rollouts, with what to use."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} copies the policy: use trainer.strategy=ddp"
            )
        for kind, advice in CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: {type(callback).__name__} is not possible here: {advice}")


def save_dir_is_optional() -> None:
    """Let ``--trainer.logger=TensorBoardLogger`` do without a ``save_dir``, which is the run folder, as W&B's does."""
    for logger in (TensorBoardLogger, CSVLogger):
        if signature(logger).parameters["save_dir"].default is signature(logger).empty:
            logger.__init__.__defaults__ = (".", *logger.__init__.__defaults__)
