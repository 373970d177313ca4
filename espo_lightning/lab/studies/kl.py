"""Notebook 03: the KL estimators' values, gradients and effect in training."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from espo_lightning.lab.exact import elbos, exact_kl, log_likelihoods
from espo_lightning.lab.gradients import EdgeGradients, Estimator, cosine, estimator_moments, mask_completions
from espo_lightning.lab.studies.states import (
    SUDOKU,
    State,
    contested_states,
    held_out,
    moments,
    new_module,
    train,
    true_measures,
)
from espo_lightning.objectives.kl import k1, k1_score, k2, k2_u, k3
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.tasks import Sudoku

KLS = {"k1": k1, "k1 + score": k1_score, "k2": k2, "k2_u": k2_u, "k3": k3}


def kl_estimators(seed: int, *, rollouts: list[int], states: int, free: int, draws: list[int], samples: int) -> dict:
    """Values and gradients of the KL estimators between RL iterates without penalty and the base policy.

    Args:
        rollouts: when to measure; the distance from the reference grows with them.
        states, free, draws, samples: as in `ratios`.
    """
    task, reference = Sudoku(), load_policy(SUDOKU)
    contested = contested_states(reference, seed, states, free)
    policies = train(
        new_module(load_policy(SUDOKU), seed, objective=PolicyGradient(beta=0.0)), task, seed, max(rollouts), rollouts
    ).policies
    return {
        "stages": [
            {
                "rollout": at,
                **kl_stage([state.of(policy) for state in contested], reference, draws, samples, seed),
            }
            for at, policy in sorted(policies.items())
        ]
    }


def kl_stage(states: list[State], reference: Policy, draws: list[int], samples: int, key: int) -> dict:
    """The estimators on all states of one policy: value, direction of the gradient and noise."""
    rows, totals = [], {}
    for state in states:
        symbols, length = state.size
        ref = state.of(reference).edges()
        gradients = EdgeGradients(state.cells, state.prompts, symbols, length)
        likelihood, ref_likelihood = log_likelihoods(gradients.edges), log_likelihoods(ref)
        probability = likelihood.exp()
        estimators = {}
        for m in draws:
            masked = mask_completions(ELBO(draws=m), symbols, length, samples, key)
            for name, kl in KLS.items():
                if kl is not k2_u or m > 1:
                    estimators[f"{name}, M={m}"] = Estimator(masked, partial(penalty, masked.terms(ref), kl))
        estimated = estimator_moments(gradients, gradients.products(), probability, estimators)
        means = {name: m.mean for name, m in estimated.items()}
        for name, kl in KLS.items():  # the control: exact log-likelihoods
            if kl is not k2_u:
                means[f"{name}, exact"] = gradients.of(
                    lambda e, k=kl, r=ref_likelihood, p=probability: (
                        p * k((log_likelihoods(e) - r).unsqueeze(0))
                    ).sum()
                )
        target = gradients.of(lambda e, r=ref_likelihood: exact_kl(log_likelihoods(e), r))
        values = {
            name: value_moments(kl_values(e, gradients.edges, ref, name), probability) for name, e in estimators.items()
        }
        delta = {"exact": likelihood - ref_likelihood, "ELBO": elbos(gradients.edges) - elbos(ref)}
        del gradients
        rows.append(
            {
                "kl": float(exact_kl(likelihood, ref_likelihood)),
                "delta_sd": {k: moments(d, probability)[1] for k, d in delta.items()},
                "delta_mean": {k: float(probability @ d) for k, d in delta.items()},
                "cosine": {name: cosine(mean, target) for name, mean in means.items()},
                "noise": {name: m.noise for name, m in estimated.items()},
                "values": values,
            }
        )
        for name, mean in {**means, "target": target}.items():
            totals[name] = totals.get(name, 0) + mean
    target = totals.pop("target")
    return {
        "states": rows,
        "batch": {
            "cosine": {name: cosine(total, target) for name, total in totals.items()},
            "scale": {name: float(total.norm() / target.norm()) for name, total in totals.items()},
        },
    }


def penalty(ref: Tensor, kl: Callable[[Tensor], Tensor], terms: Tensor) -> Tensor:
    return kl((terms - ref).sum(-1)).sum()


def kl_values(estimator: Estimator, edges: Tensor, ref: Tensor, name: str) -> Tensor:
    """The estimator's value for every completion and mask draw: [V^L, S]."""
    delta = (estimator.masked.terms(edges) - estimator.masked.terms(ref)).sum(-1)
    samples = int((estimator.masked.completion == 0).sum())
    return KLS[name.split(",")[0]](delta).view(-1, samples)


def value_moments(values: Tensor, probability: Tensor) -> dict[str, float]:
    """Mean, standard deviation and 99.9 % quantile of a value [V^L, S], for y ~ probability [V^L]."""
    weight = (probability / values.shape[1]).unsqueeze(1).expand_as(values).flatten()
    values = values.flatten()
    mean = weight @ values
    ordered, order = values.sort()
    tail = int(torch.searchsorted(weight[order].cumsum(0), 0.999 * weight.sum()).clamp(max=len(values) - 1))
    return {
        "mean": float(mean),
        "sd": float((weight @ (values - mean).square()).sqrt()),
        "q999": float(ordered[tail]),
    }


def kl_training(
    seed: int, *, arms: dict[str, list], rollouts: int, every: int, states: int, free: int, problems: int
) -> dict:
    """RL with different penalties from the same base: reward, held-out accuracy, exact KL and gap over training.

    Args:
        arms: name -> [name of the estimator in `KLS`, beta].
        rollouts: of each run.
        every: rollouts between two measurements.
        states, free: puzzles for the exact KL and the gap.
        problems: held-out puzzles.
    """
    task, reference = Sudoku(), load_policy(SUDOKU)
    contested = contested_states(reference, seed, states, free)
    result = {}
    for arm, (name, beta) in arms.items():
        likelihood = ELBO(draws=2)  # k2_u needs two
        module = new_module(
            load_policy(SUDOKU), seed, likelihood=likelihood, objective=PolicyGradient(kl=KLS[name], beta=beta)
        )
        snapshots = train(module, task, seed, rollouts, range(0, rollouts + 1, every))
        curve = [
            {"rollout": at, **held_out(policy, task, problems), **true_measures(contested, policy)}
            for at, policy in sorted(snapshots.policies.items())
        ]
        result[arm] = {"curve": curve, "rewards": snapshots.means("reward")}
    return {"arms": result}
