"""Notebooks 14 and 15: RL on canvases of 16 to 128 tokens, which arms learn there and which collapse.

Bases, task and decoder are those of `horizon`: one small policy for all canvases, and chains that fill them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.studies.horizon import LIKELIHOODS, chains, decoder, taught
from espo_lightning.lab.studies.ratios import RATIOS
from espo_lightning.lab.studies.states import as_text, new_module, set_weights, train_or_diverge, untaught
from espo_lightning.objectives.objective import Scores, Statistics
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.policy import Policy
from espo_lightning.training.module import ESPOModule

# splits and seeds of problems: those that measure a run, of pairs of digits that none trains on, and those that choose
# settings, of the pairs that all train on, drawn anew, so that nothing is chosen by what measures
TEST, TUNING = ("test", 0), ("train", 1_000_000)
WATCHED = ("reward", "grad_norm", "terms", "log_ratio_max", "clip_low", "clip_high")


def base(seed: int, *, canvases: list[int], lessons: int, rounds: int, answers: int) -> dict:
    """A policy for all canvases, see `horizon.taught`.

    Returns:
        "weights": see `as_text`. "measured": length -> what `measured` says of ``answers`` answers to test problems.
    """
    policy = taught(seed, canvases, lessons, rounds)
    found = {str(length): measured(policy, length, answers, TEST) for length in canvases}
    return {"weights": as_text(policy), "measured": found}


@dataclass(frozen=True)
class Watched(PolicyGradient):
    """Also says of every completion how many "terms" make its gradient, as a share of those that are scored.

    That statistic, [B], is (sum of |g|)^2 / (sum of g^2) / terms, over the derivatives g of its loss in the
    log-probabilities: 1 if all have the same size, 1 over their number if one drowns the others, 0 if all are clipped.
    """

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        losses, statistics = super().__call__(scores, advantages, group)
        (slope,) = torch.autograd.grad(losses.sum(), scores.new, retain_graph=True)
        size, square = slope.abs().sum((0, 2)).square(), slope.square().sum((0, 2))
        effective = torch.where(square > 0, size / square, 0.0)
        return losses, statistics | {"terms": effective / scores.scored.sum((0, 2))}


def passes(length: int, *, likelihood: str, updates: int, beta: float = 0.0) -> int:
    """What a rollout and its updates cost, in forward passes of a whole canvas per completion; a backward pass is two.

    The mean field, which draws no masks, scores its old values in the first update, and those of the reference once.
    FLOPs are nearly in proportion: counted exactly (`module_flops`), they are up to an eighth more for the mean field,
    whose updates differentiate all positions of a pass, where each of a pair has half of them.
    """
    law = LIKELIHOODS[likelihood]
    views = len(law.draw(torch.zeros(1, dtype=torch.int64), length).rows()[0])
    others = (updates - 1 if law.random else 0) + (beta > 0) * (updates if law.random else 1)
    return decoder(length).passes + views * (3 * updates + others)


def module_of(
    policy: Policy,
    seed: int,
    length: int,
    *,
    ratio: str,
    likelihood: str,
    updates: int,
    lr: float,
    clip_range: float | None,
    beta: float = 0.0,
) -> ESPOModule:
    """The module that trains an arm.

    Args:
        ratio: a key of `RATIOS`.
        likelihood: a key of `LIKELIHOODS`.
        updates: mu.
        lr: learning rate.
        clip_range: eps in the unit of the ratio; None = no clip.
        beta: of the k2 penalty.
    """
    clip = math.inf if clip_range is None else clip_range
    return new_module(
        policy,
        seed,
        lr=lr,
        decoding=decoder(length),
        likelihood=LIKELIHOODS[likelihood],
        objective=Watched(ratio=RATIOS[ratio], clip_range=clip, beta=beta),
        updates=updates,
    )


def trained(
    seed: int, *, bases: dict[str, str], length: int, rollouts: int, prompts: int, answers: int, pilot: bool, **arm
) -> dict:
    """RL of a base on one canvas.

    Args:
        bases: seed, as text -> weights of `base`.
        length: of the canvas.
        rollouts: so many, of ``prompts`` problems with 8 completions each.
        answers: that measure the last policy.
        pilot: measure it on `TUNING` instead of `TEST`, and keep nothing of what was watched.
        arm: see `module_of`.

    Returns:
        What `measured` says of the last policy, 0 if the run "diverged". "watched": what `WATCHED` names, of every
        rollout.
    """
    module = module_of(set_weights(untaught(0), bases[str(seed)]), seed, length, **arm)
    snapshots, diverged = train_or_diverge(module, chains(length), seed, rollouts, {rollouts}, prompts)
    if diverged:
        after = dict.fromkeys(("reward", "step", "target", "exact"), 0.0)
    else:
        after = measured(snapshots.policies[rollouts], length, answers, TUNING if pilot else TEST)
    watched = {key: [finite(row.get(f"train/{key}", math.nan)) for row in snapshots.metrics] for key in WATCHED}
    return {**after, "diverged": diverged, "watched": {} if pilot else watched}


def measured(policy: Policy, length: int, answers: int, where: tuple[str, int]) -> dict[str, float]:
    """Means over sampled answers, one to each of so many problems of a split and seed."""
    problems = [chains(length).problem(*where, i) for i in range(answers)]
    verdicts = []
    for first in range(0, answers, 64):
        some = problems[first : first + 64]
        verdicts += solve(policy, some, fold_in(1, torch.arange(first, first + len(some))), decoder(length))[1]
    return {key: round(sum(v[key] for v in verdicts) / answers, 4) for key in ("reward", "step", "target", "exact")}


def finite(value: float, digits: int = 4) -> float | None:
    """Rounded to so many significant digits; None for what is not finite, since a stored result has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
