"""The table of results in the README, from runs that are kept in docs/results/fit.json.

``python website/results.py keep sudoku RUN ...`` adds the summaries of finished runs to that file, and ``python
website/results.py`` puts the table into the README; a test compares.
"""

import json
import re
import sys
from pathlib import Path
from statistics import median

KEPT = Path(__file__).parents[1] / "docs/results/fit.json"
NAMES = {
    "sudoku": "4x4 Sudoku, `fit`, 50 rollouts",
    "countdown": "3-number Countdown, `fit --config experiments/countdown_tiny.yaml`, 40 rollouts",
}


def kept() -> list[dict]:
    """The kept runs, one dictionary each, sorted by name and seed."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else []


def keep(name: str, folders: list[str]) -> None:
    """Add what the summaries of runs say to the file, in the place of what it has of the same seeds."""
    runs = {(run["name"], run["seed"]): run for run in kept()}
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text())
        run = {"name": name} | {key: summary[key] for key in ("seed", "rollouts", "updates", "seconds", "chance")}
        runs[name, run["seed"]] = run | {moment: summary[moment] for moment in ("before", "after")}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps([runs[key] for key in sorted(runs)], indent=1) + "\n")


def interval(measured: dict, metric: str = "exact") -> str:
    """A metric with its 95 % interval."""
    low, high = measured["ci95"][metric]
    return f"{measured[metric]:.3f} [{low:.3f}, {high:.3f}]"


def table() -> str:
    """One row per task."""
    rows = ["| task | chance | before [95 %] | after, one run per seed [95 %] |", "|---|---|---|---|"]
    for name, words in NAMES.items():
        runs = [run for run in kept() if run["name"] == name]
        if runs:
            after = "<br>".join(interval(run["after"]) for run in runs)
            middle = median(run["after"]["exact"] for run in runs)
            first = runs[0]
            rows.append(
                f"| {words}, n = {first['after']['n']} | {first['chance']['exact']:.3f} | {interval(first['before'])} "
                f"| median {middle:.3f}<br>{after} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2], sys.argv[3:])
    else:
        readme = KEPT.parents[2] / "README.md"
        text, count = re.subn(r"\| task \| chance \|.*\n(?:\|.*\n)*", table() + "\n", readme.read_text())
        if count != 1:
            raise SystemExit("README.md has no table that begins with | task | chance |")
        readme.write_text(text)
