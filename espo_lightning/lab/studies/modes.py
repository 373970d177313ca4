"""Notebook 10: where the mean field stops working, on laws whose right answers are few or many, tied or free.

A world has 3 symbols on 5 positions. Its right answers are words over the symbols 0 and 1, in which some positions
repeat others (*tied*) or close a parity. What the policy says instead, its habit, is a word *apart* from all answers;
or the answers with the last position of each tie *twisted*, which no single token tells from the right ones; or half of
each. There is one prompt, and the policy is a small transformer that was taught this law, so that all its completions,
gradients and rewards can be enumerated.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from espo_lightning.decoding.masked import Decoding
from espo_lightning.decoding.orders import random_order
from espo_lightning.lab.exact import (
    elbos,
    enumerate_completions,
    log_likelihoods,
    low_confidence_log_likelihoods,
)
from espo_lightning.lab.gradients import EdgeGradients, cosine, mask_completions
from espo_lightning.lab.studies.states import State, new_module, teach, train_or_diverge
from espo_lightning.lab.studies.tightness import mean_field
from espo_lightning.lab.tabular import FreeCells
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.policy import Policy
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood, MeanField
from espo_lightning.scoring.trajectory import Trajectory
from espo_lightning.scoring.views import OneMasked, TokenViews
from espo_lightning.tasks import Problem, Task, Verdict
from espo_lightning.tasks.base import rng

SYMBOLS, LENGTH, PROMPT = 3, 5, "?"
HABIT = "2" * LENGTH
GROUPS = 8  # of completions in a rollout
# position i of a right answer is the sum (mod 2) of the free bits named there, - is always 0
SHAPES: dict[str, str] = {
    "1": "- - - - -",
    "2, free": "a - - - -",
    "2, three tied": "a a a - -",
    "2, all tied": "a a a a a",
    "4, free": "a b - - -",
    "4, two pairs": "a a b b -",
    "4, pair and three": "a a a b b",
    "16, free": "a b c d -",
    "16, parity": "a b c d abcd",
}


def right_answers(shape: str) -> list[str]:
    """The words of a shape of `SHAPES`, sorted."""
    return words(SHAPES[shape].split())


def words(sums: list[str], swapped: Collection[int] = ()) -> list[str]:
    """All words of these sums of free bits, with 0 and 1 exchanged at the positions ``swapped``; sorted."""
    free = sorted({letter for name in sums for letter in name} - {"-"})
    found = set()
    for bits in product((0, 1), repeat=len(free)):
        value = dict(zip(free, bits)) | {"-": 0}
        sums_of_bits = (sum(value[letter] for letter in name) + (i in swapped) for i, name in enumerate(sums))
        found.add("".join(str(x % 2) for x in sums_of_bits))
    return sorted(found)


def twisted_answers(shape: str) -> list[str]:
    """The right answers with 0 and 1 exchanged at the last position of each tie; empty if none is tied.

    Each single token is as frequent among them as among the right ones.
    """
    sums = SHAPES[shape].split()
    last = {sums.index(name): i for i, name in enumerate(sums) if name != "-" and name in sums[:i]}
    swapped = [*last.values(), *(i for i, name in enumerate(sums) if len(name) > 1)]
    return words(sums, swapped) if swapped else []


def total_correlation(probability: Tensor) -> float:
    """Sum of the entropies of the positions, less that of the word, for words of the law [3^5]; in nats."""
    each = enumerate_completions(SYMBOLS, LENGTH).T.unsqueeze(-1) == torch.arange(SYMBOLS)  # [L, V^L, V]
    marginals = (probability.view(1, -1, 1) * each).sum(1)
    return float(torch.special.entr(marginals).sum() - torch.special.entr(probability).sum())


def verify(answers: frozenset[str], text: str) -> Verdict:
    """All or nothing."""
    return dict.fromkeys(("reward", "exact"), float(text in answers))


@dataclass(frozen=True)
class World(Task):
    """One prompt with its right answers, and demonstrations of which few are right.

    Args:
        shape: of the right answers, a key of `SHAPES`.
        apart: share of the wrong demonstrations that are `HABIT`; the others are `twisted_answers`.
        right: share of right demonstrations.

    Raises:
        ValueError: twisted answers of a shape that has none.
    """

    shape: str
    apart: float
    right: float

    def __post_init__(self):
        if self.apart < 1 and not twisted_answers(self.shape):
            raise ValueError(f'no position of the answers "{self.shape}" is tied to another: apart must be 1')

    def problem(self, split: str, seed: int, index: int) -> Problem:
        draw, answers = rng("world", split, seed, index), right_answers(self.shape)
        if draw.random() < self.right:
            word = draw.choice(answers)
        else:
            word = HABIT if draw.random() < self.apart else draw.choice(twisted_answers(self.shape))
        return Problem(PROMPT, partial(verify, frozenset(answers)), word)


def worlds(shapes: Iterable[str]) -> dict[str, dict]:
    """Shape and share apart of every world: each shape with its habit apart; if tied, also half of each and twisted."""
    return {
        f"{shape}; {habit}": {"shape": shape, "apart": apart}
        for shape in shapes
        for habit, apart in (("apart", 1.0), ("half", 0.5), ("twisted", 0.0))
        if apart == 1 or twisted_answers(shape)
    }


def taught(world: World, seed: int, lessons: int) -> Policy:
    """A small transformer from scratch after ``lessons`` batches of 128 demonstrations."""
    policy = new_policy(hidden_size=32, layers=2, heads=2, intermediate_size=64, seed=seed)
    teach(policy, world, seed, lessons, lr=3e-3, length=LENGTH)
    return policy


def as_state(world: World, policy: Policy) -> State:
    """The whole canvas, with the rewards of all 3^5 words; other tokens are ruled out."""
    symbols = policy.tokenizer("".join(map(str, range(SYMBOLS))), add_special_tokens=False)["input_ids"]
    cells = FreeCells(policy, torch.zeros(LENGTH, dtype=torch.int64), list(range(LENGTH)), symbols)
    answers = right_answers(world.shape)
    every = ["".join(map(str, word)) for word in enumerate_completions(SYMBOLS, LENGTH).tolist()]
    rewards = torch.tensor([float(word in answers) for word in every], dtype=torch.float64)
    return State(policy.encode([PROMPT]), cells, rewards)


# ---- the gradients ---------------------------------------------------------------------------------------

GRADIENTS = ("log p^U", "ELBO", "token views", "one masked", "mean field")


def biases(seed: int, *, shape: str, apart: float, right: float, lessons: int, samples: int) -> dict:
    """The direction of every likelihood's policy gradient against the exact one, on one world.

    Args:
        shape, apart, right: of the `World`.
        lessons: batches that the policy was taught for.
        samples: masks per completion of the likelihoods whose masks are random, but for the ELBO, which is exact.

    Returns:
        "answers_correlation": `total_correlation` of the right answers, "correlation" of the policy. "additive": see
        `additive_share`. "right": the exact chance of a right answer. "gap": of the ELBO in nats. "cosine": likelihood
        -> with the exact gradient of the mean reward under the random order, whose samples it takes. "norm":
        relative to it. What ends in "_confidence" has samples and target of the low-confidence decoder.
    """
    world = World(shape, apart, right)
    state = as_state(world, taught(world, seed, lessons))
    gradients = EdgeGradients(state.cells, state.prompts, *state.size)
    result = {"answers_correlation": total_correlation(state.rewards / state.rewards.sum())}
    for suffix, law in (("", log_likelihoods), ("_confidence", low_confidence_log_likelihoods)):
        likelihood = law(gradients.edges)
        p = likelihood.exp()
        weight = p * (state.rewards - p @ state.rewards)
        target = gradients.of(lambda e, law=law: law(e).exp() @ state.rewards)
        vectors = expected_gradients(gradients, weight, samples, seed)
        result[f"cosine{suffix}"] = {name: cosine(v, target) for name, v in vectors.items()}
        result[f"norm{suffix}"] = {name: float(v.norm() / target.norm()) for name, v in vectors.items()}
        result[f"additive{suffix}"] = additive_share(p, state.rewards)
        result[f"right{suffix}"] = float(p @ state.rewards)
        result[f"correlation{suffix}"] = total_correlation(p)
    law = log_likelihoods(gradients.edges)
    return result | {"gap": float(law.exp() @ (law - elbos(gradients.edges)))}


def expected_gradients(gradients: EdgeGradients, weight: Tensor, samples: int, key: int) -> dict[str, Tensor]:
    """Sum over all completions of weight [V^L] times grad score, for the likelihoods of `GRADIENTS`: [P] each."""

    def exact(score: Callable[[Tensor], Tensor]) -> Tensor:
        return gradients.of(lambda edges: (weight * score(edges)).sum())

    def sampled(likelihood: Likelihood, samples: int) -> Tensor:
        masked = mask_completions(likelihood, gradients.symbols, gradients.length, samples, key)
        share = weight[masked.completion].unsqueeze(-1) / (samples * len(masked.weight))  # a score is a mean of draws
        edges = torch.zeros(len(gradients.row), dtype=torch.float64)
        return gradients.weighted(edges.index_add_(0, masked.edge.flatten(), (masked.weight * share).flatten()))

    return {
        "log p^U": exact(log_likelihoods),
        "ELBO": exact(elbos),
        "token views": sampled(TokenViews(), samples),
        "one masked": sampled(OneMasked(draws=None), 1),
        "mean field": exact(mean_field),
    }


def additive_share(probability: Tensor, rewards: Tensor) -> float:
    """The share of the reward's variance that a sum of functions of single tokens explains, for y ~ probability.

    The mean field's policy gradient depends on the reward through E[R | y_i] alone, one position at a time: where this
    share is 0, so is its expectation. Weighted least squares on the indicators of all symbols at all positions.
    """
    design = torch.nn.functional.one_hot(enumerate_completions(SYMBOLS, LENGTH), SYMBOLS).flatten(1).double()
    mean = probability @ rewards
    root = probability.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(root * design, root * (rewards - mean).unsqueeze(1), driver="gelsd").solution
    left = (rewards - mean - (design @ solution).squeeze(1)).square()
    return float(1 - (probability @ left) / (probability @ (rewards - mean).square()))


# ---- training --------------------------------------------------------------------------------------------

LIKELIHOODS: dict[str, Likelihood] = {
    "ELBO": ELBO(),
    "trajectory": Trajectory(),
    "token views": TokenViews(),
    "mean field": MeanField(),
}


def trained(
    seed: int,
    *,
    shape: str,
    apart: float,
    right: float,
    lessons: int,
    arms: dict[str, dict],
    rollouts: int,
    every: int,
) -> dict:
    """RL from one taught policy, with every arm: the exact chance of a right answer on the way.

    Rollouts are `GROUPS` groups of 8 in random order; the rest is as in `fit`, without a penalty.

    Args:
        shape, apart, right: of the `World`.
        lessons: batches that the policy was taught for; every arm begins with the same.
        arms: name -> "likelihood", of `LIKELIHOODS`, and "lr".
        rollouts: of every arm.
        every: rollouts between two measurements.

    Returns:
        For every arm the "curve" of what `measured` says, with its "rollout", and whether the run "diverged".
    """
    world = World(shape, apart, right)
    base = taught(world, seed, lessons)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    runs = {}
    for arm, settings in arms.items():
        base.load_state_dict(weights)
        module = new_module(
            base,
            seed,
            lr=settings["lr"],
            decoding=Decoding(length=LENGTH, block_length=LENGTH, steps=LENGTH, order=random_order),
            likelihood=LIKELIHOODS[settings["likelihood"]],
            objective=PolicyGradient(beta=0.0),
        )
        at = range(0, rollouts + 1, every)
        snapshots, diverged = train_or_diverge(module, world, seed, rollouts, at, batch=GROUPS)
        curve = [{"rollout": n, **measured(world, policy)} for n, policy in sorted(snapshots.policies.items())]
        runs[arm] = {"curve": curve, "diverged": diverged}
    return {"arms": runs}


@torch.no_grad()
def measured(world: World, policy: Policy) -> dict[str, float]:
    """Of the random-order decoder: the exact chance of a "right" answer, and how many "kinds" of them it gives, the exp
    of the entropy among them."""
    state = as_state(world, policy)
    p = log_likelihoods(state.edges()).exp()
    chance = p @ state.rewards
    among = p[state.rewards > 0] / chance
    return {"right": round(float(chance), 4), "kinds": round(float(torch.special.entr(among).sum().exp()), 4)}
