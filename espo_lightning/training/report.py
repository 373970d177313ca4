"""What a run shows at its end: its metrics read back, its curve, its table."""

import csv
from pathlib import Path

from espo_lightning.training.threads import counted

PHASES = {"time/rollout": "decoding", "time/score": "verifying and scoring", "time/update": "updates"}
BLUE, RED, GREY = "#0072B2", "#D55E00", "#888888"  # as in the notebooks' figures
RARE = ("failed", "timeout")  # shown only if it happened


def metrics_files(run_dir: Path) -> list[Path]:
    """A run's metrics: of the parts that resumes ended, in their order, and the newest."""
    return [p for p in (*sorted(run_dir.glob("metrics.*.csv")), run_dir / "metrics.csv") if p.exists()]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All rows of a run's metrics, in order, also over resumes (a repeated rollout counts once, the latest).

    Rows that callbacks logged about something else, without a rollout, are left out.
    """
    rows: dict[tuple, dict[str, float]] = {}
    for path in metrics_files(run_dir):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                values = {k: float(v) for k, v in row.items() if v}
                if "rollout" in values:
                    rows[values["rollout"], "train/reward" in values] = values
    return [rows[key] for key in sorted(rows)]


def plot_rewards(run_dir: Path, summary: dict) -> Path:
    """The reward of every rollout, and the held-out accuracy, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    train = [r for r in rows if "train/reward" in r]
    held_out = [(r["rollout"], r["val/exact"]) for r in rows if "val/exact" in r]
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([r["rollout"] for r in train], [r["train/reward"] for r in train], color=BLUE)
    ends = [(train[-1]["train/reward"], "training reward, sampled", BLUE)] if train else []
    if held_out:
        axes.plot(*zip(*held_out), "o-", color=RED, markersize=4)
        ends.append((held_out[-1][1], f"held-out exact, greedy, n = {summary['after']['n']}", RED))
    for key, value in summary["chance"].items():
        axes.axhline(value, color=GREY, lw=0.8, ls="--" if key == "exact" else ":")
        ends.append((value, f"chance, {key}", GREY))
    low, high = limits([r["train/reward"] for r in train])
    axes.set(xlabel="rollouts", ylabel="reward, accuracy", ylim=(low, high), title=f"seed {summary['seed']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if (low, high) != (0, 1):  # else they are the frame
        for value in (0, 1):
            axes.axhline(value, color="black", lw=0.6)
    for (_, words, colour), y in zip(sorted(ends), apart([value for value, _, _ in sorted(ends)], 0.07 * (high - low))):
        axes.annotate(words, (1.01, y), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=10)
    path = run_dir / "reward.png"
    figure.savefig(path, dpi=120)
    return path


def apart(values: list[float], gap: float) -> list[float]:
    """Ascending heights of labels, each at its value or as far above it as the one below needs."""
    placed: list[float] = []
    for value in values:
        placed.append(max([value, *(height + gap for height in placed[-1:])]))
    return placed


def limits(values: list[float]) -> tuple[float, float]:
    """Of an axis that shows 0 to 1, and whatever lies outside with a margin."""
    low, high = min([0.0, *values]), max([1.0, *values])
    margin = 0.05 * (high - low)
    return (low - margin if low < 0 else 0), (high + margin if high > 1 else 1)


def told(*summaries: dict) -> list[str]:
    """The metrics that are worth a line: `RARE` ones only if they are not 0 everywhere."""
    return [key for key in summaries[-1]["ci95"] if key not in RARE or any(s.get(key) for s in summaries)]


def with_interval(summary: dict) -> str:
    """Metrics with their 95 % intervals on one line."""
    ends = summary["ci95"]
    return "  ".join(f"{k} {summary[k]:.3f} [{ends[k][0]:.3f}, {ends[k][1]:.3f}]" for k in told(summary))


def table(summary: dict) -> list[str]:
    """Before and after, metric by metric, with 95 % intervals and chance levels."""
    before, after = summary["before"], summary["after"]
    if after is None:
        return ["nothing was held out (data.eval_problems or trainer.limit_val_batches is 0)"]
    lines = [f"{'held-out, greedy':18}{'before':>24}{'after':>24}{'chance':>9}   (n = {after['n']})"]
    for key in told(before, after):
        cells = [f"{s[key]:.3f} [{s['ci95'][key][0]:.3f}, {s['ci95'][key][1]:.3f}]" for s in (before, after)]
        chance = summary["chance"].get(key)
        lines.append(f"{key:18}{cells[0]:>24}{cells[1]:>24}{'' if chance is None else f'{chance:.3f}':>9}")
    return lines


def seconds(summary: dict, rows: list[dict[str, float]]) -> str:
    """How long training took, and its phases: the sums over the rollouts, and what is left of the whole."""
    spent = {name: sum(row.get(key, 0.0) for row in rows) for key, name in PHASES.items()}
    spent["validation, checkpoints and the rest"] = max(0.0, summary["seconds"] - sum(spent.values()))
    phases = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
    threads = counted(summary["threads"])
    return f"{summary['rollouts']} rollouts, seed {summary['seed']}, {summary['seconds']:.1f} s, {threads}: {phases}"
