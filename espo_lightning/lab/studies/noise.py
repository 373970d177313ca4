"""Notebook 07: whether a policy gradient's noise comes from its completions or from its masks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from espo_lightning.lab.exact import log_likelihoods
from espo_lightning.lab.gradients import (
    EdgeGradients,
    Estimator,
    GradientMoments,
    cosine,
    estimator_moments,
    mask_completions,
)
from espo_lightning.lab.studies.ratios import RATIOS, Recorded, surrogate
from espo_lightning.lab.studies.states import SUDOKU, State, contested_states, new_module, train
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood
from espo_lightning.tasks import Sudoku


class Point(NamedTuple):
    """A policy on a puzzle whose completions come from another, older policy; everything about it that is exact.

    gradients: of the policy's edges, `EdgeGradients.compact`. products: of them. old: the older policy's edges.
    probability: [V^n] of the completions. advantage: [V^n], centred. target: the exact off-policy gradient.
    """

    gradients: EdgeGradients
    products: Tensor
    old: Tensor
    probability: Tensor
    advantage: Tensor
    target: Tensor

    @classmethod
    def of(cls, state: State, policy: Policy) -> "Point":
        """``state`` is that of the older policy."""
        old = state.edges()
        gradients = EdgeGradients(state.of(policy).cells, state.prompts, *state.size).compact()
        before = log_likelihoods(old)
        probability = before.exp()
        advantage = state.rewards - probability @ state.rewards
        weight = probability * advantage
        target = gradients.of(lambda edges: (weight * (log_likelihoods(edges) - before).exp()).sum())
        return cls(gradients, gradients.products(), old, probability, advantage, target)

    def moments(
        self, likelihood: Likelihood, ratio: Callable, clip_nats: float, samples: int, key: int
    ) -> tuple[GradientMoments, float]:
        """Moments of one completion's ascent direction, and the cosine of their mean with the exact gradient.

        Args:
            ratio: `sequence_ratio` or `token_ratio`.
            clip_nats: clip width per sequence; inf = no clip.
            samples: mask draws per completion.
            key: of the masks.
        """
        masked = mask_completions(likelihood, self.gradients.symbols, self.gradients.length, samples, key)
        loss = partial(surrogate, masked.terms(self.old), self.advantage[masked.completion], ratio, clip_nats)
        moments = estimator_moments(self.gradients, self.products, self.probability, {"": Estimator(masked, loss)})[""]
        return moments, cosine(-moments.mean, self.target)


def points(seed: int, *, warm: int, updates: list[int], puzzles: int, free: int) -> dict[int, list[Point]]:
    """Iterates of one real rollout, on several puzzles: after so many of its updates -> a `Point` for every puzzle.

    Args:
        warm: rollouts of ordinary RL before it.
        updates: after which to stop; 0 = the policy that made the rollout.
        puzzles: contested by the base, see `contested_states`.
        free: empty cells of each.
    """
    policy, task = load_policy(SUDOKU), Sudoku()
    states = contested_states(policy, seed, puzzles, free)
    if warm:
        policy = train(new_module(policy, seed), task, seed, warm, [warm]).policies[warm]
    module = new_module(policy, seed + 1, Recorded, updates=max(1, *updates))
    train(module, task, seed + 1, 1)
    old, iterates = module.iterates[0], module.iterates
    return {u: [Point.of(state.of(old), iterates[u]) for state in states] for u in updates}


LAWS = {"single": {"coupled": False}, "coupled": {}, "coupled, stratified": {"stratified": True}}


def noise(seed: int, *, warm: int, updates: list[int], puzzles: int, free: int, draws: list[int], samples: int) -> dict:
    """Variance of the unclipped gradient of one completion, and the masks' part of it, by level, mask law and M.

    Returns:
        "rows": one for each, with "variance", "masks" and "signal", sums over the puzzles of the trace of the variance,
        of its part that is due to the masks, and of the squared norm of the mean; and "cosine", their mean cosine
        with the exact gradient.
    """
    rows = []
    for u, places in points(seed, warm=warm, updates=updates, puzzles=puzzles, free=free).items():
        for level, ratio in RATIOS.items():
            for law, changes in LAWS.items():
                for m in draws:
                    results = [p.moments(ELBO(draws=m, **changes), ratio, float("inf"), samples, seed) for p in places]
                    rows.append(
                        {
                            "updates": u,
                            "level": level,
                            "law": law,
                            "draws": m,
                            "variance": sum(r.variance for r, _ in results),
                            "masks": sum(r.mask_variance for r, _ in results),
                            "signal": sum(float(r.mean.double().square().sum()) for r, _ in results),
                            "cosine": sum(c for _, c in results) / len(results),
                        }
                    )
    return {"rows": rows}
