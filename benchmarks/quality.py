"""Time to quality: ``OMP_NUM_THREADS=1 python benchmarks/quality.py``.

User CPU seconds of training until the bundled Sudoku policy solves half of 256 held-out puzzles (greedy), by the
defaults of ``python -m espo_lightning.fit``, by the same with two tokens a denoising step, as the authors decode, and
by the authors' settings for Sudoku on the straightforward trainer. All sweep the same learning rates on seed 0 and
repeat the best one on the other seeds. Evaluation, after every step, is not counted. A run ends at the target or after
``--budget`` seconds; then its time is unknown (null), not the budget. Resumes where it was stopped; writes JSON.
"""

import argparse
import json
import logging
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from measure import in_fresh_process, user_seconds
from straightforward import Straightforward

from espo_lightning import Decoding, ESPOModule, Policy, PromptDataModule, Sudoku, generate, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.tasks.judge import judge

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TARGET, PROBLEMS = 0.5, 256  # exact-grid accuracy, held-out puzzles
TASK, PROMPTS = Sudoku(), 16


def exact(policy: Policy) -> float:
    """Greedy exact-grid accuracy on held-out puzzles, one token a step."""
    problems = [TASK.problem("test", 0, i) for i in range(PROBLEMS)]
    prompts = policy.encode([problem.prompt for problem in problems])
    completion = generate(policy, prompts, fold_in(0, torch.arange(PROBLEMS)), Decoding(temperature=0.0))
    return sum(judge(p, text)["exact"] for p, text in zip(problems, policy.decode(completion))) / PROBLEMS


class Clock:
    """Training time and the accuracies seen at it."""

    def __init__(self, policy: Policy, budget: float):
        self.policy, self.budget, self.seconds, self.steps = policy, budget, 0.0, 0
        self.curve = [(0.0, exact(policy))]
        self.start = user_seconds()

    def step(self) -> bool:
        """After a training step: whether the run is over."""
        self.seconds += user_seconds() - self.start
        self.steps += 1
        self.curve.append((self.seconds, exact(self.policy)))
        self.start = user_seconds()
        return self.curve[-1][1] >= TARGET or self.seconds > self.budget


class Stop(Callback):
    """Ends the library's training when the clock says so."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_start(self, trainer, pl_module) -> None:
        self.clock.start = user_seconds()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = self.clock.step()


def library(rate: float, seed: int, budget: float, steps: int) -> list[tuple[float, float]]:
    """The defaults of the command line, G 8, mu 2, M 1, but for the denoising steps."""
    policy = load_policy("bundled:sudoku")
    clock = Clock(policy, budget)
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    module = ESPOModule(policy, decoding=Decoding(steps=steps), optimizer=optimizer, seed=seed)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Stop(clock)],
    ).fit(module, datamodule=PromptDataModule(TASK, batch_size=PROMPTS, batches=10_000, seed=seed))
    return clock.curve


def authors(rate: float, seed: int, budget: float) -> list[tuple[float, float]]:
    """The authors' recipe for Sudoku: G 6, mu 8, M 2, two tokens a step, eps 0.2, beta 0.01, clipping at 0.2."""
    policy = load_policy("bundled:sudoku")
    trainer = Straightforward(
        model=policy.model,
        reference=deepcopy(policy.model).requires_grad_(False),
        optimizer=torch.optim.AdamW(policy.model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
        mask_id=policy.mask_id,
        length=16,
        block=16,
        steps=8,
        group=6,
        updates=8,
        draws=2,
        micro_batch=96,
        clip_range=0.2,
        beta=1e-2,
        max_norm=0.2,
        generator=torch.Generator().manual_seed(seed),
    )
    clock, over = Clock(policy, budget), False
    while not over:
        first = clock.steps * PROMPTS
        problems = [TASK.problem("train", seed, first + i) for i in range(PROMPTS)]

        def reward(completion: torch.Tensor, problems=problems) -> torch.Tensor:
            texts = policy.decode(completion)
            return torch.tensor([judge(problems[i // 6], text)["reward"] for i, text in enumerate(texts)])

        trainer.outer_step(policy.encode([problem.prompt for problem in problems]).ids, reward)
        over = clock.step()
    return clock.curve


SIDES = {
    "defaults": partial(library, steps=16),
    "two tokens a step": partial(library, steps=8),
    "authors": authors,
}


def run(side: str, rate: float, seed: int, budget: float) -> dict:
    """One run: its curve, and the seconds to the target or None."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    curve = SIDES[side](rate, seed, budget)
    reached = curve[-1][1] >= TARGET
    return {"seconds": curve[-1][0] if reached else None, "best": max(a for _, a in curve), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=120, help="CPU seconds of a run (default: 120)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the best learning rate (default: 5)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="some (default: all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    options.output.parent.mkdir(exist_ok=True)
    runs = json.loads(options.output.read_text()) if options.output.exists() else {}

    def done(side: str, rate: float, seed: int) -> dict:
        key = f"{side} lr={rate:g} seed={seed}"
        if key not in runs:
            runs[key] = in_fresh_process(run, side, rate, seed, options.budget)
            options.output.write_text(json.dumps(runs, indent=1) + "\n")
        result = runs[key]
        print(f"{key:36} seconds {result['seconds']}  best {result['best']:.3f}", flush=True)
        return result

    for side in options.sides:
        sweep = {rate: done(side, rate, 0) for rate in RATES}
        best = min(sweep, key=lambda rate: (sweep[rate]["seconds"] or float("inf"), -sweep[rate]["best"]))
        seconds = [done(side, best, seed)["seconds"] for seed in range(options.seeds)]
        print(f"{side}: learning rate {best:g}, seconds {seconds}", flush=True)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
