"""The tables of results in the README and in docs, from runs that are kept in docs/results/fit.json.

``python website/results.py keep sudoku RUN ...`` adds the summaries of finished runs to that file, and ``python
website/results.py`` writes the tables anew; a test compares.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, median

from espo_lightning.lab.evidence import interval as mean_interval

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/results/fit.json"
NAMES = {
    "sudoku": "4x4 Sudoku, `fit`, 50 rollouts",
    "countdown": "3-number Countdown, `fit --config experiments/countdown_tiny.yaml`, 40 rollouts",
}
LONG = "chain"  # has no chance level, and is no part of the overview


def kept(name: str) -> list[dict]:
    """The kept runs of one name, sorted by seed."""
    runs = json.loads(KEPT.read_text()) if KEPT.exists() else []
    return [run for run in runs if run["name"] == name]


def keep(name: str, folders: list[str]) -> None:
    """Add what the summaries of runs say to the file, in the place of what it has of the same seeds."""
    runs = {(run["name"], run["seed"]): run for known in (*NAMES, LONG) for run in kept(known)}
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text())
        run = {"name": name} | {key: summary[key] for key in ("seed", "rollouts", "updates", "seconds", "chance")}
        runs[name, run["seed"]] = run | {moment: summary[moment] for moment in ("before", "after")}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps([runs[key] for key in sorted(runs)], indent=1) + "\n")


def interval(measured: dict) -> str:
    """Exact accuracy with its 95 % interval."""
    low, high = measured["ci95"]["exact"]
    return f"{measured['exact']:.3f} [{low:.3f}, {high:.3f}]"


def overview() -> str:
    """One row per task, for the README."""
    rows = ["| task | chance | before [95 %] | after, one run per seed [95 %] |", "|---|---|---|---|"]
    for name, words in NAMES.items():
        if runs := kept(name):
            first, middle = runs[0], median(run["after"]["exact"] for run in runs)
            after = "<br>".join(interval(run["after"]) for run in runs)
            cells = (f"{first['chance']['exact']:.3f}", interval(first["before"]), f"median {middle:.3f}<br>{after}")
            rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


def by_seed(name: str) -> str:
    """One row per run, for docs/results.md."""
    runs = kept(name)
    metrics = [metric for metric in ("exact", "cell") if metric in runs[0]["after"]]
    rows = [["seed", "exact before", "exact after [95 %]", *["cells before", "cells after"][: 2 * len(metrics) - 2]]]
    rows = [[*rows[0], "seconds"], ["---"] * (len(rows[0]) + 1)]
    for run in runs:
        numbers = [f"{run[moment][metric]:.3f}" for metric in metrics for moment in ("before", "after")]
        rows.append([str(run["seed"]), numbers[0], interval(run["after"]), *numbers[2:], f"{run['seconds']:.0f}"])
    rows.append(["chance", *(f"{runs[0]['chance'][metric]:.3f}" for metric in metrics for _ in range(2)), ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def gains(name: str) -> str:
    """One row per measure: all runs, and the mean gain with its 95 % interval over the seeds."""
    runs = kept(name)
    rows = [["held-out, greedy", "before", f"after, seeds {runs[0]['seed']} to {runs[-1]['seed']}", "gain [95 %]"]]
    rows.append(["---"] * len(rows[0]))
    for measure in ("exact", "step", "target", "reward"):
        before, after = ([run[moment][measure] for run in runs] for moment in ("before", "after"))
        gained = [b - a for a, b in zip(before, after)]
        low, high = mean_interval(gained)
        gain = f"{mean(gained):.3f} [{low:.3f}, {high:.3f}]"
        rows.append([measure, f"{before[0]:.3f}", ", ".join(f"{x:.3f}" for x in after), gain])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def made(name: str) -> str:
    """The table of a name that stands in a comment."""
    if name == "overview":
        return overview()
    return gains(name) if name == LONG else by_seed(name)


def written(path: Path) -> str:
    """A page with its tables as they should be, each behind a comment that names it."""

    def replaced(match: re.Match) -> str:
        return f"<!-- results: {match[1]} -->\n\n{made(match[1])}\n"

    return re.sub(r"<!-- results: (\w+) -->\n+(?:\|.*\n)*", replaced, path.read_text())


PAGES = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/block_policies.md")

if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2], sys.argv[3:])
    for page in PAGES:
        page.write_text(written(page))
