"""Notebooks 06 and 08: RL from bases that are rarely right, and how their rewards rise."""

from copy import deepcopy
from dataclasses import dataclass

import torch

from espo_lightning.lab.exact import random_order_log_likelihood, subset_log_probs
from espo_lightning.lab.studies.arms import PROMPTS, Arm
from espo_lightning.lab.studies.states import SUDOKU, empty_cells, held_out, new_module, teach, train, train_or_diverge
from espo_lightning.lab.studies.statistics import broken_line, first_above
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.tasks import Problem, Sudoku, Task
from espo_lightning.training.supervised import encode_answers

LESSON_RATE = 5e-4  # the peak learning rate of the lessons that make a right answer rarer


@dataclass(frozen=True)
class Curriculum(Task):
    """Sudoku, all or nothing, whose training puzzles get harder: more and more empty cells. Test puzzles have most.

    Args:
        levels: empty cells.
        per_level: training puzzles of each level but the last.
    """

    levels: tuple[int, ...]
    per_level: int

    def problem(self, split: str, seed: int, index: int) -> Problem:
        level = min(index // self.per_level, len(self.levels) - 1) if split == "train" else -1
        return Sudoku(empty=self.levels[level], reward="exact").problem(split, seed, index)


def jump(
    seed: int,
    *,
    right: float,
    rewards: list[str],
    lessons: int,
    rollouts: int,
    every: int,
    puzzles: int,
    problems: int,
    levels: list[int],
    per_level: int,
) -> dict:
    """RL with every reward from one base that gives right answers with a small probability.

    Args:
        right: share of right answers in the lessons that make the base from the bundled policy; the rest is its habit.
        rewards: "cell", "all or nothing", "curriculum".
        lessons: batches of 128.
        rollouts: of every run.
        every: rollouts between two probes.
        puzzles: of `contested_problems`, whose right answers' exact likelihood is probed; no training puzzles.
        problems: held-out puzzles, decoded greedily, before and after.
        levels, per_level: of the `Curriculum`; per_level in rollouts.

    Returns:
        "base": held-out accuracy. "arms": reward -> "reward", "exact", "cell" and "idle" of every rollout (of its own
        puzzles, see `Snapshots`), "probes", and "held_out" after training.
    """
    tasks = {
        "cell": Sudoku(),
        "all or nothing": Sudoku(reward="exact"),
        "curriculum": Curriculum(tuple(levels), per_level * PROMPTS),
    }
    base = rarely_right(seed, right, lessons)
    probed = contested_problems(seed + 2000, puzzles)
    arms = {}
    for reward in rewards:
        policy = deepcopy(base)
        snapshots = train(
            new_module(policy, seed, objective=PolicyGradient(beta=0.0)),
            tasks[reward],
            seed,
            rollouts,
            range(0, rollouts + 1, every),
            batch=PROMPTS,
        )
        arms[reward] = {
            **{key: [round(x, 4) for x in snapshots.means(key)] for key in ("reward", "exact", "cell", "idle")},
            "probes": [{"rollout": at, **probe(p, probed)} for at, p in sorted(snapshots.policies.items())],
            "held_out": held_out(policy, Sudoku(), problems),
        }
    return {"base": held_out(base, Sudoku(), problems), "arms": arms}


def rare_mode(
    seed: int,
    *,
    arms: dict[str, dict],
    right: float,
    lessons: int,
    rollouts: int,
    every: int,
    puzzles: int,
    problems: int,
) -> dict:
    """RL on cell reward with every `Arm` from one base that gives right answers with a small probability.

    Args:
        arms: name -> settings of an `Arm`.
        right, lessons, rollouts, every, puzzles, problems: as in `jump`; held-out accuracy is measured at every probe.

    Returns:
        "arms": name -> "curve": measurements with their "rollout"; "reward" and "idle" of every rollout; "diverged",
        whether the run ended early, as in `training_run`.
    """
    base = rarely_right(seed, right, lessons)
    probed = contested_problems(seed + 2000, puzzles)
    results = {}
    for name, settings in arms.items():
        module = Arm(**settings).module(seed, policy=deepcopy(base))
        at = {*range(0, rollouts, every), rollouts}
        snapshots, diverged = train_or_diverge(module, Sudoku(), seed, rollouts, at, PROMPTS)
        results[name] = {
            "curve": [
                {"rollout": rollout, **probe(policy, probed), **held_out(policy, Sudoku(), problems)}
                for rollout, policy in sorted(snapshots.policies.items())
            ],
            **{key: [round(x, 4) for x in snapshots.means(key)] for key in ("reward", "idle")},
            "diverged": diverged,
        }
    return {"arms": results}


def rarely_right(seed: int, right: float, lessons: int) -> Policy:
    """The bundled policy after lessons of which the share ``right`` is right and the rest its habit."""
    policy = load_policy(SUDOKU)
    teach(policy, Sudoku(right=right), seed, lessons, LESSON_RATE)
    return policy


def contested_problems(seed: int, count: int) -> list[Problem]:
    """Puzzles with 8 empty cells for which the habit's answer is wrong; for some of them it happens to be right."""
    found, index = [], 0
    while len(found) < count:
        problem, habit = (Sudoku(right=right).problem("train", seed, index) for right in (1.0, 0.0))
        if not problem.verify(habit.answer)["exact"]:
            found.append(problem)
        index += 1
    return found


@torch.no_grad()
def probe(policy: Policy, problems: list[Problem]) -> dict[str, float]:
    """Mean probability and mean log-odds that the random-order decoder gives the right answer, exactly.

    The givens are visible and digits are the only tokens, as in `FreeCells`.
    """
    answers = encode_answers(policy, [p.answer for p in problems], 16)
    rows = []
    for problem, answer in zip(problems, answers):
        cells, small = empty_cells(policy, problem, answer)
        table = subset_log_probs(cells, policy.encode([problem.prompt]), small)
        rows.append(random_order_log_likelihood(table))
    probability = torch.stack(rows).exp()
    return {
        "probability": float(f"{float(probability.mean()):.4g}"),
        "log_odds": round(float(probability.logit(eps=1e-9).mean()), 4),
    }


def growth(probes: list[dict]) -> dict[str, float] | None:
    """`broken_line` of the log-odds over the rollouts, from the first to 90 % of the way; None if there are too few."""
    values = [p["log_odds"] for p in probes]
    end = first_above(values, values[0] + 0.9 * (max(values) - values[0])) + 1
    if end < 4 or len(set(values[:end])) < 2:
        return None
    return broken_line([p["rollout"] for p in probes[:end]], values[:end])._asdict()


def covered(probes: list[dict], level: float = 0.1) -> float | None:
    """Share of the log-odds' way to their maximum that is behind when the probability first reaches ``level``.

    None if it never does, or did at the start.
    """
    index = first_above([p["probability"] for p in probes], level)
    values = [p["log_odds"] for p in probes]
    return (values[index] - values[0]) / (max(values) - values[0]) if index else None
