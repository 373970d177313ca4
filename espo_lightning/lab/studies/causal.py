"""Notebook 02's control: token- and sequence-level ratios of an autoregressive policy, whose likelihood is exact."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.decoding.causal import AutoregressiveDecoding
from espo_lightning.lab.exact import enumerate_completions
from espo_lightning.lab.gradients import cosine
from espo_lightning.lab.studies.ratios import RATIOS, Recorded, surrogate
from espo_lightning.lab.studies.states import empty_cells, moments, new_module, train
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.scoring.likelihood import Autoregressive
from espo_lightning.tasks import Problem, Sudoku
from espo_lightning.training.supervised import encode_answers

CAUSAL = "bundled:sudoku_causal"
LIKELIHOOD = Autoregressive()


class Fillings(NamedTuple):
    """All ways to fill a puzzle's n empty cells. prompts: of one row. completions: [4^n, 16]. rewards: float64 [4^n].

    A trained causal policy copies the givens, so that these answers have nearly all of its probability.
    """

    prompts: Prompts
    completions: Tensor
    rewards: Tensor


def causal_ratios(
    seed: int, *, warm: list[int], updates: list[int], states: int, free: int, clip_nats: list[float]
) -> dict:
    """Token- and sequence-level gradients of the causal policy against the exact off-policy gradient, as in `ratios`.

    Args:
        warm, updates, states, free, clip_nats: see `ratios`. There are no masks to draw.
    """
    task, base = Sudoku(), load_policy(CAUSAL)
    puzzles = contested_fillings(base, seed, states, free)
    settings = {"decoding": AutoregressiveDecoding(16), "likelihood": LIKELIHOOD}
    policies = train(new_module(load_policy(CAUSAL), seed, **settings), task, seed, max(1, *warm), warm).policies
    stages = []
    for at, policy in sorted(policies.items()):
        module = new_module(policy, seed + 1, Recorded, updates=max(updates), **settings)
        train(module, task, seed + 1, 1)
        rollout, old = module.last_rollout, module.iterates[0]
        for u in updates:
            with torch.no_grad():
                before, now = (
                    LIKELIHOOD.terms(p, rollout.prompts, rollout.completion, rollout.masks[0])
                    for p in (old, module.iterates[u])
                )
            change = (now - before)[0]
            stages.append(
                {
                    "rollout": at,
                    "updates": u,
                    **causal_off_policy(puzzles, old, module.iterates[u], clip_nats),
                    "sd": {"token": float(change.std()), "sequence": float(change.mean(-1).std())},
                }
            )
    return {"stages": stages}


def fillings(policy: Policy, problem: Problem) -> Fillings:
    """A puzzle's."""
    cells, small = empty_cells(policy, problem, encode_answers(policy, [problem.answer], 16)[0])
    completions = cells.canvas.repeat(4 ** len(small), 1)
    completions[:, cells.free] = cells.symbols[enumerate_completions(4, len(small))]
    rewards = [problem.verify(text)["reward"] for text in policy.decode(completions)]
    return Fillings(policy.encode([problem.prompt]), completions, torch.tensor(rewards, dtype=torch.float64))


def causal_terms(policy: Policy, puzzle: Fillings, rows: slice = slice(None)) -> Tensor:
    """log p(y_i | x, y_<i) of some fillings: float64 [1, n, 16]."""
    completions = puzzle.completions[rows]
    masks = LIKELIHOOD.draw(torch.zeros(len(completions), dtype=torch.int64), completions.shape[1])
    return LIKELIHOOD.terms(policy, puzzle.prompts.repeat_each(len(completions)), completions, masks).double()


@torch.no_grad()
def contested_fillings(base: Policy, seed: int, count: int, free: int, spread: float = 0.05) -> list[Fillings]:
    """Training puzzles about which the base is of two minds, as `contested_states`."""
    found, index = [], 0
    while len(found) < count:
        puzzle = fillings(base, Sudoku(empty=free).problem("train", seed, index))
        if moments(puzzle.rewards, causal_terms(base, puzzle).sum((0, 2)).exp())[1] >= spread:
            found.append(puzzle)
        index += 1
    return found


def causal_off_policy(puzzles: list[Fillings], old: Policy, policy: Policy, clip_nats: list[float]) -> dict:
    """Cosine of every estimator's mean gradient with the exact one, and noise, all puzzles together.

    Everything is exact, for y among the fillings with the probabilities of ``old``; "covered" is what these sum to.
    """
    parameters = list(policy.parameters())
    totals, variance, covered, divergence = 0, 0, [], []
    for puzzle in puzzles:
        with torch.no_grad():
            before, now = causal_terms(old, puzzle), causal_terms(policy, puzzle)
        probability = before.sum((0, 2)).exp()
        covered.append(float(probability.sum()))
        probability = probability / probability.sum()
        advantage = puzzle.rewards - probability @ puzzle.rewards
        divergence.append(float(probability @ (before - now).sum((0, 2))))
        functions = {
            f"{level}, {nats:g}": partial(surrogate, before, advantage, ratio, nats)
            for level, ratio in RATIOS.items()
            for nats in (math.inf, *clip_nats)
        }
        functions["target"] = lambda t, b=before, a=advantage: -(a * (t - b).sum((0, 2)).exp()).sum()
        leaf = now.requires_grad_()
        slopes = torch.stack([torch.autograd.grad(f(leaf), leaf)[0][0] for f in functions.values()], 1)  # [4^n, E, 16]
        mean, square = 0, 0
        for row, weight in enumerate(probability):
            terms = causal_terms(policy, puzzle, slice(row, row + 1))[0, 0]
            one_hot = torch.eye(len(terms), dtype=terms.dtype)
            jacobian = torch.autograd.grad(terms, parameters, one_hot, is_grads_batched=True)
            gradient = -slopes[row].float() @ torch.cat([g.flatten(1) for g in jacobian], 1)  # [E, P], uphill
            mean = mean + float(weight) * gradient
            square = square + weight * gradient.double().square().sum(1)
        totals, variance = totals + mean, variance + square - mean.double().square().sum(1)
    target, names = totals[-1], list(functions)[:-1]
    return {
        "covered": min(covered),
        "kl": sum(divergence) / len(puzzles),
        "batch": {
            "cosine": {name: cosine(total, target) for name, total in zip(names, totals)},
            "scale": {name: float(total.norm() / target.norm()) for name, total in zip(names, totals)},
            "noise": {
                name: float(v / total.double().square().sum()) for name, v, total in zip(names, variance, totals)
            },
        },
    }
