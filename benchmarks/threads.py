"""What threads cost and bring on a CPU: ``python benchmarks/threads.py``; also with ``OMP_WAIT_POLICY=passive``.

Rollouts and updates of `fit`'s default settings, on random policies of several sizes, with 1, 2 and 4 threads turn by
turn in one process. Prints a table, writes JSON; the load of the machine stands beside the numbers, which depend on it.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from measure import in_fresh_process, random_policy, summary

from espo_lightning import ESPOModule, PromptDataModule
from espo_lightning.tasks import Sudoku
from espo_lightning.training.screen import quiet

SIZES = {  # hidden size, layers, heads, MLP width
    "0.1M": (48, 4, 4, 96),
    "0.46M": (96, 4, 4, 256),
    "2M": (160, 6, 5, 448),
    "7M": (256, 8, 4, 704),
    "20M": (448, 8, 7, 1216),
    "55M": (640, 11, 10, 1728),
    "135M": (768, 18, 12, 2112),
}
ROLLOUTS = {"small": (1, 4), "default": (16, 8)}  # prompts, completions of each
THREADS = (1, 2, 4)
PHASES = ("rollout", "update")


class Timed(ESPOModule):
    """`ESPOModule` that notes processor and wall seconds of rollouts and updates."""

    def complete(self, *args):
        return self._timed("rollout", super().complete, *args)

    def update(self, *args):
        return self._timed("update", super().update, *args)

    def _timed(self, phase: str, function, *args):
        start = time.process_time(), time.perf_counter()
        result = function(*args)
        self.spent[phase]["cpu"] += time.process_time() - start[0]
        self.spent[phase]["wall"] += time.perf_counter() - start[1]
        return result


class TurnByTurn(Callback):
    """Gives every batch the next number of threads, and collects what it took."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.set_num_threads(THREADS[batch_idx % len(THREADS)])
        pl_module.spent = {phase: {"cpu": 0.0, "wall": 0.0} for phase in PHASES}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.runs.append(pl_module.spent)


def time_steps(size: str, prompts: int, group: int, repeats: int) -> tuple[int, list[dict]]:
    """Parameters, and the seconds of each step; the first one of every number of threads is warm-up."""
    warnings.filterwarnings("ignore")
    quiet()
    policy = random_policy(*SIZES[size])
    module, turns = Timed(policy, group_size=group, optimizer=partial(torch.optim.AdamW, lr=1e-6)), TurnByTurn()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
            callbacks=[turns],
        )
        trainer.fit(module, PromptDataModule(Sudoku(), batch_size=prompts, batches=len(THREADS) * (1 + repeats)))
    return sum(p.numel() for p in policy.parameters()), turns.runs


def measure(size: str, rollout: str, repeats: int) -> dict:
    """One row: of every number of threads the median and range of each phase."""
    prompts, group = ROLLOUTS[rollout]
    load = os.getloadavg()[0]
    parameters, runs = in_fresh_process(time_steps, size, prompts, group, repeats)
    row = {"size": size, "parameters": parameters, "rollout": rollout, "completions": prompts * group}
    row |= {"repeats": repeats, "load": [load, os.getloadavg()[0]]}
    for index, threads in enumerate(THREADS):
        timed = runs[index :: len(THREADS)][1:]
        row[f"{threads}"] = {
            phase: {clock: summary([run[phase][clock] for run in timed]) for clock in ("cpu", "wall")}
            for phase in PHASES
        }
    return row


HEADER = f"{'size':6} {'rollout':8} {'threads':>7} {'load':>5}" + "".join(
    f"{f'{phase}, {clock} s':>17}" for phase in PHASES for clock in ("cpu", "wall")
)


def table(row: dict) -> str:
    """A line for every number of threads."""
    lines = []
    for threads in THREADS:
        cells = [row[f"{threads}"][phase][clock]["median"] for phase in PHASES for clock in ("cpu", "wall")]
        seconds = "".join(f"{cell:17.3f}" for cell in cells)
        lines.append(f"{row['size']:6} {row['rollout']:8} {threads:7} {row['load'][-1]:5.1f}{seconds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rollouts", nargs="+", choices=ROLLOUTS, default=list(ROLLOUTS))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each number of threads (default: 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "threads.json")
    arguments = parser.parse_args()
    facts = {"cores": len(os.sched_getaffinity(0)), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    facts |= {"torch": torch.__version__, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")}
    rows = []
    print(HEADER)
    for size in arguments.sizes:
        for rollout in arguments.rollouts:
            rows.append(measure(size, rollout, arguments.repeats))
            print(table(rows[-1]), flush=True)
            arguments.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
