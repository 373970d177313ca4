"""The default run by new seeds: how many rollouts it needs, and where its CPU seconds go.

    OMP_NUM_THREADS=1 python benchmarks/default_run.py

``python -m espo_lightning.fit --seed S``, 50 rollouts with a validation of 256 held-out puzzles before, after every
tenth and after the last, each seed in a process of its own. Of every seed are stored the accuracies by rollouts, and
the user CPU seconds of imports, rollouts, scoring, updates and validations. Prints two tables, writes JSON; seeds that
it has already are not run again.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SEEDS = range(20, 25)  # others than those of the published runs, 0-4
LOOKS = range(10, 51, 10)
METHODS = {
    "rollouts": "complete",
    "scoring": "judge_and_score",
    "updates": "update",
    "validations": "validation_step",
}


def user_seconds() -> float:
    """User CPU seconds of this process so far. Not `measure`'s, as importing it would hide what imports cost."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def run(seed: int) -> dict:
    """A whole run in this process, which has imported nothing yet: accuracies [95 %] by rollouts, seconds by phase."""
    from espo_lightning import ESPOModule, fit
    from espo_lightning.training.report import read_metrics

    spent = {"imports": user_seconds()} | dict.fromkeys(METHODS, 0.0)

    def timed(phase: str, method):
        def call(*args, **kwargs):
            start = user_seconds()
            result = method(*args, **kwargs)
            spent[phase] += user_seconds() - start
            return result

        return call

    for phase, name in METHODS.items():
        setattr(ESPOModule, name, timed(phase, getattr(ESPOModule, name)))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fit.main([f"--seed={seed}", f"--run_dir={run_dir}"])
        rows = read_metrics(run_dir)
        after = json.loads((run_dir / "summary.json").read_text())["after"]
    exact = {int(row["rollout"]): row["val/exact"] for row in rows if "val/exact" in row}
    spent["the rest"] = user_seconds() - sum(spent.values())
    return {"exact": exact, "ci95_last": after["ci95"]["exact"], "n": after["n"], "cpu_seconds": spent}


def in_new_process(seed: int) -> dict:
    """`run` in a process that has imported this file only."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, seed).result()


def cells(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in values)


def accuracies(runs: dict[str, dict]) -> str:
    """Held-out accuracy by rollouts, as Markdown, and what the last 10, 20, ... rollouts gained over the seeds."""
    lines = [f"| seed | {' | '.join(map(str, LOOKS))} |", f"|---{'|---' * len(LOOKS)}|"]
    for seed, found in runs.items():
        lines.append(f"| {seed} | {cells(found['exact'][str(n)] for n in LOOKS)} |")
    means = [statistics.mean(found["exact"][str(n)] for found in runs.values()) for n in LOOKS]
    lines.append(f"| mean | {cells(means)} |")
    gains = []
    for n in LOOKS[:-1]:
        middle, half = gain([found["exact"]["50"] - found["exact"][str(n)] for found in runs.values()])
        gains.append(f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]")
    return "\n".join([*lines, f"| 50 minus this | {' | '.join(gains)} | |"])


def gain(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and half of its 95 % interval by Student's t."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[len(differences)]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / len(differences) ** 0.5


def phases(runs: dict[str, dict]) -> str:
    """User CPU seconds by phase, medians over the seeds, and their shares, as Markdown."""
    lines = ["| phase | user CPU s, median | share |", "|---|---|---|"]
    medians = {
        phase: statistics.median(found["cpu_seconds"][phase] for found in runs.values())
        for phase in next(iter(runs.values()))["cpu_seconds"]
    }
    whole = sum(medians.values())
    return "\n".join([*lines, *(f"| {phase} | {s:.1f} | {s / whole:.0%} |" for phase, s in medians.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "default_run.json")
    output = parser.parse_args().output
    stored = json.loads(output.read_text()) if output.exists() else {"runs": {}}
    for seed in SEEDS:
        if str(seed) not in stored["runs"]:
            stored["runs"][str(seed)] = json.loads(json.dumps(in_new_process(seed)))
            output.write_text(json.dumps(stored, indent=1) + "\n")
            print(seed, stored["runs"][str(seed)], flush=True)
    from measure import host

    stored["host"] = host()
    output.write_text(json.dumps(stored, indent=1) + "\n")
    print(accuracies(stored["runs"]), phases(stored["runs"]), sep="\n\n")


if __name__ == "__main__":
    main()
