"""``python -m espo_lightning.fit``: ESPO on a task, measured on held-out problems before and after."""

import json
import time

import yaml
from lightning.pytorch import Callback

from espo_lightning.training.command_line import TrainingCLI
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.module import ESPOModule
from espo_lightning.training.report import plot_rewards, table
from espo_lightning.training.run_folder import SampleLog, write_text


class FitCLI(TrainingCLI):
    """Adds the sample log, and what verifiers and validation need."""

    SPLITS = ("train", "test")

    def check(self, trainer) -> None:
        super().check(trainer)
        task, problems = self.datamodule.task, self.datamodule.eval_problems
        task.check_host()
        if (size := task.size("test")) is not None and problems > size:
            raise ValueError(
                f"data.eval_problems {problems}: {type(task).__name__} has {size} test problems, and some would count "
                f"twice. Set data.eval_problems and data.eval_batch_size to {size}, or fewer, or hold out more"
            )

    def extra_callbacks(self) -> list[Callback]:
        return [SampleLog(self.run_dir / "samples.jsonl")]


def main(argv: list[str] | None = None) -> None:
    cli = FitCLI(
        ESPOModule,
        PromptDataModule,
        argv,
        command="espo_lightning.fit",
        defaults={
            "model.policy": {"class_path": "espo_lightning.load_policy", "init_args": {"path": "bundled:sudoku"}},
        },
        trainer_defaults={"val_check_interval": 10, "check_val_every_n_epoch": None},
    )
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    stored = cli.run_dir / "before.json"
    if cli.config.ckpt_path is not None and stored.exists():
        before = json.loads(stored.read_text())
    else:
        trainer.validate(model, data, verbose=False)
        before = model.summary
        if trainer.is_global_zero:
            write_text(stored, json.dumps(before))
    start = time.perf_counter()
    cli.fit()
    seconds = time.perf_counter() - start
    trainer.validate(model, data, verbose=False)
    if not trainer.is_global_zero:
        return
    summary = {
        "before": before,
        "after": model.summary,
        "chance": data.task.chance,
        "seed": cli.config.seed,
        "rollouts": model.rollouts,
        "updates": model.rollouts * model.updates,
        "seconds": seconds,
        "settings": yaml.safe_load(cli.saved_config),
    }
    write_text(cli.run_dir / "summary.json", json.dumps(summary, indent=1))
    curve = plot_rewards(cli.run_dir, summary)
    cli.finish(
        [
            "",
            *table(summary),
            "",
            *(
                f"{name:15}{cli.run_dir / name}"
                for name in ("summary.json", "metrics.csv", "samples.jsonl", "config.yaml")
            ),
            f"{'curve':15}{curve}",
            f"{'policy':15}{cli.checkpoint.policy_folder}",
        ]
    )


if __name__ == "__main__":
    main()
