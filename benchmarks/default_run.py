"""The default run by new seeds: how many rollouts it needs, and where its CPU seconds go.

    OMP_NUM_THREADS=1 python benchmarks/default_run.py
    OMP_NUM_THREADS=1 python benchmarks/default_run.py --seeds --finished RUN ...    # only reads the curves of runs

``python -m espo_lightning.fit --seed S``, 50 rollouts with a validation of 256 held-out puzzles before, after every
tenth and after the last, each seed in a process of its own. Of every seed are stored the accuracies by rollouts, and
the user CPU seconds of imports, rollouts, scoring, updates and validations; of finished runs of ``fit``, such as the
published seeds, the accuracies. Prints two tables, writes JSON; seeds that it has already are not run again.
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
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles, from 1 degree of freedom
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
    """A whole run in this process, which has imported nothing yet: accuracies by rollouts, CPU seconds by phase."""
    from espo_lightning import ESPOModule, fit

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
        exact = curve(run_dir)
    spent["the rest"] = user_seconds() - sum(spent.values())
    return {"exact": exact, "cpu_seconds": spent}


def curve(run_dir: Path) -> dict[str, float]:
    """Held-out accuracy of a run by its rollouts."""
    from espo_lightning.training.report import read_metrics

    return {str(int(row["rollout"])): row["val/exact"] for row in read_metrics(run_dir) if "val/exact" in row}


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
    quantile = STUDENT[len(differences) - 2]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / len(differences) ** 0.5


def phases(runs: dict[str, dict]) -> str:
    """User CPU seconds by phase, medians over the seeds, and their shares, as Markdown."""
    lines = ["| phase | user CPU s, median | share |", "|---|---|---|"]
    timed = [found["cpu_seconds"] for found in runs.values() if "cpu_seconds" in found]
    medians = {phase: statistics.median(of[phase] for of in timed) for phase in timed[0]} if timed else {}
    whole = sum(medians.values())
    return "\n".join([*lines, *(f"| {phase} | {s:.1f} | {s / whole:.0%} |" for phase, s in medians.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS), help="to run (default: 20 to 24)")
    parser.add_argument("--finished", type=Path, nargs="*", default=[], help="folders of finished runs of fit")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "default_run.json")
    options = parser.parse_args()
    stored = json.loads(options.output.read_text()) if options.output.exists() else {"runs": {}}
    runs = stored["runs"]
    for folder in options.finished:
        runs[str(json.loads((folder / "summary.json").read_text())["seed"])] = {"exact": curve(folder)}
    for seed in options.seeds:
        if str(seed) not in runs:
            runs[str(seed)] = in_new_process(seed)
            options.output.write_text(json.dumps(stored, indent=1) + "\n")
            print(seed, runs[str(seed)], flush=True)
    from measure import host

    stored["host"] = host()
    options.output.write_text(json.dumps(stored, indent=1) + "\n")
    print(accuracies(runs), phases(runs), sep="\n\n")


if __name__ == "__main__":
    main()
