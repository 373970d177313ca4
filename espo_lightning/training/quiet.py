"""What users of the command lines do not see: remarks of other packages that they can do nothing about."""

import logging
import os
import sys
import warnings

HIDDEN = (  # of what Lightning says by the way
    "GPU available",
    "TPU available",
    "HPU available",
    "GPU available but not used",
    "`Trainer.fit` stopped",
    "`Trainer(",
    "💡 Tip",
    "Restor",
    "Loaded model weights",
    "Detected KeyboardInterrupt",
    "LOCAL_RANK",
    "Initializing distributed",
    "-----",
    "`weights_only`",
    "distributed_backend",
    "All distributed processes registered",
    "You are using",
    "Loading `",
)


def quiet() -> None:
    """Hide what a user of the command lines can do nothing about, and nothing else. It imports nothing."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if _heard not in handler.filters:
                handler.addFilter(_heard)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of writing one file; transformers reads it, too
    if (transformers := sys.modules.get("transformers")) is not None:  # it has read it
        transformers.utils.logging.disable_progress_bar()
    for message in (
        "LightningCLI's args parameter",  # main(argv) is how the tests and notebooks call it
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"Found \d+ module\(s\) in eval mode",  # on purpose: there is no dropout, and no difference
        "Experiment logs directory",  # the run folder was made, and older metrics moved, by this command line
        r"(?s).*deprecated in v4\.\d+",  # of jsonargparse, by Lightning
        "You're using the WeightAveraging callback with a model that overrides",  # which shards where that is refused
        "`is_gradient_checkpointing` is deprecated",  # peft's word
        "You passed in a `val_dataloader` but have no `validation_step`",  # sft does not validate
    ):
        warnings.filterwarnings("ignore", message=message)


def _heard(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not record.getMessage().strip().startswith(HIDDEN)
