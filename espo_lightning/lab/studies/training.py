"""Notebooks 04 and 05: training runs."""

from functools import cache

import torch

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.studies.arms import PROMPTS, Arm
from espo_lightning.lab.studies.states import SUDOKU, State, contested_states, held_out, train_or_diverge, true_measures
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.tasks import Sudoku

TASK = Sudoku()
UNSEEN = 1_000_000  # the seed of puzzles that no run trains on


def training_run(
    seed: int,
    *,
    arm: dict,
    rollouts: int,
    points: int,
    states: int = 4,
    free: int = 3,
    problems: int = 256,
    prompts: int = PROMPTS,
) -> dict:
    """One run of RL: rewards of every rollout, and exact quantities on the way.

    Args:
        arm: of an `Arm`.
        points: measurements after the first, evenly spread; the last is of the final policy.
        states, free: puzzles for the exact KL to the base, the gap and the entropy, as in `kl_training`.
        problems: puzzles of each accuracy: held out, decoded greedily ("exact", "cell"); from training grids, sampled
            ("reward").
        prompts: of every rollout.

    Returns:
        "curve": measurements with their "rollout". "reward", "exact": means over the completions of every rollout.
        "diverged": whether the run ended early because gradients were not finite; its curve is then shorter.
    """
    at = {round(rollouts * i / points) for i in range(points + 1)}
    snapshots, diverged = train_or_diverge(Arm(**arm).module(seed), TASK, seed, rollouts, at, prompts)
    trained = {rollout: policy for rollout, policy in sorted(snapshots.policies.items()) if rollout}
    curve = [{"rollout": 0, **measures_of_the_base(seed, states, free, problems)}]
    for rollout, policy in trained.items():
        curve.append({"rollout": rollout, **measures(policy, contested(seed, states, free), problems)})
    return {
        "curve": curve,
        **{key: [round(x, 4) for x in snapshots.means(key)] for key in ("reward", "exact")},
        "diverged": diverged,
    }


def pilot_run(seed: int, *, arm: dict, rollouts: int, problems: int, prompts: int = PROMPTS) -> dict:
    """A training run for its "score" alone: the mean reward of the final policy's samples; 0 if it diverged.

    They are of puzzles that no run trains on, and other ones than `training_run` measures with.
    """
    snapshots, diverged = train_or_diverge(Arm(**arm).module(seed), TASK, seed, rollouts, {rollouts}, prompts)
    score = 0.0 if diverged else sampled_reward(snapshots.policies[rollouts], UNSEEN + 1, problems)
    return {"score": round(score, 4), "diverged": diverged}


@cache
def contested(seed: int, states: int, free: int) -> list[State]:
    """The puzzles of a run, see `contested_states`."""
    return contested_states(load_policy(SUDOKU), seed, states, free)


@cache
def measures_of_the_base(seed: int, states: int, free: int, problems: int) -> dict[str, float]:
    """All runs of a seed begin with these."""
    return measures(load_policy(SUDOKU), contested(seed, states, free), problems)


def measures(policy: Policy, states: list[State], problems: int) -> dict[str, float]:
    """A point of a learning curve."""
    reward = {"reward": sampled_reward(policy, UNSEEN, problems)}
    every = {**held_out(policy, TASK, problems), **reward, **true_measures(states, policy)}
    return {key: round(value, 4) for key, value in every.items()}


def sampled_reward(policy: Policy, seed: int, problems: int) -> float:
    """Mean reward of one sampled completion of every puzzle of a seed."""
    puzzles = [TASK.problem("train", seed, i) for i in range(problems)]
    _, verdicts = solve(policy, puzzles, fold_in(seed, torch.arange(problems)), Decoding())
    return sum(verdict["reward"] for verdict in verdicts) / problems


def final_reward(run: dict) -> float:
    """Mean sampled reward of a run's final policy, on puzzles that it was not trained on; 0 if the run diverged."""
    return 0.0 if run["diverged"] else run["curve"][-1]["reward"]
