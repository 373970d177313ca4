"""`TrainingCLI`: what `fit` and `sft` have in common, from their arguments to their last line."""

import atexit
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from espo_lightning.ranges import check_numbers
from espo_lightning.training import resume
from espo_lightning.training.checkpoints import DirectCheckpointIO, check_space
from espo_lightning.training.command_line import BAD_INPUT, as_list, helpful, option, publish, spelt_out
from espo_lightning.training.data import unknown_tokens
from espo_lightning.training.data_check import check_data
from espo_lightning.training.quiet import quiet
from espo_lightning.training.run_checkpoint import RECORD, RunCheckpoint
from espo_lightning.training.run_folder import Claim, Metrics, lock, recover, resume_command, run_of
from espo_lightning.training.same_threads import Threads
from espo_lightning.training.screen import progress
from espo_lightning.training.signals import Stopped
from espo_lightning.training.strategies import check, check_resume, named
from espo_lightning.training.threads import choose_threads, counted
from espo_lightning.training.trackio_logger import TrackioLogger  # noqa: F401, for --trainer.logger=TrackioLogger
from espo_lightning.training.trainer_flags import REFUSED, check_callbacks, check_flags, save_dir_is_optional

USAGE = "python -m {} [--config FILE] [--trainer.K=VALUE] [--model.K=VALUE] [--data.K=VALUE]"


def _leave() -> None:
    """Leave the other processes in good order: gloo's threads may abort an interpreter that ends without."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainingCLI(LightningCLI):
    """LightningCLI without subcommands, with a seed and a run folder, for `fit` and `sft`.

    Top-level arguments: ``seed`` (of everything; no global generator is touched), ``run_dir``,
    ``checkpoint_every``, ``keep_checkpoints``, ``ckpt_path``, ``timeout``, ``threads``. ``trainer.strategy`` knows
    ``fsdp2``, too, and ``deepspeed`` is that of this library. With ``ckpt_path``, the settings of its run stand where
    no other is given.
    """

    noun = "batch"
    refused = REFUSED
    splits = ("train",)  # of the task that the program uses

    def __init__(
        self, module_class, data_class, argv, signals, *, command: str, defaults: dict, trainer_defaults: dict
    ):
        self.command, self.defaults, self.signals = command, defaults, signals
        self.claim: Claim | None = None
        self.lock: int | None = None  # a descriptor; what is open is held
        self.content: dict = {}  # of the checkpoint from which to go on
        self.changes: resume.Changes = {}
        publish()
        quiet()
        save_dir_is_optional()
        atexit.register(_leave)
        try:
            super().__init__(
                module_class,
                data_class,
                args=sys.argv[1:] if argv is None else argv,
                run=False,
                seed_everything_default=False,
                save_config_callback=None,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": f"python -m {command}", "usage": USAGE.format(command)},
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
        except BaseException:  # refused, or stopped
            self.close()
            if self.claim is not None:
                self.claim.release()
            raise

    def init_parser(self, **kwargs):
        parser = helpful(super().init_parser(**kwargs))
        refuse = parser.error

        def error(*message):
            if self.signals.at_once:  # a library has made an error of it
                raise Stopped
            return refuse(*message)

        parser.error = error
        return parser

    def add_arguments_to_parser(self, parser) -> None:
        add = parser.add_argument
        help_of_path = "resume from this checkpoint, with its run's settings and in its folder"
        add("--seed", type=int, default=0, help="of weights, problems, rollouts and masks")
        add("--run_dir", type=str, default=None, help="where everything is written (default: runs/TIME)")
        add("--checkpoint_every", type=int, default=10, help="training batches between checkpoints")
        add("--keep_checkpoints", type=int, default=2, help="the newest so many, and the best, are kept")
        add("--ckpt_path", type=str, default=None, help=help_of_path)
        add("--timeout", type=float, default=1800, help="seconds that a process waits for the others before all fail")
        help_of_threads = "of a CPU that each process computes with (default: by OMP_NUM_THREADS, or the policy's size)"
        add("--threads", type=int | None, default=None, help=help_of_threads)
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.set_defaults(self.defaults)

    # ---- arguments -------------------------------------------------------------------------------------

    def parse_arguments(self, parser, args) -> None:
        """As LightningCLI does, on top of the settings of the run that is to go on."""
        argv = spelt_out(args)
        if (path := option(argv, "ckpt_path")) not in (None, "null"):
            try:
                stored = self._stored(parser, Path(path))
            except BAD_INPUT as error:
                parser.error(str(error))
            argv = ["--config", stored, *argv]
        super().parse_arguments(parser, argv)
        if self.config.seed_everything is not False:
            parser.error("seed_everything would seed global generators, from which nothing here draws: use --seed")
        if path is None and self.config.ckpt_path is not None:
            parser.error("give --ckpt_path on the command line, as the settings of its run come with it")

    def _stored(self, parser, checkpoint: Path) -> str:
        """The settings of a checkpoint's run, as YAML; what else it says is kept in ``content``."""
        recover(checkpoint)  # a kill may have caught it aside
        if not checkpoint.exists():
            raise ValueError(f"ckpt_path {checkpoint} does not exist")
        self.content = resume.header(checkpoint)
        stored = resume.settings_of(checkpoint, self.content, self.command)
        parser.exit_on_error = False
        try:
            self.before = parser.dump(parser.parse_string(stored), skip_unset=False)
        except Exception as error:  # jsonargparse has many
            reason = " ".join(str(error).split())
            raise ValueError(
                f"ckpt_path {checkpoint} was made by another version of this library, with settings that this one does "
                f"not have ({reason[:200]}): resume it with that version"
            ) from error
        finally:
            parser.exit_on_error = True
        return stored

    def before_instantiate_classes(self) -> None:
        """Check the flags, choose the run folder, refuse somebody else's, and let loggers write into it."""
        config, trainer = self.config, self.config.trainer
        if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is None:
            trainer.check_val_every_n_epoch = 1  # a share of an epoch
        if config.data.eval_problems == 0:
            trainer.limit_val_batches = 0
        repeatable = config.clone()  # what the run folder keeps works as --config of another run
        repeatable.run_dir = repeatable.ckpt_path = repeatable.config = None
        try:
            self.saved_config = self.parser.dump(repeatable, skip_unset=False)
            self.settings = yaml.safe_load(self.saved_config)
            check_flags(trainer, self.parser.get_defaults().trainer, self.refused)
            if config.ckpt_path is not None:
                self.changes = resume.changes(resume.as_settings(self.before), resume.as_settings(self.saved_config))
                resume.refuse_fixed(self.changes, Path(config.ckpt_path))
            self.run_dir = self._choose_folder()
        except BAD_INPUT as error:
            self.parser.error(str(error))
        os.environ["ESPO_RUN_DIR"] = str(self.run_dir)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            arguments = getattr(logger, "init_args", None)
            if arguments is not None and arguments.get("save_dir", "") in (None, ".", "./mlruns"):
                arguments.save_dir = str(self.run_dir)

    def _choose_folder(self) -> Path:
        """That of the run which goes on, if the checkpoint lies in it and no other is named; else one of its own."""
        named, checkpoint = self.config.run_dir, self.config.ckpt_path
        own = run_of(Path(checkpoint)) if checkpoint else None
        if own is not None and (named is None or Path(named).resolve() == own.resolve()):
            there = resume.changes(
                resume.as_settings((own / "config.yaml").read_text()), resume.as_settings(self.before)
            )
            try:
                resume.refuse_fixed(there, Path(checkpoint))
            except ValueError as error:
                raise ValueError(f"run_dir {own} is another run's: {error}, with a --run_dir of its own") from None
            self.lock = None if rank_zero_only.rank else lock(own)
            return own
        # processes that Lightning starts inherit the choice of the first one
        if rank_zero_only.rank:
            return Path(named or os.environ.get("ESPO_RUN_DIR", "runs"))
        self.claim = Claim(named, self.saved_config)
        self.lock = lock(self.claim.folder)
        return self.claim.folder

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (*BAD_INPUT, MisconfigurationException, ModuleNotFoundError) as error:
            self.parser.error(str(error))
        except TypeError as error:
            if "`devices`" not in str(error):  # Lightning's word on -1 of a CPU
                raise
            self.parser.error(f"trainer.devices: {error}")

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Lightning's trainer, with the run folder's CSV logger and checkpoints."""
        config, own = self.config_init.trainer, self.config
        callbacks, plugins, loggers = map(as_list, (config.callbacks, config.plugins, config.logger))
        if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            raise ValueError("trainer.plugins: checkpoints are written by DirectCheckpointIO: leave the plugin out")
        before = self.content.get(RECORD, {})
        self.record = {"command": self.command, "config": self.saved_config, "before": self._before(before)}
        self.record["history"] = before.get("history", [])
        if own.ckpt_path is not None:
            done = self.content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
            if 0 < (planned := self.datamodule.batches * (config.max_epochs or 1)) < done:
                raise ValueError(f"data.batches: {planned} batches altogether, of which {done} are done already")
        self.checkpoint = RunCheckpoint(
            self.run_dir, own.checkpoint_every, own.keep_checkpoints, self.signals, self.record
        )
        shown = progress(self.noun, config.enable_progress_bar is not False, callbacks)
        bars = any(isinstance(callback, ProgressBar) for callback in [*shown, *callbacks])
        trainer = super().instantiate_trainer(
            strategy=named(config.strategy),
            plugins=[*plugins, DirectCheckpointIO()],
            logger=[*(x for x in loggers if isinstance(x, Logger)), Metrics(self.run_dir)],
            default_root_dir=self.run_dir,
            callbacks=[self.checkpoint, *callbacks, *self.extra_callbacks(), *shown, resume.Renewal(self.changes)],
            enable_progress_bar=bars and config.enable_progress_bar is not False,
            enable_autolog_hparams=False,  # this command line logs them once it is sure to train
            **kwargs,
        )
        check_callbacks(callbacks, trainer.strategy)
        self.check(trainer)
        if trainer.strategy.root_device.type == "cpu":
            self._take_threads(trainer, before.get("threads"))
        if own.ckpt_path is not None:
            self.record["history"] = resume.history(before, Path(own.ckpt_path), done, self.changes)
        self.content = {}  # maps a file that may be removed soon
        if rank_zero_only.rank == 0:
            check_space(self.run_dir, self.model, own.keep_checkpoints + 2)  # the best, and the one being written
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
        return trainer

    def _before(self, record: dict) -> dict | None:
        """What was measured before the run began, if it is what would be measured now."""
        return None if resume.matching(self.changes, resume.EVALUATION) else record.get("before")

    def check(self, trainer: Trainer) -> None:
        """Refuse what cannot work with these processes, and set how long they wait for one another."""
        check(trainer.strategy, self.model.policy)
        if self.config.ckpt_path is not None:
            check_resume(trainer.strategy, Path(self.config.ckpt_path))
            resume.check_weights(Path(self.config.ckpt_path), self.content, self.model)
        self.datamodule.check(trainer.world_size, evaluates=bool(trainer.limit_val_batches))
        check_numbers("(0, 1e9]", timeout=self.config.timeout)
        data, model = self.datamodule, self.model
        answers = getattr(model, "length", None)  # of supervised training
        limits = {"max_prompt_length": model.max_prompt_length, "answer_length": answers}
        check_data(data.task, model.policy, self.splits, seed=data.seed, **limits)
        first = [data.task.problem("train", data.seed, i) for i in range(min(8, data.batch_size))]
        for sentence in unknown_tokens(self.model.policy, first):
            rank_zero_warn(sentence)
        if hasattr(trainer.strategy, "_timeout"):  # Lightning has no other way for strategies that it chose itself
            trainer.strategy._timeout = timedelta(seconds=self.config.timeout)

    def _take_threads(self, trainer: Trainer, earlier: int | None) -> None:
        """Choose the number of threads, keep it in the record, and say so where it is another than before."""
        number = choose_threads(self.config.threads, self.model.policy, trainer.num_devices, earlier)
        if earlier is not None:
            self.changes.pop("threads", None)  # which says what was asked for, not what there was
            if earlier != number:
                self.changes["threads"] = earlier, number
        self.record["threads"] = number
        trainer.callbacks.insert(0, Threads(number))

    def extra_callbacks(self) -> list[Callback]:
        """Callbacks of a subclass."""
        return []

    def announce(self, *lines: str) -> None:
        """Say what is about to begin, on the screen and, with all settings, to the loggers."""
        number = self.record.get("threads")
        computing = [f"computing with {counted(number)} of the CPU (--threads=N for another number)"] if number else []
        earlier = self.changes.get("threads", (None,))[0]
        if earlier is not None:
            computing = [f"{computing[0]}; it was {earlier} so far, so that sums may round differently from here on"]
        self.show(f"writing to {self.run_dir}", *lines, *computing)
        if self.config.trainer.enable_autolog_hparams:
            for logger in self.trainer.loggers:
                if not isinstance(logger, Metrics):  # beside which config.yaml stands
                    logger.log_hyperparams(self.settings)

    def fit(self) -> None:
        """Train. Raises Stopped if a signal came."""
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        if self.checkpoint.interrupted:
            raise Stopped

    def left_behind(self) -> str:
        """What there is of a run that did not finish, and how to go on."""
        if complete := self.checkpoint.complete:
            return f"resume with\n  {resume_command(self.command, complete[-1])}"
        if self.claim is not None and self.claim.release():
            return "nothing was made yet, and nothing is left"
        return f"there is no checkpoint yet; what was made is in {self.run_dir}"

    def ending(self) -> list[str]:
        """Why training ended, and how to go on."""
        trainer, data, more = self.trainer, self.datamodule, []
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]
        if trainer.max_epochs and self.checkpoint.done >= data.batches * trainer.max_epochs > 0:
            several = trainer.max_epochs > 1
            more = [
                f"--trainer.max_epochs={2 * trainer.max_epochs}" if several else f"--data.batches={2 * data.batches}"
            ]
            why = f"all {self.checkpoint.done} batches are done"
        elif 0 <= trainer.max_steps <= trainer.global_step:
            why, further = f"trainer.max_steps={trainer.max_steps} is reached", trainer.max_epochs > 0
            more = [f"--trainer.max_steps={-1 if further else 2 * trainer.max_steps}"]
        elif any((timer.time_remaining() or 1) <= 0 for timer in timers):
            why, more = "trainer.max_time is over", ["--trainer.max_time=null"]
        else:
            why = "a callback ended training"
        if not self.checkpoint.complete:
            return [why, f"{why}, before the first batch"]
        return [why, f"{why}; to go on:", f"  {resume_command(self.command, self.checkpoint.complete[-1], *more)}"]

    def close(self) -> None:
        """Let others have the run folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def show(self, *lines: str) -> None:
        """Print lines on the first process."""
        if self.trainer.is_global_zero:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
