"""Training with cheaper rollouts: ``OMP_NUM_THREADS=1 python benchmarks/rollout_setting.py``.

The default run of ``python -m espo_lightning.fit`` (4x4 Sudoku, 50 rollouts of 16 x 8), and the same with the decoding
that ``pareto.py`` chose on its pilot seeds, in turns, on seeds that nothing was chosen on. Both are measured alike at
the end: greedy accuracy of the full decoding on 256 held-out puzzles. Passes are those of rollouts, in rows; seconds
are user CPU seconds of all rollouts and of the whole training, without validations. Resumes where it was stopped;
``--table`` prints what was measured.
"""

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from measure import in_fresh_process, user_seconds
from pareto import RESULTS as PARETO
from pareto import chosen, settings

from espo_lightning import Decoding, ESPOModule, PromptDataModule, Sudoku, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.tasks.judge import judge

SEEDS, ROLLOUTS, PROMPTS, PROBLEMS = range(30, 35), 50, 16, 256
TASK, RESULTS = Sudoku(), Path(__file__).parent / "results" / "rollout_setting.json"
ARMS = ("full", "cheaper")
T_4 = 2.776  # Student's t with 4 degrees of freedom, 95 %


class Timed(ESPOModule):
    """Counts the user seconds of rollouts, and their passes in rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoding_seconds, self.rows, self.inside = 0.0, 0, False
        self.policy.network.register_forward_pre_hook(self.count)

    def count(self, network, arguments) -> None:
        self.rows += len(arguments[0]) if self.inside else 0

    def generate(self, *arguments, **more):
        start, self.inside = user_seconds(), True
        result = super().generate(*arguments, **more)
        self.decoding_seconds, self.inside = self.decoding_seconds + user_seconds() - start, False
        return result


def exact(policy) -> float:
    """Greedy accuracy of the full decoding on held-out puzzles."""
    problems = [TASK.problem("test", 0, i) for i in range(PROBLEMS)]
    prompts = policy.encode([problem.prompt for problem in problems])
    completion = Decoding(temperature=0.0).generate(policy, prompts, fold_in(0, torch.arange(PROBLEMS)))
    return sum(judge(p, text)["exact"] for p, text in zip(problems, policy.decode(completion))) / PROBLEMS


def run(decoding: Decoding, seed: int, rollouts: int) -> dict:
    """One run."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Timed(load_policy("bundled:sudoku"), decoding=decoding, seed=seed)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | {"limit_val_batches": 0, "accelerator": "cpu", "max_epochs": 1}
    data = PromptDataModule(TASK, batch_size=PROMPTS, batches=rollouts, seed=seed)
    start = user_seconds()
    Trainer(**options).fit(module, datamodule=data)
    seconds = {"seconds": user_seconds() - start, "seconds_of_rollouts": module.decoding_seconds}
    passes = module.rows / (rollouts * PROMPTS * module.group_size)
    return {"exact": exact(module.policy), "passes": passes, **seconds}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of five seeds and its 95 % interval."""
    mean, half = statistics.mean(values), T_4 * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def table(runs: dict) -> str:
    """What was measured, as Markdown."""
    of = {arm: [runs[f"{arm}, seed {seed}"] for seed in SEEDS] for arm in ARMS}
    lines = ["| rollouts | exact after, by seed | passes a completion | seconds of rollouts | seconds of training |"]
    lines.append("|---|---|---|---|---|")
    for arm in ARMS:
        label = "full decoding" if arm == "full" else runs["setting"]
        after = ", ".join(f"{run['exact']:.3f}" for run in of[arm])
        numbers = [statistics.mean(run[key] for run in of[arm]) for key in ("passes", "seconds_of_rollouts", "seconds")]
        lines.append(f"| {label} | {after} | {numbers[0]:.1f} | {numbers[1]:.0f} | {numbers[2]:.0f} |")
    pairs = list(zip(of["cheaper"], of["full"]))
    change = interval([b["exact"] - a["exact"] for b, a in pairs])
    ratios = [interval([b[key] / a[key] for b, a in pairs]) for key in ("passes", "seconds_of_rollouts", "seconds")]
    parts = ["{:.2f} [{:.2f}, {:.2f}]".format(*ratio) for ratio in ratios]
    return "\n".join(lines) + (
        "\n\nPaired over seeds, mean and 95 % interval: exact after {:+.3f} [{:+.3f}, {:+.3f}]; ".format(*change)
        + f"passes {parts[0]}, seconds of rollouts {parts[1]} and seconds of training {parts[2]} times those in full.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help=f"of each run (default: {ROLLOUTS})")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the output holds")
    options = parser.parse_args()
    runs = json.loads(options.output.read_text()) if options.output.exists() else {}
    if not options.table:
        runs.setdefault("setting", chosen(json.loads(PARETO.read_text())))
        decodings = {"full": Decoding(), "cheaper": settings("Sudoku")[runs["setting"]]}
        for seed in SEEDS:
            for arm in ARMS:
                name = f"{arm}, seed {seed}"
                if name not in runs:
                    runs[name] = in_fresh_process(run, decodings[arm], seed, options.rollouts)
                    options.output.write_text(json.dumps(runs, indent=1) + "\n")
                    print(name, runs[name], flush=True)
    print(table(runs), end="")


if __name__ == "__main__":
    main()
