"""The worlds of notebook 10: what their laws are, and why the mean field sees nothing in some of them."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from espo_lightning import Sudoku, load_policy
from espo_lightning.lab.exact import (
    all_symbols,
    elbos,
    enumerate_completions,
    lattice_edges,
    log_likelihoods,
)
from espo_lightning.lab.gradients import EdgeGradients, cosine
from espo_lightning.lab.studies import modes
from espo_lightning.lab.studies.modes import HABIT, LENGTH, SHAPES, SYMBOLS, World
from espo_lightning.lab.studies.states import SUDOKU, new_module, train
from espo_lightning.lab.studies.tightness import mean_field
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.policies.policy import Prompts

PROMPT = Prompts(torch.zeros(1, 1, dtype=torch.int64), None)
TIED = [shape for shape in SHAPES if modes.twisted_answers(shape)]
WORDS = ["".join(map(str, word)) for word in enumerate_completions(SYMBOLS, LENGTH).tolist()]


def law(shape: str, apart: float, right: float = 0.1) -> tuple[Tensor, Tensor]:
    """The law that a world's demonstrations have, written down: probabilities [3^5], and rewards."""
    answers, twisted = modes.right_answers(shape), modes.twisted_answers(shape)
    probability = {word: right / len(answers) for word in answers}
    probability |= {word: (1 - right) * (1 - apart) / len(twisted) for word in twisted}
    probability[HABIT] = probability.get(HABIT, 0.0) + (1 - right) * apart
    p = torch.tensor([probability.get(word, 0.0) for word in WORDS], dtype=torch.float64)
    return p, torch.tensor([float(word in answers) for word in WORDS], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_as_many_as_the_name_says(shape):
    answers = modes.right_answers(shape)
    assert len(answers) == len(set(answers)) == int(shape.split(",")[0])
    assert all(len(word) == LENGTH and set(word) <= {"0", "1"} for word in answers)


@pytest.mark.parametrize("shape", TIED)
def test_no_single_token_tells_a_twisted_answer_from_a_right_one(shape):
    answers, twisted = modes.right_answers(shape), modes.twisted_answers(shape)
    assert not {*answers} & {*twisted}
    for a, b in zip(zip(*answers), zip(*twisted)):
        assert a.count("1") / len(a) == b.count("1") / len(b)


def test_free_answers_have_no_twisted_ones():
    assert {*SHAPES} - {*TIED} == {"1", "2, free", "4, free", "16, free"}
    with pytest.raises(ValueError, match="apart must be 1"):
        World("4, free", apart=0.5, right=0.1)


@pytest.mark.parametrize(("apart", "right"), [(1.0, 0.1), (0.5, 0.3), (0.0, 0.1)])
def test_demonstrations_have_the_law(apart, right):
    world, count = World("4, two pairs", apart, right), 4000
    seen = [world.problem("train", 0, i) for i in range(count)]
    p, rewards = law("4, two pairs", apart, right)
    shares = torch.tensor([sum(x.answer == word for x in seen) / count for word in WORDS], dtype=torch.float64)
    assert float((shares - p).abs().max()) < 5 * math.sqrt(0.25 / count)
    assert all(x.verify(word)["reward"] == r for x in seen[:3] for word, r in zip(WORDS, rewards.tolist()))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("4, free", 0), ("2, all tied", 4 * math.log(2)), ("4, two pairs", 2 * math.log(2)), ("16, parity", math.log(2))],
)
def test_total_correlation(shape, expected):
    rewards = law(shape, 1.0)[1]
    assert modes.total_correlation(rewards / rewards.sum()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_additive_share_by_hand(shape):
    """Whether a word begins with 2 tells it all if the habit is apart; twisted, no sum over tokens tells anything."""
    assert modes.additive_share(*law(shape, 1.0)) == pytest.approx(1, abs=1e-9)
    if shape in TIED:
        assert modes.additive_share(*law(shape, 0.0)) == pytest.approx(0, abs=1e-9)
        assert 0.05 < modes.additive_share(*law(shape, 0.5)) < 0.95


@pytest.mark.parametrize("shape", TIED)
@pytest.mark.parametrize("apart", [1.0, 0.0])
def test_mean_field_gradient_is_zero_where_no_token_tells(shape, apart):
    """On the joint law itself, whose ELBO is its log-likelihood: the theorem of the notebook."""
    p, rewards = law(shape, apart)
    policy = TabularPolicy(SYMBOLS, LENGTH, generator=torch.Generator().manual_seed(0), consistent=True)
    policy.table.data = (p + 1e-12).log().view(policy.table.shape)
    edges = lattice_edges(policy, PROMPT, all_symbols(SYMBOLS, LENGTH))
    weight = p * (rewards - p @ rewards)

    def gradient(score: Tensor) -> Tensor:
        return torch.autograd.grad((weight * score).sum(), policy.table, retain_graph=True)[0]

    exact, elbo, independent = (gradient(f(edges)) for f in (log_likelihoods, elbos, mean_field))
    assert cosine(elbo.flatten(), exact.flatten()) == pytest.approx(1, abs=1e-4)
    if apart:
        assert cosine(independent.flatten(), exact.flatten()) > 0.9
    else:
        assert float(independent.norm()) < 1e-6 * float(exact.norm())


def test_expected_gradients_are_those_of_the_scores():
    """Each likelihood's expectation over the masks, against the gradient of its score written down."""
    policy = TabularPolicy(2, 2, generator=torch.Generator().manual_seed(3))
    gradients = EdgeGradients(policy, PROMPT, 2, 2)
    weight = torch.tensor([0.3, -0.2, 0.4, -0.5], dtype=torch.float64)
    found = modes.expected_gradients(gradients, weight, 4000, key=0)
    words = enumerate_completions(2, 2)
    logits = policy.logits().log_softmax(-1)  # [9, 2, 2]; the digit 2 hides

    def at(first: int, second: int, position: int, token: int) -> Tensor:
        return logits[first + 3 * second, position, token]

    both = [[at(2, 2, i, int(word[i])) for i in range(2)] for word in words]
    one = [[at(2, int(word[1]), 0, int(word[0])), at(int(word[0]), 2, 1, int(word[1]))] for word in words]
    scores = {
        "mean field": [sum(b) for b in both],
        "one masked": [sum(o) for o in one],
        "ELBO": [(b[0] + o[1] + b[1] + o[0]) / 2 for b, o in zip(both, one)],
    }
    for name, score in scores.items():
        total = (weight * torch.stack(score)).sum()
        exact = torch.autograd.grad(total, policy.table, retain_graph=True)[0].flatten()
        assert torch.allclose(found[name].double(), exact, atol=1e-5), name
    # token views: each token with all hidden, and in a random part or its complement: of 2 tokens both, or one
    views = found["token views"]
    both_part, one_part = found["mean field"], found["one masked"]
    design = torch.stack([both_part, one_part], 1).double()
    share = torch.linalg.lstsq(design, views.double().unsqueeze(1)).solution.squeeze(1)
    assert float(share.sum()) == pytest.approx(1.5, abs=0.02)
    assert float((design @ share - views).norm() / views.norm()) < 0.02


def test_biases_and_training_of_a_hardly_taught_policy():
    world = {"shape": "2, all tied", "apart": 0.0, "right": 0.5}
    arms = {name: {"likelihood": name, "lr": 1e-3} for name in modes.LIKELIHOODS}
    result = modes.trained(0, **world, lessons=5, arms=arms, rollouts=2, every=1)["arms"]
    assert [[p["rollout"] for p in run["curve"]] for run in result.values()] == [[0, 1, 2]] * len(arms)
    assert len({run["curve"][0]["right"] for run in result.values()}) == 1  # all begin with the same policy
    assert not any(run["diverged"] for run in result.values())


@dataclass(frozen=True)
class FrozenVerifier:
    """What Lightning cannot rebuild field by field."""

    answer: str

    def __call__(self, text: str) -> dict[str, float]:
        return {"reward": float(text == self.answer), "exact": float(text == self.answer)}


@dataclass(frozen=True)
class FrozenTask(Sudoku):
    """Puzzles whose verifiers are frozen dataclasses."""

    def problem(self, split, seed, index):
        problem = super().problem(split, seed, index)
        return problem._replace(verify=FrozenVerifier(problem.answer))


def test_a_verifier_may_be_a_frozen_dataclass():
    train(new_module(load_policy(SUDOKU), 0, group_size=2), FrozenTask(), 0, 1, batch=1)
