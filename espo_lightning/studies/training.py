"""Notebooks 04 and 05: training runs."""

from espo_lightning.checkpoint import load_policy
from espo_lightning.studies.arms import PROMPTS, Arm
from espo_lightning.studies.states import SUDOKU, Diverged, contested_states, held_out, train, true_measures
from espo_lightning.tasks import Sudoku


def training_run(
    seed: int, *, arm: dict, rollouts: int, points: int, states: int = 4, free: int = 3, problems: int = 256
) -> dict:
    """One run of RL: rewards of every rollout, and exact quantities on the way.

    Args:
        arm: of an `Arm`.
        points: measurements after the first, evenly spread; the last is of the final policy.
        states, free: puzzles for the exact KL to the base, the gap and the entropy, as in `kl_training`.
        problems: held-out puzzles, decoded greedily.

    Returns:
        "curve": measurements with their "rollout". "reward", "exact": means over the completions of every rollout.
        "diverged": whether the run ended early because gradients were not finite; its curve is then shorter.
    """
    task = Sudoku()
    contested = contested_states(load_policy(SUDOKU), seed, states, free)
    at = {round(rollouts * i / points) for i in range(points + 1)}
    diverged = False
    try:
        snapshots = train(Arm(**arm).module(seed), task, seed, rollouts, at, PROMPTS)
    except Diverged as error:
        snapshots, diverged = error.snapshots, True
    curve = [
        {"rollout": r, **rounded({**held_out(policy, task, problems), **true_measures(contested, policy)})}
        for r, policy in sorted(snapshots.policies.items())
    ]
    return {
        "curve": curve,
        **{key: [round(x, 4) for x in snapshots.means(key)] for key in ("reward", "exact")},
        "diverged": diverged,
    }


def rounded(measures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in measures.items()}


def final_reward(run: dict) -> float:
    """Mean sampled reward of a run's last quarter of rollouts: how pilots are compared. 0 if it diverged."""
    rewards = run["reward"]
    last = rewards[-max(1, len(rewards) // 4) :]
    return 0.0 if run["diverged"] else sum(last) / len(last)
