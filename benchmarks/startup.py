"""How long programs take to start: CPU seconds of a process, of this checkout and of another one, in turns.

    python benchmarks/startup.py --other ../before --output benchmarks/results/startup.json

Each command runs in a process of its own. Other work on the machine makes CPU seconds longer: what counts is the ratio
of two checkouts that alternate in one run. "first rollout" is `espo_lightning.fit` without validation until it
begins to decode; "import torch" and "import lightning" are what no program that needs them can do without.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_ROLLOUT = """
import os
from espo_lightning import fit
from espo_lightning.training.module import ESPOModule
ESPOModule.complete = lambda *_: os._exit(0)
fit.main(["--data.eval_problems=0", "--run_dir=run"])
"""
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning.pytorch.cli"],
    **{f"{name} --help": ["-m", f"espo_lightning.{name}", "--help"] for name in ("fit", "sft", "evaluate", "cost")},
    **{f"{name} --help": ["-m", f"espo_lightning.{name}", "--help"] for name in ("export", "notebooks")},
    "fit --print_config": ["-m", "espo_lightning.fit", "--print_config"],
    "fit, misspelt flag": ["-m", "espo_lightning.fit", "--modle.updates=1"],
    "evaluate, misspelt flag": ["-m", "espo_lightning.evaluate", "--polcy.path=x"],
    "cost": ["-m", "espo_lightning.cost"],
    "fit, first rollout": ["-c", FIRST_ROLLOUT],
    "sudoku, 1st problem": ["-c", "from espo_lightning.tasks.sudoku import Sudoku; Sudoku().problem('train', 0, 0)"],
}


def cpu_seconds(arguments: list[str], checkout: Path) -> float:
    """User and system seconds of a process with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(checkouts: dict[str, Path], repeats: int) -> dict[str, dict[str, list[float]]]:
    """command -> checkout -> seconds of every repetition; the first of each, which compiles bytecode, is left out."""
    found = {command: {name: [] for name in checkouts} for command in COMMANDS}
    for repeat in range(repeats + 1):
        for command, arguments in COMMANDS.items():
            for name, checkout in checkouts.items():
                seconds = cpu_seconds(arguments, checkout)
                if repeat:
                    found[command][name].append(round(seconds, 3))
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians as Markdown, and the last checkout's over the first's."""
    names = list(next(iter(found.values())))
    lines = [f"| CPU seconds, medians | {' | '.join(names)} | ratio |", f"|---{'|---' * len(names)}|---|"]
    for command, by in found.items():
        medians = [statistics.median(values) for values in by.values()]
        cells = [f"{value:.2f}" for value in (*medians, medians[-1] / medians[0])]
        lines.append(f"| {command} | {' | '.join(cells)} |")
    return "\n".join(lines)


def commit(checkout: Path) -> str:
    """Its commit, with a + if the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", "espo_lightning") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    checkouts = {"before": arguments.other} if arguments.other else {}
    checkouts["now"] = ROOT
    found = measure({name: path.resolve() for name, path in checkouts.items()}, arguments.repeats)
    result = {
        "commits": {name: commit(path) for name, path in checkouts.items()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "jsonargparse")}
        | {"python": platform.python_version()},
        "cpu_seconds": found,
    }
    sys.stdout.write(table(found) + "\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
