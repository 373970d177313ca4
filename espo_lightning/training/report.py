"""What a run shows at its end: its metrics read back, its curve, its table."""

import csv
from pathlib import Path


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


def table(summary: dict) -> list[str]:
    """Before and after, metric by metric, with 95 % intervals and chance levels."""
    before, after = summary["before"], summary["after"]
    lines = [f"{'held-out, greedy':18}{'before':>24}{'after':>24}{'chance':>9}   (n = {after['n']})"]
    for key in after["ci95"]:
        cells = [f"{s[key]:.3f} [{s['ci95'][key][0]:.3f}, {s['ci95'][key][1]:.3f}]" for s in (before, after)]
        chance = summary["chance"].get(key)
        lines.append(f"{key:18}{cells[0]:>24}{cells[1]:>24}{'' if chance is None else f'{chance:.3f}':>9}")
    return [*lines, f"{summary['rollouts']} rollouts, {summary['seconds']:.0f} s, seed {summary['seed']}"]
