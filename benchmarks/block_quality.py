"""Block-causal against full attention in RL: ``OMP_NUM_THREADS=1 python benchmarks/block_quality.py``.

The bundled Sudoku policy with full attention, and the one with blocks of a row that was made out of it, under the
defaults of ``python -m espo_lightning.fit`` (G 8, mu 2, M 1, one token a step), which for the one with blocks are
`BlockDecoding` and `BlockELBO`. Both sweep the same learning rates on one seed that is not reported, take the one that
solves a given share of 128 held-out puzzles (greedy) in the fewest user CPU seconds of training (where none does, the
one that solves most at the end), and repeat it on other seeds for the same number of rollouts. An edge of the grid is
no choice: it raises. Evaluations are not counted. Resumes where it was stopped; ``--table`` prints what was measured.
"""

import argparse
import json
import logging
import statistics
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from measure import in_fresh_process, user_seconds

from espo_lightning import ELBO, BlockDecoding, BlockELBO, Decoding, ESPOModule, PromptDataModule, Sudoku, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.lab.choice import choose
from espo_lightning.lab.evidence import interval
from espo_lightning.tasks.judge import judge

RATES, TUNING_SEED, SEEDS = (1e-4, 3e-4, 1e-3), 100, range(5)
TARGET, PROBLEMS, PROMPTS, TUNING, ROLLOUTS = 0.4, 128, 16, 6, 10
TASK, RESULTS = Sudoku(), Path(__file__).parent / "results" / "block_quality.json"
SIDES = {
    "full": ("bundled:sudoku", Decoding(), ELBO()),
    "blocks": ("bundled:sudoku_block", BlockDecoding(16, 4, 16), BlockELBO(block=4)),
}


class Watch(Callback):
    """Training time and the held-out accuracy after every rollout, as pairs; ends at ``target``."""

    def __init__(self, policy, decoding, target: float):
        problems = [TASK.problem("test", 0, i) for i in range(PROBLEMS)]
        self.policy, self.decoding, self.target, self.problems = policy, decoding.greedy, target, problems
        self.prompts = policy.encode([problem.prompt for problem in problems])
        self.seconds, self.curve = 0.0, [(0.0, self.exact())]

    def exact(self) -> float:
        completion = self.decoding.generate(self.policy, self.prompts, fold_in(0, torch.arange(PROBLEMS)))
        texts = self.policy.decode(completion)
        return sum(judge(problem, text)["exact"] for problem, text in zip(self.problems, texts)) / PROBLEMS

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = user_seconds()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seconds += user_seconds() - self.start
        self.curve.append((self.seconds, self.exact()))
        trainer.should_stop = self.curve[-1][1] >= self.target
        self.start = user_seconds()


def run(side: str, rate: float, seed: int, rollouts: int, target: float) -> list[tuple[float, float]]:
    """One run: seconds and accuracies."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path, decoding, likelihood = SIDES[side]
    policy = load_policy(path)
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    module = ESPOModule(policy, decoding=decoding, likelihood=likelihood, optimizer=optimizer, seed=seed)
    watch = Watch(policy, decoding, target)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | {"limit_val_batches": 0, "accelerator": "cpu", "max_epochs": 1}
    data = PromptDataModule(TASK, batch_size=PROMPTS, batches=rollouts, seed=seed)
    Trainer(**options, callbacks=[watch]).fit(module, datamodule=data)
    return watch.curve


def reached(curve: list[tuple[float, float]]) -> float:
    """Seconds to the target; inf if it was not reached."""
    return next((seconds for seconds, exact in curve if exact >= TARGET), float("inf"))


def chosen(runs: dict, side: str) -> float:
    """The learning rate of the fewest seconds, or the best end. Raises EdgeChoice at an edge of the grid."""
    curves = {rate: runs[f"{side}, lr {rate:g}, seed {TUNING_SEED}"] for rate in RATES}
    scores = {(rate,): (-reached(curve), curve[-1][1]) for rate, curve in curves.items()}
    return choose(scores, [f"{side}: learning rate"])[0]


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of five seeds and its 95 % interval."""
    return statistics.mean(values), *interval(values)


def table(runs: dict) -> str:
    """What was measured, as Markdown."""
    lines = ["| | learning rate | exact before | after, by seed | gain [95 %] | seconds to 0.4, by seed | of all |"]
    lines.append("|---|---|---|---|---|---|---|")
    for side in SIDES:
        rate = chosen(runs, side)
        curves = [runs[f"{side}, lr {rate:g}, seed {seed}"] for seed in SEEDS]
        gain = "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval([c[-1][1] - c[0][1] for c in curves]))
        after = ", ".join(f"{c[-1][1]:.3f}" for c in curves)
        times = ", ".join("never" if (s := reached(c)) == float("inf") else f"{s:.1f}" for c in curves)
        whole = "{:.1f} [{:.1f}, {:.1f}]".format(*mean_interval([c[-1][0] for c in curves]))
        lines.append(f"| {side} | {rate:g} | {curves[0][0][1]:.3f} | {after} | {gain} | {times} | {whole} |")
    ends = {side: [runs[f"{side}, lr {chosen(runs, side):g}, seed {seed}"][-1] for seed in SEEDS] for side in SIDES}
    pairs = list(zip(ends["blocks"], ends["full"]))
    exact = "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval([b - a for (_, b), (_, a) in pairs]))
    seconds = "{:.2f} [{:.2f}, {:.2f}]".format(*mean_interval([b / a for (b, _), (a, _) in pairs]))
    lines += [
        "",
        f"Blocks against full attention, paired over seeds: exact after {exact}, seconds of all rollouts {seconds}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the output holds")
    options = parser.parse_args()
    runs = json.loads(options.output.read_text()) if options.output.exists() else {}

    def do(side: str, rate: float, seed: int, *until: float) -> None:
        name = f"{side}, lr {rate:g}, seed {seed}"
        if name not in runs:
            runs[name] = in_fresh_process(run, side, rate, seed, *until)
            options.output.write_text(json.dumps(runs, indent=1) + "\n")
            print(name, *(f"{exact:.3f}" for _, exact in runs[name]), f"{runs[name][-1][0]:.1f} s", flush=True)

    if not options.table:
        for side in SIDES:
            for rate in RATES:
                do(side, rate, TUNING_SEED, TUNING, TARGET)
        for seed in SEEDS:
            for side in SIDES:
                do(side, chosen(runs, side), seed, ROLLOUTS, float("inf"))
    print(table(runs), end="")


if __name__ == "__main__":
    main()
