"""Time to quality: ``OMP_NUM_THREADS=1 python benchmarks/quality.py``.

Training until the bundled Sudoku policy solves half of 256 held-out puzzles (greedy). Two recipes, the defaults of
``python -m espo_lightning.fit`` and the authors' settings for Sudoku, each run by two trainers, the library and the
straightforward one, so that what a recipe saves and what code saves can be told apart; and the library with its
defaults but two tokens a denoising step, as the authors decode. For every recipe the same learning rates are tried on
the same pilot seeds, by the library, and both trainers take the best one, as they compute the same (`assert_same`);
the seeds of the reported runs are others.
A rate's score is the rollouts that its pilots needed together; a pilot is cut off once that cannot be the fewest any
more, which changes no choice. A choice on the edge of the rates is refused; its pilots are kept. The reported runs take
the sides in turn, seed by seed.

Quality is looked at after every rollout, outside of the clock, and the moment of one half lies between two looks, by
linear interpolation, so that sides with long rollouts are not charged for rare looks. Stored with the user CPU seconds
are the rollouts that were needed and the forward passes of one completion, which do not depend on a machine. A run ends
at the target or after a number of rollouts; then its time is unknown (null), not the limit. Resumes where it was
stopped; writes JSON.
"""

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from measure import host, user_seconds
from straightforward import Straightforward

from espo_lightning import ELBO, Decoding, ESPOModule, Policy, PolicyGradient, PromptDataModule, Sudoku, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.lab.choice import choose
from espo_lightning.tasks.judge import judge

RATES = (3e-4, 1e-4, 1e-3, 3e-5, 3e-3)  # in the order in which they are tried
SMALLER = (3e-4, 1e-4, 3e-5)  # of the authors' settings: of 3e-4 a pilot did not get there in 30 rollouts
PILOTS = (101, 102)  # seeds on which rates are chosen, and no other is
TARGET, PROBLEMS = 0.5, 256  # exact-grid accuracy, held-out puzzles
TASK, PROMPTS = Sudoku(), 16


@dataclass(frozen=True)
class Recipe:
    """What is trained, in the paper's letters: T, G, mu, M, eps, beta, and the largest norm of a gradient."""

    steps: int
    group: int
    updates: int
    draws: int
    clip_range: float
    beta: float
    max_norm: float
    betas: tuple[float, float]

    def passes(self, spared: bool) -> int:
        """Forward passes of a completion in a rollout and its updates, a trained one counted as three: steps; old
        policy and reference; updates. ``spared``: without the old policy's for the first update, as the library."""
        pairs = 2 * self.draws
        old = self.updates - 1 if spared else self.updates
        reference = self.updates if self.beta else 0
        return self.steps + pairs * (old + reference + 3 * self.updates)


DEFAULTS = Recipe(steps=16, group=8, updates=2, draws=1, clip_range=0.05, beta=3e-3, max_norm=1.0, betas=(0.9, 0.999))
AUTHORS = Recipe(steps=8, group=6, updates=8, draws=2, clip_range=0.2, beta=1e-2, max_norm=0.2, betas=(0.9, 0.99))


def exact(policy: Policy) -> float:
    """Greedy exact-grid accuracy on held-out puzzles, one token a step."""
    problems = [TASK.problem("test", 0, i) for i in range(PROBLEMS)]
    prompts = policy.encode([problem.prompt for problem in problems])
    completion = Decoding(temperature=0.0).generate(policy, prompts, fold_in(0, torch.arange(PROBLEMS)))
    return sum(judge(p, text)["exact"] for p, text in zip(problems, policy.decode(completion))) / PROBLEMS


class Clock:
    """Training time and the accuracies seen at it."""

    def __init__(self, policy: Policy, limit: int):
        self.policy, self.limit, self.seconds = policy, limit, 0.0
        self.curve = [(0.0, exact(policy))]
        self.start = user_seconds()

    def step(self) -> bool:
        """After a training step: whether the run is over."""
        self.seconds += user_seconds() - self.start
        self.curve.append((self.seconds, exact(self.policy)))
        self.start = user_seconds()
        return self.curve[-1][1] >= TARGET or len(self.curve) > self.limit


class Stop(Callback):
    """Ends the library's training when the clock says so."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_start(self, trainer, pl_module) -> None:
        self.clock.start = user_seconds()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = self.clock.step()


def library(recipe: Recipe, rate: float, seed: int, limit: int) -> list[tuple[float, float]]:
    """The recipe by `ESPOModule`."""
    policy = load_policy("bundled:sudoku")
    clock = Clock(policy, limit)
    module = ESPOModule(
        policy,
        decoding=Decoding(steps=recipe.steps),
        group_size=recipe.group,
        updates=recipe.updates,
        likelihood=ELBO(draws=recipe.draws),
        objective=PolicyGradient(clip_range=recipe.clip_range, beta=recipe.beta),
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=recipe.betas, weight_decay=0.01),
        max_grad_norm=recipe.max_norm,
        seed=seed,
    )
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


def straightforward(recipe: Recipe, rate: float, seed: int, limit: int) -> list[tuple[float, float]]:
    """The recipe by `Straightforward`, which runs its reference also where beta does not need one: it does not here."""
    policy = load_policy("bundled:sudoku")
    trainer = Straightforward(
        model=policy.model,
        reference=deepcopy(policy.model).requires_grad_(False),
        optimizer=torch.optim.AdamW(policy.model.parameters(), lr=rate, betas=recipe.betas, weight_decay=0.01),
        mask_id=policy.mask_id,
        length=16,
        block=16,
        steps=recipe.steps,
        group=recipe.group,
        updates=recipe.updates,
        draws=recipe.draws,
        micro_batch=PROMPTS * recipe.group,
        clip_range=recipe.clip_range,
        beta=recipe.beta,
        max_norm=recipe.max_norm,
        generator=torch.Generator().manual_seed(seed),
    )
    clock, over = Clock(policy, limit), False
    while not over:
        first = (len(clock.curve) - 1) * PROMPTS
        problems = [TASK.problem("train", seed, first + i) for i in range(PROMPTS)]

        def reward(completion: torch.Tensor, problems=problems) -> torch.Tensor:
            texts = policy.decode(completion)
            return torch.tensor([judge(problems[i // recipe.group], text)["reward"] for i, text in enumerate(texts)])

        trainer.outer_step(policy.encode([problem.prompt for problem in problems]).ids, reward)
        over = clock.step()
    return clock.curve


TWO_TOKENS = Recipe(**asdict(DEFAULTS) | {"steps": 8})
SIDES = {
    "library, defaults": (library, DEFAULTS),
    "library, defaults with two tokens a step": (library, TWO_TOKENS),
    "library, authors' settings": (library, AUTHORS),
    "straightforward, defaults": (straightforward, DEFAULTS),
    "straightforward, authors' settings": (straightforward, AUTHORS),
}


def moment(curve: list[tuple[float, float]]) -> dict[str, float | None]:
    """When a curve of (seconds, accuracy) crosses the target, interpolated; null if it does not."""
    if curve[-1][1] < TARGET:
        return {"seconds": None, "rollouts": None}
    (before, low), (after, high) = curve[-2:]
    part = (TARGET - low) / (high - low)
    return {"seconds": before + part * (after - before), "rollouts": len(curve) - 2 + part}


def run(side: str, rate: float, seed: int, limit: int) -> dict:
    """One run of at most ``limit`` rollouts: its curve, and when it crossed the target."""
    trainer, recipe = SIDES[side]
    curve = trainer(recipe, rate, seed, limit)
    best = max(accuracy for _, accuracy in curve)
    passes = recipe.passes(spared=trainer is library)
    return {**moment(curve), "best": best, "passes": passes, "limit": limit, "curve": curve}


def scores(
    needed: Callable[[float, int, int], float | None], limit: int, rates: tuple[float, ...]
) -> dict[tuple[float], float]:
    """What `espo_lightning.lab.choice` chooses rates by: minus the rollouts that a rate's pilots needed together.

    Of a rate that cannot need the fewest any more, or that does not bring every pilot to the target, it is -inf.

    Args:
        needed: (rate, seed, limit) -> rollouts that a pilot needed; None if it did not get there within the limit.
        limit: of any pilot. No pilot gets more rollouts than would leave its rate a chance.
        rates: in the order in which they are tried.
    """
    fewest, found = math.inf, {}
    for rate in rates:
        used = 0.0
        for seed in PILOTS:
            rollouts = needed(rate, seed, min(limit, math.ceil(fewest - used)) if fewest < math.inf else limit)
            used += math.inf if rollouts is None else rollouts
            if used >= fewest:
                break
        found[(rate,)] = -used if used < fewest else -math.inf
        fewest = min(fewest, used)
    return found


def rate_of(side: str, found: dict[tuple[float], float]) -> float | None:
    """The rate with the best of `scores`, or None if no rate brings every pilot to the target.

    Raises:
        EdgeChoice: it is the smallest or the largest that was tried.
    """
    return choose(found, [f"{side}: learning rate"])[0] if max(found.values()) > -math.inf else None


def rates_of(done: Callable[[str, float, int, int], dict], limit: int) -> dict[str, float | None]:
    """The rate of every side: that of its recipe, chosen on runs (side, rate, seed, limit) of the library."""

    def chosen(side: str, recipe: Recipe) -> float | None:
        rates = SMALLER if recipe == AUTHORS else RATES
        return rate_of(side, scores(lambda *pilot: done(side, *pilot)["rollouts"], limit, rates))

    rates = {recipe: chosen(side, recipe) for side, (trainer, recipe) in SIDES.items() if trainer is library}
    return {side: rates[recipe] for side, (_, recipe) in SIDES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=30, help="rollouts of a run (default: 30)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the chosen learning rate (default: 5)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options.output.parent.mkdir(exist_ok=True)
    stored = json.loads(options.output.read_text()) if options.output.exists() else {"host": host(), "runs": {}}
    runs = stored["runs"]

    def done(side: str, rate: float, seed: int, limit: int) -> dict:
        key = f"{side} lr={rate:g} seed={seed}"
        if key not in runs:
            runs[key] = run(side, rate, seed, limit)
            options.output.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{key:60} rollouts {runs[key]['rollouts']}  best {runs[key]['best']:.3f}", flush=True)
        return runs[key]

    stored["rates"] = rates_of(done, options.limit)
    for seed in range(10, 10 + options.seeds):
        for side, rate in stored["rates"].items():
            if rate:
                done(side, rate, seed, options.limit)
    for side, rate in stored["rates"].items():
        print(f"{side}: learning rate {rate}")
    options.output.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
