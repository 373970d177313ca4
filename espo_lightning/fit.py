"""``python -m espo_lightning.fit``: ESPO on a task, measured on held-out problems before and after."""

import csv
import json
import time
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from espo_lightning.cli import TrainingCLI
from espo_lightning.data import PromptDataModule
from espo_lightning.module import ESPOModule
from espo_lightning.runs import SampleLog, write_text


class FitCLI(TrainingCLI):
    """Adds the sample log, and what verifiers and validation need."""

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


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All rows of a run's metrics, in order, also over resumes (a repeated rollout counts once, the latest)."""
    rows: dict[tuple, dict[str, float]] = {}
    for path in [*sorted(run_dir.glob("metrics.*.csv")), run_dir / "metrics.csv"]:
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    values = {k: float(v) for k, v in row.items() if v}
                    rows[values["rollout"], "train/reward" in values] = values
    return [rows[key] for key in sorted(rows)]


def plot_rewards(run_dir: Path, summary: dict) -> Path:
    """The reward of every rollout, and the held-out accuracy, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    train = [r for r in rows if "train/reward" in r]
    held_out = [(r["rollout"], r["val/exact"]) for r in rows if "val/exact" in r]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([r["rollout"] for r in train], [r["train/reward"] for r in train], label="training reward (sampled)")
    if held_out:
        axes.plot(*zip(*held_out), "o-", label=f"held-out exact (greedy, n = {summary['before']['n']})")
    for key, value in summary["chance"].items():
        axes.axhline(value, color="grey", lw=0.8, ls="--" if key == "exact" else ":", label=f"chance, {key}")
    axes.set(xlabel="rollouts", ylabel="reward, accuracy", ylim=(0, 1), title=f"seed {summary['seed']}")
    axes.legend(fontsize=8, loc="lower right")
    path = run_dir / "reward.png"
    figure.savefig(path, dpi=120)
    return path


def main(argv: list[str] | None = None) -> None:
    cli = FitCLI(
        ESPOModule,
        PromptDataModule,
        argv,
        command="espo_lightning.fit",
        defaults={
            "model.policy": {"class_path": "espo_lightning.load_policy", "init_args": {"path": "bundled:sudoku"}},
            "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.01}},
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


def table(summary: dict) -> list[str]:
    """Before and after, metric by metric, with 95 % intervals and chance levels."""
    before, after = summary["before"], summary["after"]
    lines = [f"{'held-out, greedy':18}{'before':>24}{'after':>24}{'chance':>9}   (n = {after['n']})"]
    for key in after["ci95"]:
        cells = [f"{s[key]:.3f} [{s['ci95'][key][0]:.3f}, {s['ci95'][key][1]:.3f}]" for s in (before, after)]
        chance = summary["chance"].get(key)
        lines.append(f"{key:18}{cells[0]:>24}{cells[1]:>24}{'' if chance is None else f'{chance:.3f}':>9}")
    return [*lines, f"{summary['rollouts']} rollouts, {summary['seconds']:.0f} s, seed {summary['seed']}"]


if __name__ == "__main__":
    main()
