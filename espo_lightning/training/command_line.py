"""Command lines: from a typed function to a program whose errors are one message and exit code 2."""

import atexit
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from espo_lightning.tasks.verifiers import BrokenVerifier
from espo_lightning.training.checkpoints import DirectCheckpointIO, RunCheckpoint, check_space
from espo_lightning.training.data_check import check_data
from espo_lightning.training.moved import with_advice
from espo_lightning.training.run_folder import RESUME
from espo_lightning.training.strategies import check, check_resume, named

BAD_INPUT = (ValueError, OSError)  # what constructors and loaders raise when an argument is wrong


def run(function: Callable, command: str, argv: list[str] | None, defaults: dict[str, Any] | None = None) -> Any:
    """Parse ``argv`` into the arguments of ``function``, build the objects among them, and call it.

    Args:
        function: typed and documented; its parameters become the flags. A parameter ``settings`` gets all
            parsed values as a plain dictionary instead.
        command: what the user typed, for the usage line.
        defaults: of parameters whose default cannot stand in the signature.
    """
    usage = f"python -m {command} [--config FILE] [--KEY=VALUE ...]"
    parser = with_advice(ArgumentParser(prog=f"python -m {command}", usage=usage))
    parser.add_argument("--config", action="config", help="a YAML file of these arguments; may be repeated")
    parser.add_function_arguments(function, skip={"settings"})
    parser.set_defaults(defaults or {})
    config = parser.parse_args(argv)
    config.pop("config")
    try:
        arguments = vars(parser.instantiate(config))
        if "settings" in signature(function).parameters:
            arguments["settings"] = json.loads(parser.dump(config, format="json", skip_unset=False))
        return function(**arguments)
    except BAD_INPUT as error:
        parser.error(str(error))


def quiet() -> None:
    """Hide what a user of the command lines can do nothing about, and nothing else."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices found, tips, "max_epochs reached"
    transformers.utils.logging.disable_progress_bar()  # of writing one file
    for message in (
        "LightningCLI's args parameter",  # main(argv) is how the tests and notebooks call it
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
        r"Found \d+ module\(s\) in eval mode",  # on purpose: there is no dropout, and no difference
        "Experiment logs directory",  # the run folder was made, and older metrics moved, by this command line
        r"(?s).*deprecated in v4\.\d+",  # of jsonargparse, by Lightning
    ):
        warnings.filterwarnings("ignore", message=message)


def _leave() -> None:
    """Leave the other processes in good order: gloo's threads may abort an interpreter that ends without."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainingCLI(LightningCLI):
    """LightningCLI without subcommands, with a seed and a run folder, for `fit` and `sft`.

    Top-level arguments: ``seed`` (of everything; no global generator is touched), ``run_dir``,
    ``checkpoint_every``, ``keep_checkpoints``, ``ckpt_path``, ``timeout``. ``trainer.strategy`` knows ``fsdp2``, too,
    and ``deepspeed`` is that of this library.
    """

    SPLITS = ("train",)  # of the task that the program uses

    def __init__(self, module_class, data_class, argv, *, command: str, defaults: dict, trainer_defaults: dict):
        self.command, self.defaults = command, defaults
        quiet()
        atexit.register(_leave)
        super().__init__(
            module_class,
            data_class,
            args=argv,
            run=False,
            seed_everything_default=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"python -m {command}",
                "usage": f"python -m {command} [--config FILE] [--trainer.K=VALUE] [--model.K=VALUE] [--data.K=VALUE]",
            },
            trainer_defaults={
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "accelerator": "auto",
                "enable_model_summary": False,
                "inference_mode": False,  # FSDP2's weights are updated in place, which inference tensors forbid
                **trainer_defaults,
            },
        )

    def init_parser(self, **kwargs: Any):
        return with_advice(super().init_parser(**kwargs))

    def add_arguments_to_parser(self, parser) -> None:
        parser.add_argument("--seed", type=int, default=0, help="of weights, problems, rollouts and masks")
        parser.add_argument(
            "--run_dir", type=str, default=None, help="where everything is written (default: runs/TIME)"
        )
        parser.add_argument("--checkpoint_every", type=int, default=10, help="training batches between checkpoints")
        parser.add_argument(
            "--keep_checkpoints", type=int, default=2, help="the newest so many, and the best, are kept"
        )
        parser.add_argument(
            "--ckpt_path", type=str, default=None, help="resume from this checkpoint, in its run folder"
        )
        parser.add_argument(
            "--timeout", type=float, default=1800, help="seconds that a process waits for the others before all fail"
        )
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.set_defaults(self.defaults)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, refuse to write into somebody's results, and let loggers write into it."""
        config = self.config
        if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
            self.parser.error(f"ckpt_path {config.ckpt_path} does not exist")
        resumed = None if config.ckpt_path is None else str(Path(config.ckpt_path).resolve().parents[1])
        # processes that Lightning starts inherit the choice of the first one
        inherited = os.environ.get("ESPO_RUN_DIR") if rank_zero_only.rank else None
        chosen = config.run_dir or resumed or inherited or time.strftime("runs/%Y%m%d-%H%M%S")
        os.environ["ESPO_RUN_DIR"] = chosen
        self.run_dir = Path(chosen)
        if resumed is None and rank_zero_only.rank == 0 and self.run_dir.is_dir() and any(self.run_dir.iterdir()):
            self.parser.error(
                f"run_dir {self.run_dir} exists and is not empty: name another, remove it, or resume with --ckpt_path"
            )
        repeatable = config.clone()  # what the run folder keeps works as --config of another run
        repeatable.run_dir = repeatable.ckpt_path = repeatable.config = None
        self.saved_config = self.parser.dump(repeatable, skip_unset=False)
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            arguments = getattr(logger, "init_args", None)
            if arguments is not None and arguments.get("save_dir", "") in (None, "."):
                arguments.save_dir = str(self.run_dir)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (*BAD_INPUT, MisconfigurationException, ModuleNotFoundError) as error:
            self.parser.error(str(error))

    def instantiate_trainer(self, **kwargs):
        """Lightning's trainer, with the run folder's CSV logger and checkpoints."""
        config, plugins = self.config_init.trainer, self.config_init.trainer.plugins or []
        loggers = config.logger if isinstance(config.logger, list) else [config.logger]
        keep = self.config.keep_checkpoints
        folders = {"folder": self.run_dir / "checkpoints", "policy_folder": self.run_dir / "policy"}
        self.checkpoint = RunCheckpoint(every=self.config.checkpoint_every, keep=keep, **folders)
        trainer = super().instantiate_trainer(
            strategy=named(config.strategy),
            plugins=[*(plugins if isinstance(plugins, list) else [plugins]), DirectCheckpointIO()],
            logger=[
                *(x for x in loggers if isinstance(x, Logger)),
                CSVLogger(self.run_dir, name="", version="", flush_logs_every_n_steps=1),
            ],
            default_root_dir=self.run_dir,
            callbacks=[*(config.callbacks or []), *self.extra_callbacks(), self.checkpoint],
            **kwargs,
        )
        self.check(trainer)
        if rank_zero_only.rank == 0:
            check_space(self.run_dir, self.model, keep + 2)  # the best, and the one being written
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
            earlier = self.run_dir / "metrics.csv"
            if earlier.exists():  # CSVLogger would delete it
                earlier.rename(self.run_dir / f"metrics.{len(list(self.run_dir.glob('metrics.*.csv'))):03d}.csv")
            (self.run_dir / "config.yaml").write_text(self.saved_config)
        return trainer

    def check(self, trainer) -> None:
        """Refuse what cannot work with these processes, and set how long they wait for one another."""
        check(trainer.strategy, self.model.policy)
        if self.config.ckpt_path is not None:
            check_resume(trainer.strategy, Path(self.config.ckpt_path))
        for name in ("batch_size", "eval_batch_size"):
            if (size := getattr(self.datamodule, name)) % trainer.world_size:
                raise ValueError(f"data.{name} {size} is not a multiple of the {trainer.world_size} processes")
        if self.config.timeout <= 0:
            raise ValueError(f"timeout must be positive, got {self.config.timeout}")
        check_data(
            self.datamodule.task,
            self.model.policy,
            self.SPLITS,
            seed=self.datamodule.seed,
            max_prompt_length=self.model.max_prompt_length,
            answer_length=getattr(self.model, "length", None),  # of supervised training
        )
        if hasattr(trainer.strategy, "_timeout"):  # Lightning has no other way for strategies that it chose itself
            trainer.strategy._timeout = timedelta(seconds=self.config.timeout)

    def extra_callbacks(self) -> list[Callback]:
        """Callbacks of a subclass."""
        return []

    def fit(self) -> None:
        """Train; after Ctrl-C, say how to resume and exit with 130; with 2 if no verifier ever worked."""
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        except BrokenVerifier as error:
            self.parser.error(str(error))
        if self.checkpoint.interrupted:
            command = RESUME.format(command=self.command, folder=self.run_dir, checkpoint=self.checkpoint.complete[-1])
            self.finish([f"stopped; resume with\n  {command}"])
            # another code than 0 from a process that Lightning started would have all others killed
            raise SystemExit(130 if self.trainer.is_global_zero else 0)

    def finish(self, lines: list[str]) -> None:
        """Show closing lines on the first process."""
        if self.trainer.is_global_zero:
            sys.stdout.write("\n".join(lines) + "\n")
