"""Notebook 13: does the divisor of the log-ratio decide how long answers become, and whether long chains are learnt?

An answer is a walk over the digits, by steps of one, up to 9, and ends there, well before the end of the canvas. It may
turn round on the way, so that right answers have many lengths, and every further step may be a slip. From a low digit
it takes many steps, all of which must be right.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.studies.states import as_text, new_module, set_weights, teach, train_or_diverge, untaught
from espo_lightning.objectives.advantages import leave_one_out
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.objectives.ratios import own_length_ratio, sequence_ratio, undivided_ratio
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO, Seen
from espo_lightning.tasks import Problem, Task, Verdict
from espo_lightning.tasks.base import rng

LENGTH = 64  # tokens of the canvas
GOAL = 9
STEPS = {"+": 1, "-": -1}
BANDS = {"near": range(1, 4), "middle": range(4, 7), "far": range(7, 10)}
GROUP, PROMPTS, UPDATES = 8, 8, 2  # completions of a prompt, prompts of a rollout, updates on it
UNSEEN = 1_000_000  # the seed of problems that no run trains on
DECODING = Decoding(length=LENGTH, block_length=8, steps=32, early_stop=True)
TYPICAL = 16  # tokens of an answer for which a clip in nats is the same in all arms
RATIOS = {"1/L": sequence_ratio, "1/|y|": own_length_ratio, "none": undivided_ratio}
DIVISORS = {"1/L": LENGTH, "1/|y|": TYPICAL, "none": 1}  # of an answer of `TYPICAL` tokens


# ---- the task --------------------------------------------------------------------------------------------


def verify(start: int, text: str) -> Verdict:
    """Score a walk such as "+7-6+7+8+9", from 6 to 9: signs, each with the digit that follows. Exact: all or nothing.

    Every step must be right, and the last digit 9. "tokens" is how long the text is, without its end; "ended" whether
    there is an end on the canvas.
    """
    right = re.fullmatch(r"(?:[-+][0-9])+", text, re.ASCII) is not None
    if right:
        digits = [start, *map(int, text[1::2])]
        right = digits[-1] == GOAL and all(b - a == STEPS[sign] for sign, a, b in zip(text[::2], digits, digits[1:]))
    return {"reward": float(right), "exact": float(right), "tokens": len(text), "ended": float(len(text) < LENGTH)}


def draw_walk(start: int, back: float, draw: Random) -> str:
    """Right steps from a digit to the goal, until it is reached, that fit the canvas with an end.

    Args:
        back: how probable it is that a step goes down, where there is one.
    """
    while True:
        digit, walk = start, ""
        while digit != GOAL and len(walk) < LENGTH - 2:
            sign = "-" if digit and draw.random() < back else "+"
            digit += STEPS[sign]
            walk += f"{sign}{digit}"
        if digit == GOAL:
            return walk


@dataclass(frozen=True)
class Walks(Task):
    """From a digit to 9 by + (one more) and - (one less), each with the digit it leads to, and then the end.

    Any right steps that end at 9 will do; the fewest are 9 less the digit, two tokens each.

    Args:
        nearest, farthest: the fewest steps of a problem, drawn evenly between these.
        back: how probable a step down is in a demonstration.
    """

    nearest: int = 1
    farthest: int = GOAL
    back: float = 0.2

    def problem(self, split: str, seed: int, index: int) -> Problem:
        draw = rng("walks", split, seed, index, self.nearest, self.farthest)
        start = GOAL - draw.randint(self.nearest, self.farthest)
        return Problem(f"{start}>", partial(verify, start), draw_walk(start, self.back, draw))


# ---- the base --------------------------------------------------------------------------------------------


def taught(seed: int, *, lessons: int) -> dict:
    """A small transformer from scratch after ``lessons`` batches of 64 demonstrations: its "weights" as text."""
    policy = untaught(seed)
    teach(policy, Walks(), seed, lessons, lr=4e-3, batch=64, length=LENGTH)
    return {"weights": as_text(policy)}


def base(weights: str) -> Policy:
    """The policy with these weights, of `as_text`."""
    return set_weights(untaught(0), weights)


# ---- what the divisor pushes at --------------------------------------------------------------------------


def pushes(seed: int, *, weights: str, problems: int) -> dict:
    """How fast length and reward would change along the policy gradients of the divisors, at the base.

    Of two independent halves of problems, one gives the policy gradients g, the mean of A / divisor times the gradient
    of the ELBO, and the other the gradients h of the expected reward and of the expected length, by the score-function
    estimate with the same ELBO. What counts is h g / |g|: the change by a step of length 1 in the space of the weights.

    Args:
        weights: of the base, see `taught`.
        problems: of each half, with `GROUP` completions each.

    Returns:
        Divisor -> "length" in tokens and "reward", for a step of length 1. "none" has the direction of "1/L".
    """
    policy = base(weights)
    first, second = (half_gradients(policy, UNSEEN + 2 * seed + half, problems) for half in (0, 1))
    names = {"1/L": "reward", "1/|y|": "per token"}
    norms = {name: first[name].norm().clamp(min=1e-12) for name in names.values()}
    return {
        divisor: {goal: float(second[goal] @ first[name] / norms[name]) for goal in ("length", "reward")}
        for divisor, name in names.items()
    }


def half_gradients(policy: Policy, seed: int, problems: int) -> dict[str, Tensor]:
    """Of the reward, of the reward per token of a completion, and of the length: [P] each, means over completions."""
    batch = [Walks().problem("train", seed, i) for i in range(problems) for _ in range(GROUP)]
    prompts, keys = policy.encode([p.prompt for p in batch]), fold_in(seed, torch.arange(len(batch)))
    completion = DECODING.generate(policy, prompts, keys)
    rewards = [p.verify(text)["reward"] for p, text in zip(batch, policy.decode(completion))]
    seen = Seen.of(policy, prompts, completion, keys)
    tokens = seen.valid.sum(-1).float()
    advantage = leave_one_out(torch.tensor(rewards).view(problems, GROUP)).flatten()
    elbo, parameters = ELBO(draws=2), list(policy.parameters())
    scores = elbo.terms(policy, prompts, completion, elbo.masks(keys, seen)).sum(-1).mean(0)
    weights = {
        "reward": advantage,
        "per token": advantage / tokens,
        "length": leave_one_out(tokens.view(problems, GROUP)).flatten(),
    }
    gradients = {}
    for name, weight in weights.items():
        parts = torch.autograd.grad((weight * scores).mean(), parameters, retain_graph=True, allow_unused=True)
        gradients[name] = parameters_to_vector(
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts)]
        )
    return gradients


# ---- training --------------------------------------------------------------------------------------------


def objective_of(divisor: str, clip_nats: float | None) -> PolicyGradient:
    """The clipped policy gradient without a penalty.

    Args:
        divisor: a key of `RATIOS`.
        clip_nats: how far the score of an answer of `TYPICAL` tokens may move in either direction; None = no clip.
    """
    if clip_nats is None:
        return PolicyGradient(ratio=RATIOS[divisor], clip_range=math.inf, beta=0.0)
    each = clip_nats / DIVISORS[divisor]
    return PolicyGradient(ratio=RATIOS[divisor], clip_range=-math.expm1(-each), clip_high=math.expm1(each), beta=0.0)


def run(
    seed: int, *, weights: str, divisor: str, lr: float, clip_nats: float | None, rollouts: int, at: list[int]
) -> tuple[dict[int, Policy], bool]:
    """RL from the base: the policies after the rollouts ``at``, and whether the run diverged."""
    module = new_module(
        base(weights),
        seed,
        lr=lr,
        decoding=DECODING,
        group_size=GROUP,
        updates=UPDATES,
        likelihood=ELBO(draws=2),
        objective=objective_of(divisor, clip_nats),
    )
    snapshots, diverged = train_or_diverge(module, Walks(), seed, rollouts, at, batch=PROMPTS)
    return dict(sorted(snapshots.policies.items())), diverged


def pilot(seed: int, *, problems: int, rollouts: int, **settings) -> dict:
    """A run for its "score" alone: the mean reward at the end, on problems that nothing else uses; 0 if it diverged."""
    policies, diverged = run(seed, rollouts=rollouts, at=[rollouts], **settings)
    score = 0.0 if diverged else measured(policies[rollouts], UNSEEN - 1, problems)["reward"]
    return {"score": score, "diverged": diverged}


def trained(seed: int, *, problems: int, rollouts: int, every: int, **settings) -> dict:
    """A run of RL, see `run`.

    Returns:
        "curve": what `measured` says, with its "rollout". "diverged": whether it ended early.
    """
    policies, diverged = run(seed, rollouts=rollouts, at=list(range(0, rollouts + 1, every)), **settings)
    return {
        "curve": [{"rollout": n, **measured(policy, UNSEEN, problems)} for n, policy in policies.items()],
        "diverged": diverged,
    }


def measured(policy: Policy, seed: int, problems: int) -> dict:
    """Of one sampled answer to each of ``problems`` problems of every distance.

    Returns:
        "reward" of all, and "near", "middle" and "far" of those with 1 to 3, 4 to 6 and 7 to 9 steps. "tokens": mean
        length without the end, and "ended", the share that has one. "right_tokens", "wrong_tokens": the length of right
        and of wrong answers, and "right_extra", "wrong_extra" what of it is beyond the fewest that the problem takes;
        None if there are none.
    """
    distances = [distance for distance in range(1, GOAL + 1) for _ in range(problems)]
    asked = [Walks(distance, distance).problem("test", seed, i) for i, distance in enumerate(distances)]
    _, verdicts = solve(policy, asked, fold_in(seed, torch.arange(len(asked))), DECODING)

    def mean(key: str, chosen: list[int]) -> float:
        return round(sum(verdicts[i][key] for i in chosen) / len(chosen), 4)

    def tokens(name: str, right: float) -> dict[str, float | None]:
        chosen = [i for i, verdict in enumerate(verdicts) if verdict["reward"] == right]
        if not chosen:
            return {f"{name}_tokens": None, f"{name}_extra": None}
        fewest = 2 * sum(distances[i] for i in chosen) / len(chosen)
        length = mean("tokens", chosen)
        return {f"{name}_tokens": length, f"{name}_extra": round(length - fewest, 4)}

    every = range(len(asked))
    bands = {name: [i for i in every if distances[i] in steps] for name, steps in BANDS.items()}
    return {
        **{key: mean(key, [*every]) for key in ("reward", "tokens", "ended")},
        **{name: mean("reward", chosen) for name, chosen in bands.items()},
        **tokens("right", 1.0),
        **tokens("wrong", 0.0),
    }
