"""``python -m espo_lightning.fit``: ESPO on a task, measured on held-out problems before and after."""

import json
from importlib.metadata import version

import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from espo_lightning.training.cli import TrainingCLI
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.module import ESPOModule
from espo_lightning.training.program import program
from espo_lightning.training.report import plot_rewards, read_metrics, seconds, table
from espo_lightning.training.run_folder import write_text
from espo_lightning.training.samples import SampleLog
from espo_lightning.training.signals import Signals
from espo_lightning.training.trainer_flags import MANUAL, REFUSED


class FitCLI(TrainingCLI):
    """Adds the sample log, and what verifiers and validation need."""

    noun = "rollout"
    refused = REFUSED | MANUAL

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "test") if self.datamodule.eval_problems else ("train",)

    def check(self, trainer) -> None:
        super().check(trainer)
        task, asked = self.datamodule.task, self.datamodule.eval_problems
        task.check_host()
        if asked and (size := task.size("test")) is not None and asked > size:  # none counts twice
            self.datamodule.eval_problems = size - size % trainer.world_size
            rank_zero_warn(f"data.eval_problems {asked}: {type(task).__name__} has {size} test problems, all are taken")

    def extra_callbacks(self) -> list[Callback]:
        return [SampleLog(self.run_dir / "samples.jsonl")]

    def measure(self) -> dict | None:
        """Held-out metrics of the policy as it is; None if nothing is held out."""
        if not self.trainer.limit_val_batches:
            return None
        profiler, self.trainer.profiler = self.trainer.profiler, PassThroughProfiler()  # which is about training
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.trainer.profiler = profiler
        return self.model.summary


def make(argv: list[str] | None, signals: Signals) -> FitCLI:
    return FitCLI(
        ESPOModule,
        PromptDataModule,
        argv,
        signals,
        command="espo_lightning.fit",
        defaults={
            "model.policy": {"class_path": "espo_lightning.load_policy", "init_args": {"path": "bundled:sudoku"}},
        },
        trainer_defaults={"val_check_interval": 10, "check_val_every_n_epoch": None},
    )


def work(cli: FitCLI) -> None:
    """Measure, train, measure again, and write what came of it."""
    model, data = cli.model, cli.datamodule
    cli.announce(
        f"{data.batches} rollouts of {data.batch_size} prompts x {model.group_size} completions, "
        f"{model.updates} updates each",
    )
    before = cli.record["before"] = cli.record["before"] or cli.measure()
    cli.fit()
    after = cli.measure()
    if not cli.trainer.is_global_zero:
        return
    summary = {
        "before": before,
        "after": after,
        "chance": data.task.chance,
        "seed": cli.config.seed,
        "rollouts": model.rollouts,
        "updates": model.rollouts * model.updates,
        "seconds": cli.checkpoint.seconds,
        "threads": torch.get_num_threads(),
        "ended": cli.ending()[0],
        "resumed": cli.record["history"],
        "settings": cli.settings,
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "espo-lightning")},
    }
    write_text(cli.run_dir / "summary.json", json.dumps(summary, indent=1))
    files = {
        "summary.json": "every number, and all settings",
        "metrics.csv": "a row for every rollout and every validation",
        "samples.jsonl": "completions with their verdicts",
        "reward.png": "the curves",
        "policy": "the final policy, for transformers and espo_lightning.evaluate",
        "checkpoints": "to resume from",
    }
    plot_rewards(cli.run_dir, summary)
    cli.show(
        "",
        *table(summary),
        seconds(summary, read_metrics(cli.run_dir)),
        "",
        *(f"{cli.run_dir / name}  {what}" for name, what in files.items()),
        *cli.ending()[1:],
    )


def main(argv: list[str] | None = None) -> None:
    program(lambda signals: make(argv, signals), work)


if __name__ == "__main__":
    main()
