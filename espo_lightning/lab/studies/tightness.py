"""Notebook 01: how tight the ELBO is, what estimates it well, and what its gap does to the gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import (
    elbos,
    enumerate_completions,
    exact_elbo,
    log_likelihoods,
    low_confidence_log_likelihoods,
    quadrature_moments,
    random_order_log_likelihood,
    score_moments,
    subset_log_probs,
)
from espo_lightning.lab.gradients import EdgeGradients, cosine
from espo_lightning.lab.studies.states import (
    COUNTDOWN,
    SMALL_COUNTDOWN,
    SUDOKU,
    TABLE,
    State,
    contested_states,
    empty_cells,
    held_out,
    moments,
    new_module,
    numbers,
    train,
)
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.tasks import Sudoku
from espo_lightning.training.supervised import encode_answers


def tightness(
    seed: int,
    *,
    rollouts: list[int],
    completions: int,
    states: int,
    free: int,
    forwards: list[int],
    step: float,
    countdown_rollouts: list[int],
    countdown_completions: int,
    problems: int,
) -> dict:
    """Gaps, estimator errors, gradient biases and one-step improvements over an RL run.

    Args:
        rollouts: when to measure; 0 is the base policy.
        completions: Sudoku completions whose gap is computed, of each kind.
        states: puzzles for exact gradients.
        free: empty cells of each.
        forwards: budgets of the estimators.
        step: norm of the one step whose improvement is measured, in parameter space.
        countdown_rollouts, countdown_completions: the same for Countdown, whose whole canvas of 12 is enumerated.
        problems: held-out puzzles for the accuracy.
    """
    task = Sudoku()
    contested = contested_states(load_policy(SUDOKU), seed, states, free)
    policies = train(new_module(load_policy(SUDOKU), seed), task, seed, max(rollouts), rollouts).policies
    stages = []
    for at, policy in sorted(policies.items()):
        tables = sudoku_tables(policy, task, seed, completions)
        stages.append(
            {
                "rollout": at,
                "held_out": held_out(policy, task, problems),
                "gaps": {kind: gaps(group) for kind, group in tables.items()},
                "errors": estimator_errors(tables["own"], forwards),
                **gradient_bias([state.of(policy) for state in contested], step),
            }
        )
    return {"sudoku": stages, "countdown": countdown_gaps(seed, countdown_rollouts, countdown_completions)}


@torch.no_grad()
def sudoku_tables(policy: Policy, task: Sudoku, seed: int, count: int) -> dict[str, list[Tensor]]:
    """Tables of a puzzle's empty cells, the givens visible: of the policy's own completions, and of the answers."""
    problems = [task.problem("train", seed + 2000, i) for i in range(count)]  # other puzzles than in training
    prompts = policy.encode([p.prompt for p in problems])
    own = generate(policy, prompts, fold_in(fold_in(seed, TABLE), torch.arange(count)), Decoding())
    answers = encode_answers(policy, [p.answer for p in problems], 16)
    tables = {}
    for kind, group in (("own", own), ("answer", answers)):
        states = [empty_cells(policy, p, c) for p, c in zip(problems, group)]
        tables[kind] = [
            subset_log_probs(cells, prompts.of(slice(i, i + 1)), small) for i, (cells, small) in enumerate(states)
        ]
    return tables


@torch.no_grad()
def countdown_gaps(seed: int, rollouts: list[int], count: int) -> list[dict]:
    decoding = Decoding(length=12, block_length=12, steps=12)
    module = new_module(load_policy(COUNTDOWN), seed, decoding=decoding, group_size=16)
    with torch.enable_grad():
        policies = train(module, SMALL_COUNTDOWN, seed, max(rollouts), rollouts).policies
    problems = [SMALL_COUNTDOWN.problem("train", seed + 2000, i) for i in range(count)]
    stages = []
    for at, policy in sorted(policies.items()):
        prompts = policy.encode([p.prompt for p in problems])
        own = generate(policy, prompts, fold_in(fold_in(seed, TABLE), torch.arange(count)), decoding)
        answers = encode_answers(policy, [p.answer for p in problems], decoding.length)
        tables = {
            kind: [subset_log_probs(policy, prompts.of(slice(i, i + 1)), c) for i, c in enumerate(group)]
            for kind, group in (("own", own), ("answer", answers))
        }
        stages.append({"rollout": at, "gaps": {kind: gaps(group) for kind, group in tables.items()}})
    return stages


def gaps(tables: list[Tensor]) -> dict[str, list[float]]:
    """Exact log-likelihood of the random order, and its distance to the ELBO, in nats per completion."""
    likelihood = torch.stack([random_order_log_likelihood(t) for t in tables])
    return {
        "log_likelihood": numbers(likelihood),
        "gap": numbers(likelihood - torch.stack([exact_elbo(t) for t in tables])),
    }


ESTIMATORS: dict[str, Callable[[Tensor, int], tuple]] = {  # name -> (table, forwards) -> exact moments
    "single": lambda t, n: score_moments(t, draws=n, coupled=False),
    "single, counts 1..L": lambda t, n: score_moments(t, draws=n, coupled=False, smallest=1),
    "single, stratified": lambda t, n: score_moments(t, draws=n, coupled=False, stratified=True),
    "coupled": lambda t, n: score_moments(t, draws=n // 2, coupled=True),
    "coupled, stratified": lambda t, n: score_moments(t, draws=n // 2, coupled=True, stratified=True),
    "quadrature": quadrature_moments,
}


def estimator_errors(tables: list[Tensor], forwards: list[int]) -> dict[str, dict[str, list[float]]]:
    """Root mean square error and mean bias of the estimated ELBO over completions, in nats, by number of forwards."""
    exact = torch.stack([exact_elbo(t) for t in tables])
    result = {}
    for name, estimate in ESTIMATORS.items():
        budgets = [n for n in forwards if n > 1 or not name.startswith("coupled")]  # a coupled draw costs two
        bias, rmse = [], []
        for n in budgets:
            mean, variance = (torch.stack(m) for m in zip(*(estimate(t, n) for t in tables)))
            bias.append(float((mean - exact).mean()))
            rmse.append(float(((mean - exact).square() + variance).mean().sqrt()))
        result[name] = {"forwards": budgets, "bias": bias, "rmse": rmse}
    return result


GRADIENTS = (
    "decoder: true",
    "random order: true",
    "log p^U",
    "ELBO",
    "ELBO, random-order samples",
    "ELBO, uncentred",
    "mean field",
)


def gradient_bias(states: list[State], step: float) -> dict:
    """Policy gradients of every score, per state and summed over the states, beside the exact ones.

    Two objectives are differentiated exactly: the mean reward of the random-order decoder and of the decoder that is
    really used. The other gradients are E over y of (R(y) - E R) grad score(y), y from the decoder unless named.
    """
    rows, total = [], 0
    for state in states:
        gradients = EdgeGradients(state.cells, state.prompts, *state.size)
        law = {
            "random order": log_likelihoods(gradients.edges),
            "decoder": low_confidence_log_likelihoods(gradients.edges),
        }
        p, q = (law[name].exp() for name in ("random order", "decoder"))
        reward = state.rewards
        functions = {
            "decoder: true": lambda e, r=reward: (low_confidence_log_likelihoods(e).exp() * r).sum(),
            "random order: true": lambda e, r=reward: (log_likelihoods(e).exp() * r).sum(),
            "log p^U": lambda e, w=q * (reward - q @ reward): (w * log_likelihoods(e)).sum(),
            "ELBO": lambda e, w=q * (reward - q @ reward): (w * elbos(e)).sum(),
            "ELBO, random-order samples": lambda e, w=p * (reward - p @ reward): (w * elbos(e)).sum(),
            "ELBO, uncentred": lambda e, w=q * reward: (w * elbos(e)).sum(),
            "mean field": lambda e, w=q * (reward - q @ reward): (w * mean_field(e)).sum(),
        }
        vectors = torch.stack([gradients.of(functions[name]) for name in GRADIENTS])
        gap = law["random order"] - elbos(gradients.edges)
        del gradients
        rows.append(
            {
                "gap": float(q @ gap),
                "reward": moments(reward, q)[0],
                "reward_sd": moments(reward, q)[1],
                "entropy": float(-(p * law["random order"]).sum()),
                **bias_of(vectors),
                "improvement": one_step(state, vectors, step),
            }
        )
        total = total + vectors
    return {"states": rows, "batch": bias_of(total)}


def mean_field(edges: Tensor) -> Tensor:
    """sum_i log p(y_i | everything hidden) of every completion: [V^L]."""
    _, length, symbols = edges.shape
    return edges[-1, torch.arange(length), enumerate_completions(symbols, length)].sum(-1)  # the last state hides all


def bias_of(vectors: Tensor) -> dict:
    """Cosines with both exact gradients and norms, by the names of `GRADIENTS`."""
    decoder, random_order = vectors[0], vectors[1]
    return {
        "cosine_decoder": {n: cosine(v, decoder) for n, v in zip(GRADIENTS, vectors)},
        "cosine_random_order": {n: cosine(v, random_order) for n, v in zip(GRADIENTS, vectors)},
        "norm": {n: float(v.norm()) for n, v in zip(GRADIENTS, vectors)},
    }


def one_step(state: State, vectors: Tensor, step: float) -> dict[str, float]:
    """How much the decoder's exact mean reward rises after a step of norm ``step`` along a gradient."""
    parameters = list(state.cells.parameters())
    start = parameters_to_vector(parameters).detach().clone()
    before = low_confidence_log_likelihoods(state.edges()).exp() @ state.rewards
    result = {}
    for name, vector in zip(GRADIENTS, vectors):
        if name in ("decoder: true", "ELBO", "mean field") and vector.norm() > 0:
            vector_to_parameters(start + step * vector / vector.norm(), parameters)
            after = low_confidence_log_likelihoods(state.edges()).exp() @ state.rewards
            result[name] = float(after - before)
    vector_to_parameters(start, parameters)
    return result
