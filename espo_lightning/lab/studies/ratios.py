"""Notebook 02: token- against sequence-level ratios on the iterates of real rollouts."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import exact_kl, log_likelihoods, random_order_log_likelihood, subset_log_probs
from espo_lightning.lab.gradients import (
    EdgeGradients,
    Estimator,
    cosine,
    estimator_moments,
    mask_completions,
    table_entries,
)
from espo_lightning.lab.studies.states import SUDOKU, State, contested_states, empty_cells, new_module, numbers, train
from espo_lightning.objectives.policy_gradient import clip_range_of_nats, espo_loss
from espo_lightning.objectives.ratios import sequence_ratio, token_ratio
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood, MeanField
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score
from espo_lightning.tasks import Problem, Sudoku
from espo_lightning.training.module import ESPOModule, Rollout

RATIOS = {"token": token_ratio, "sequence": sequence_ratio}


class Recorded(ESPOModule):
    """Keeps the policy before every update of the last rollout, and after it."""

    def update(self, rollout: Rollout, u: int) -> dict[str, Tensor]:
        if u == 0:
            self.iterates = [copy.deepcopy(self.policy)]
        metrics = super().update(rollout, u)
        self.iterates.append(copy.deepcopy(self.policy))
        return metrics


def ratios(
    seed: int,
    *,
    warm: list[int],
    updates: list[int],
    states: int,
    free: int,
    draws: list[int],
    clip_nats: list[float],
    samples: int,
    scatter: int,
    real: int,
) -> dict:
    """Token- and sequence-level gradients on the iterates of real rollouts, against the exact off-policy gradient.

    Args:
        warm: rollouts of ordinary RL before the recorded one.
        updates: inner updates after which to measure; the largest is mu of the recorded rollout.
        states: puzzles for exact gradients.
        free: empty cells of each.
        draws: M of the ELBOs.
        clip_nats: clip widths in nats per sequence, at the smallest M; no clipping is always measured.
        samples: mask draws per completion for means and variances.
        scatter: completions of the whole canvas whose gradients are taken one by one.
        real: completions of the rollout itself whose exact gradients are computed, after the most updates.
    """
    task = Sudoku()
    stages, batches, contested = [], [], contested_states(load_policy(SUDOKU), seed, states, free)
    policies = train(new_module(load_policy(SUDOKU), seed), task, seed, max(1, *warm), warm).policies
    for at, policy in sorted(policies.items()):
        module = new_module(policy, seed + 1, Recorded, updates=max(updates))
        train(module, task, seed + 1, 1)
        rollout, old = module.last_rollout, module.iterates[0]
        canvases = [state.of(old) for state in contested]
        for u in updates:
            small = off_policy(canvases, module.iterates[u], draws, clip_nats, samples, key=seed)
            whole = whole_canvas(rollout, module.iterates[u], u % len(rollout.masks), scatter)
            stages.append({"rollout": at, "updates": u, **small, "canvas": whole})
        problems = [task.problem("train", seed + 1, i) for i in range(len(rollout.rewards))]
        cosines = real_batch(rollout, problems, old, module.iterates[-1], real, samples, key=seed)
        batches.append({"rollout": at, "updates": max(updates), "cosine": cosines})
    return {"stages": stages, "real": batches}


def off_policy(
    canvases: list[State], policy: Policy, draws: list[int], clip_nats: list[float], samples: int, key: int
) -> dict:
    """Every estimator's mean gradient (cosine with the exact one) and noise, on all states."""
    rows, totals = [], {}
    for state in canvases:
        symbols, length = state.size
        old = state.edges()
        gradients = EdgeGradients(state.of(policy).cells, state.prompts, symbols, length)
        before, now = log_likelihoods(old), log_likelihoods(gradients.edges)
        probability = before.exp()
        advantage = state.rewards - probability @ state.rewards
        estimators = ratio_estimators(old, advantage, draws, clip_nats, samples, symbols, length, key)
        moments = estimator_moments(gradients, gradients.products(), probability, estimators)
        means = {name: -m.mean for name, m in moments.items()}  # of the loss, so downhill
        target = gradients.of(lambda e, b=before, w=probability * advantage: (w * (log_likelihoods(e) - b).exp()).sum())
        means["sequence, exact likelihood"] = gradients.of(
            lambda e, b=before, w=probability * advantage, n=length: (w * ((log_likelihoods(e) - b) / n).exp()).sum()
        )
        del gradients
        rows.append(
            {
                "kl": float(exact_kl(before, now)),
                "cosine": {name: cosine(mean, target) for name, mean in means.items()},
                "noise": {name: m.noise for name, m in moments.items()},
                "variance": {name: m.variance for name, m in moments.items()},
                "mask_share": {name: m.mask_variance / m.variance for name, m in moments.items()},
            }
        )
        for name, mean in {**means, "target": target}.items():
            totals[name] = totals.get(name, 0) + mean
    target = totals.pop("target")
    variance = {name: sum(row["variance"][name] for row in rows) for name in rows[0]["variance"]}
    signal = {name: float(total.double().square().sum()) for name, total in totals.items()}
    return {
        "states": rows,
        "batch": {
            "cosine": {name: cosine(total, target) for name, total in totals.items()},
            "scale": {name: float(totals[name].norm() / target.norm()) for name in totals},
            # one completion of every state; a batch of n times as many has 1/n of it
            "noise": {name: variance[name] / signal[name] for name in variance},
        },
    }


def ratio_estimators(
    old: Tensor,
    advantage: Tensor,
    draws: list[int],
    clip_nats: list[float],
    samples: int,
    symbols: int,
    length: int,
    key: int,
) -> dict[str, Estimator]:
    """The losses of the comparison, named "level, likelihood, clip"."""
    likelihoods: dict[str, Likelihood] = {f"ELBO M={m}": ELBO(draws=m) for m in draws} | {"mean field": MeanField()}
    result = {}
    for name, likelihood in likelihoods.items():
        masked = mask_completions(likelihood, symbols, length, samples, key)
        widths = [math.inf, *(clip_nats if name in (f"ELBO M={draws[0]}", "mean field") else ())]
        for level, ratio in RATIOS.items():
            for nats in widths:
                result[f"{level}, {name}, {nats:g}"] = Estimator(
                    masked, partial(surrogate, masked.terms(old), advantage[masked.completion], ratio, nats)
                )
    return result


def surrogate(old: Tensor, advantages: Tensor, ratio: Callable, nats: float, terms: Tensor) -> Tensor:
    """The library's loss without penalty, summed over the rows. ``nats``: clip width per sequence."""
    clip = clip_range_of_nats(nats, terms.shape[-1])
    return len(advantages) * espo_loss(terms, old, None, advantages, clip_range=clip, beta=0.0, ratio=ratio)[0]


CLIP_RANGES = (4e-4, 0.05, 0.2)  # of the authors' demos, of this library's default, of the authors' recipes
QUANTILES = (0.0, 0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0)


def whole_canvas(rollout: Rollout, policy: Policy, view: int, scatter: int) -> dict:
    """Log-ratios of all completions of a rollout on the whole canvas, and the scatter of their gradients."""
    masks = rollout.masks[view]
    old = rollout.old[view] * masks.weight  # terms, as `score` returns them
    with torch.no_grad():
        change = score(policy, rollout.prompts, rollout.completion, masks) - old
    token, sequence = change.mean(0).flatten(), change.mean((0, 2))
    levels = torch.tensor(QUANTILES)
    result = {
        "log_ratio": {"token": numbers(token.quantile(levels)), "sequence": numbers(sequence.quantile(levels))},
        "sd": {"token": float(token.std()), "sequence": float(sequence.std())},
        "clipped": {
            level: {str(eps): float((x.expm1().abs() > eps).float().mean()) for eps in CLIP_RANGES}
            for level, x in (("token", token), ("sequence", sequence))
        },
    }
    chosen = rollout.advantages.nonzero().squeeze(1)[:scatter]
    for level, ratio in RATIOS.items():
        stacked = completion_gradients(rollout, policy, masks, old, chosen.tolist(), ratio)
        result[f"{level}_variance"] = float(stacked.var(0).sum())
        result[f"{level}_largest_share"] = float((norms := stacked.norm(dim=1)).max() / norms.sum())
        result[f"{level}_mean"] = stacked.mean(0)
    result["cosine"] = cosine(result.pop("token_mean"), result.pop("sequence_mean"))
    return result


def completion_gradients(
    rollout: Rollout, policy: Policy, masks: Masks, old: Tensor, rows: list[int], ratio: Callable
) -> Tensor:
    """Gradients of the library's loss of single completions without a clip, one by one: [rows, P].

    ``old``: terms [M, B, L] under the policy that decoded, on the same ``masks``.
    """
    parameters, gradients = list(policy.parameters()), []
    for row in rows:
        one = slice(row, row + 1)
        terms = score(policy, rollout.prompts.of(one), rollout.completion[one], masks.of(one))
        loss = surrogate(old[:, one], rollout.advantages[one], ratio, math.inf, terms)
        gradients.append(parameters_to_vector(torch.autograd.grad(loss, parameters)))
    return torch.stack(gradients)


def real_batch(
    rollout: Rollout, problems: list[Problem], old: Policy, policy: Policy, count: int, samples: int, key: int
) -> dict[str, float]:
    """Cosines with the exact off-policy gradient of the rollout's own completions with the largest advantages.

    Each completion's canvas is its puzzle's empty cells, and the exact gradient that of A p_theta(y) / p_old(y).
    """
    rows = rollout.advantages.abs().topk(count).indices.tolist()
    parameters, totals = list(policy.parameters()), {}
    group = len(rollout.completion) // len(problems)
    for row in rows:
        one, problem, advantage = slice(row, row + 1), problems[row // group], rollout.advantages[row].double()
        cells, small = empty_cells(policy, problem, rollout.completion[row])
        with torch.no_grad():
            before = subset_log_probs(
                empty_cells(old, problem, rollout.completion[row])[0], rollout.prompts.of(one), small
            )
        table = subset_log_probs(cells, rollout.prompts.of(one), small)
        functions = {"target": partial(exact_surrogate, before, advantage)}
        for name, likelihood in (("ELBO", ELBO()), ("mean field", MeanField())):
            masks = likelihood.draw(fold_in(fold_in(key, row), torch.arange(samples)), len(small))
            for level, ratio in RATIOS.items():
                for clip in (math.inf, 0.05):
                    functions[f"{level}, {name}, {clip:g}"] = partial(
                        table_surrogate, masks, before, advantage.expand(samples), ratio, clip
                    )
        leaf = table.detach().requires_grad_()
        for name, function in functions.items():
            (coefficient,) = torch.autograd.grad(function(leaf), leaf)
            gradient = parameters_to_vector(torch.autograd.grad(table, parameters, coefficient, retain_graph=True))
            totals[name] = totals.get(name, 0) + gradient
    target = totals.pop("target")
    return {name: cosine(total, target) for name, total in totals.items()}


def exact_surrogate(before: Tensor, advantage: Tensor, table: Tensor) -> Tensor:
    """A p_theta(y) / p_old(y) of the random-order decoder, from two tables [2^L, L]."""
    return advantage * (random_order_log_likelihood(table) - random_order_log_likelihood(before)).exp()


def table_surrogate(
    masks: Masks, before: Tensor, advantages: Tensor, ratio: Callable, clip: float, table: Tensor
) -> Tensor:
    """Minus the library's loss of one completion on the given masks [M, S, L], from two tables; mean over the S."""
    entry = table_entries(masks)
    terms, old = (t.flatten()[entry] * masks.weight for t in (table, before))
    return -espo_loss(terms, old, None, advantages, clip_range=clip, beta=0.0, ratio=ratio)[0]
