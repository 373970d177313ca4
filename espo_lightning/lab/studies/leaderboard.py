"""Notebook 09: training runs of whole methods on equal terms, and what these terms are."""

import time
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding
from espo_lightning.decoding.orders import left_to_right, low_confidence, random_order
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.methods import Method, make_method
from espo_lightning.lab.studies.arms import module_flops
from espo_lightning.lab.studies.states import (
    COUNTDOWN,
    SMALL_COUNTDOWN,
    SUDOKU,
    Snapshots,
    new_module,
    train_or_diverge,
)
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import Seen
from espo_lightning.scoring.trajectory import Trajectory
from espo_lightning.tasks import Sudoku, Task
from espo_lightning.training.module import ESPOModule

GROUP = 8  # completions per prompt, the default of `fit`
SAMPLES = 128  # completions of the measure that chooses a learning rate
PATHS = 32  # completions of the KL to the base
OTHERS = (random_order, left_to_right)  # orders that methods on traces train with
UNSEEN = 1_000_000  # the seed of training problems that no run trains on


@dataclass(frozen=True)
class Contest:
    """A bundled policy, the task it was made for, and the canvas of its answers (L)."""

    policy: str
    task: Task
    length: int

    def decoding(self, **changes: Any) -> Decoding:
        """The decoder of all that allow it: one block, one token a step, low confidence first, temperature 1."""
        return Decoding(self.length, self.length, self.length, **changes)


CONTESTS = {"Sudoku": Contest(SUDOKU, Sudoku(), 16), "Countdown": Contest(COUNTDOWN, SMALL_COUNTDOWN, 12)}


def belongs(method: Method) -> bool:
    """Whether a method is one for masked diffusion policies that attend to the whole canvas, as a contest's do."""
    return type(method.decoding) is Decoding


def on_equal_terms(settings: dict[str, Any], contest: str) -> Method:
    """A method with the decoder of a contest.

    A likelihood of the decoder's trace is made for one order of decoding, so that such a method keeps its own. The
    temperature is 1 for all, in the decoder and in the likelihoods that have one.

    Args:
        settings: of `method_settings`.
        contest: a key of `CONTESTS`.

    Raises:
        ValueError: the method is not one for masked diffusion policies.
    """
    method = make_method(settings)
    if not belongs(method):
        raise ValueError(
            f"the leaderboard's policies are masked diffusion models that attend to the whole canvas: decoding must be "
            f"Decoding, got {type(method.decoding).__name__}"
        )
    order = method.decoding.order if method.likelihood.traced else low_confidence
    warm = {"temperature": 1.0} if "temperature" in {field.name for field in fields(method.likelihood)} else {}
    decoding = CONTESTS[contest].decoding(order=order)
    return replace(method, decoding=decoding, likelihood=replace(method.likelihood, **warm))


def entered(settings: dict[str, Any], contest: str, seed: int, lr: float, kind=ESPOModule, **changes) -> ESPOModule:
    """A new module of a method on equal terms, with all else as in `fit`."""
    method = on_equal_terms(settings, contest)
    arguments = {field.name: getattr(method, field.name) for field in fields(method)}
    policy = load_policy(CONTESTS[contest].policy)
    return new_module(policy, seed, kind, lr=lr, group_size=GROUP, **arguments, **changes)


def step_flops(settings: dict[str, Any], contest: str, prompts: int) -> dict[str, float]:
    """FLOPs of every phase of a method's training step, see `module_flops`."""
    return module_flops(entered(settings, contest, 0, 1e-4), CONTESTS[contest].task, CONTESTS[contest].policy, prompts)


def final_run(
    seed: int, *, method: dict, contest: str, lr: float, rollouts: int, prompts: int, points: int, problems: int
) -> dict:
    """A training run, measured on held-out problems.

    Args:
        method: of `method_settings`.
        contest: a key of `CONTESTS`.
        rollouts, prompts: how many rollouts, of how many prompts.
        points: measurements, evenly spread; the last is of the final policy.
        problems: held-out problems of every accuracy, the first half of them on the way.

    Returns:
        "curve": "exact" on the first half of the problems after so many rollouts. "exact": of the final policy, low
        confidence first, greedy. "own": the same in the order that the method trained with, where that is another.
        "kl": see `path_kl`. "reward", "idle": of every rollout. "diverged": whether gradients were not finite, so that
        the final policy is that of the last measurement before. "wall", "cpu": seconds of the training alone.
    """
    at = {round(rollouts * i / points) for i in range(points + 1)} | {rollouts}
    snapshots, diverged, cost = timed_run(seed, method, contest, lr, rollouts, prompts, at)
    last = max(snapshots.policies)
    ends = measures(snapshots.policies[last], contest, on_equal_terms(method, contest).decoding, problems)
    few = max(1, problems // 2)
    curve = [
        {"rollout": n, "exact": accuracy(policy, contest, CONTESTS[contest].decoding(), few)}
        for n, policy in sorted(snapshots.policies.items())
        if 0 < n < last
    ]
    return {
        "curve": [*curve, {"rollout": last, "exact": ends.pop("few")}],
        **ends,
        "kl": path_kl(snapshots.policies[last], contest, PATHS),
        **{key: [round(x, 4) for x in snapshots.means(key)] for key in ("reward", "idle")},
        "diverged": diverged,
        **cost,
    }


def pilot_run(seed: int, *, method: dict, contest: str, lr: float, rollouts: int, prompts: int) -> dict:
    """A training run for its "score" alone: the mean reward of the final policy's samples, drawn as in its rollouts.

    They are of training problems that no run trains on, so that nothing held out is looked at; 0 if it diverged.
    """
    snapshots, diverged, cost = timed_run(seed, method, contest, lr, rollouts, prompts, {rollouts})
    if diverged:
        return {"score": 0.0, "diverged": True, **cost}
    decoding = on_equal_terms(method, contest).decoding
    return {"score": sampled_reward(snapshots.policies[rollouts], contest, decoding), "diverged": False, **cost}


def base_run(seed: int, *, contest: str, problems: int) -> dict:
    """The same measures of the policy that every run begins with. seed: of nothing."""
    policy, make = load_policy(CONTESTS[contest].policy), CONTESTS[contest].decoding
    orders = {order.__name__: accuracy(policy, contest, make(order=order), problems) for order in OTHERS}
    return {**measures(policy, contest, make(), problems), **orders, "reward": sampled_reward(policy, contest, make())}


def timed_run(
    seed: int, method: dict, contest: str, lr: float, rollouts: int, prompts: int, at: set[int]
) -> tuple[Snapshots, bool, dict[str, float]]:
    """Policies after ``at`` rollouts, whether the run diverged, and its seconds."""
    module = entered(method, contest, seed, lr)
    wall, cpu = time.perf_counter(), time.process_time()
    snapshots, diverged = train_or_diverge(module, CONTESTS[contest].task, seed, rollouts, at | {0}, prompts)
    cost = {"wall": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}
    return snapshots, diverged, cost


# ---- measures -------------------------------------------------------------------------------------------------------


def measures(policy: Policy, contest: str, own: Decoding, problems: int) -> dict[str, float]:
    """Greedy accuracy on held-out problems: "exact", "few" of their first half, "own" if the order is another."""
    right = solved(policy, contest, CONTESTS[contest].decoding(), problems)
    few = max(1, problems // 2)
    found = {"exact": sum(right) / problems, "few": sum(right[:few]) / few}
    return found if own.order is low_confidence else found | {"own": accuracy(policy, contest, own, problems)}


def accuracy(policy: Policy, contest: str, decoding: Decoding, problems: int) -> float:
    """Share of the first held-out problems that greedy decoding solves."""
    return sum(solved(policy, contest, decoding, problems)) / problems


def solved(policy: Policy, contest: str, decoding: Decoder, problems: int) -> list[float]:
    """1 for every held-out problem that greedy decoding solves, 0 for others."""
    batch = [CONTESTS[contest].task.problem("test", 0, i) for i in range(problems)]
    _, verdicts = solve(policy, batch, fold_in(0, torch.arange(problems)), decoding.greedy)
    return [verdict["exact"] for verdict in verdicts]


def sampled_reward(policy: Policy, contest: str, decoding: Decoder) -> float:
    """Mean reward of samples on training problems that no run trains on."""
    batch = [CONTESTS[contest].task.problem("train", UNSEEN, i) for i in range(SAMPLES)]
    _, verdicts = solve(policy, batch, fold_in(UNSEEN, torch.arange(SAMPLES)), decoding)
    return sum(verdict["reward"] for verdict in verdicts) / SAMPLES


@torch.no_grad()
def path_kl(policy: Policy, contest: str, paths: int) -> float:
    """KL of a policy to its base, nats per completion: of what a random-order decoder does on held-out problems.

    KL(pi || base) of the paths, which bounds that of the completions from above, is a sum over the L steps. Each is
    estimated on the policy's own samples by ``base / pi - 1 - log(base / pi)``, which is unbiased and never negative.
    """
    batch = [CONTESTS[contest].task.problem("test", 0, i).prompt for i in range(paths)]
    prompts, keys = policy.encode(batch), fold_in(UNSEEN, torch.arange(paths))
    decoding = CONTESTS[contest].decoding(order=random_order)
    completion, trace = decoding.decode(policy, prompts, keys)
    law = Trajectory()
    masks = law.masks(keys, Seen.of(policy, prompts, completion, keys, trace=trace))
    own, base = (
        law.log_probs(scorer, prompts, completion, masks).sum(0)  # each token is scored in one state
        for scorer in (policy, load_policy(CONTESTS[contest].policy))
    )
    ratio = (base - own).double()  # log, [B, L]
    return float((ratio.exp() - 1 - ratio).sum(1).mean())
