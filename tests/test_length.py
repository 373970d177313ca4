"""Divisors of the log-ratio, and the walks of notebook 13."""

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from espo_lightning import Scores, new_policy, own_length_ratio, sequence_ratio, undivided_ratio
from espo_lightning.lab.studies import length
from espo_lightning.lab.studies.length import BANDS, GOAL, LENGTH, RATIOS, TYPICAL, Walks, objective_of
from espo_lightning.objectives.policy_gradient import PolicyGradient


def scores(lengths: list[int], draws: int = 2, canvas: int = 4) -> Scores:
    generator = torch.Generator().manual_seed(0)
    shape = draws, len(lengths), canvas
    new, old = (-torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    return Scores(new.requires_grad_(), old, None, weight, torch.tensor(lengths))


def test_divisors_by_hand():
    """One draw, weights 1: the ELBO rises by 0.6 nats on a canvas of 4, of which the answer takes 3."""
    new, old = torch.tensor([[[-0.1, -0.2, -0.3, 0.0]]]), torch.tensor([[[-0.2, -0.5, -0.5, 0.0]]])
    given = Scores(new, old, None, torch.ones_like(new), torch.tensor([3]))
    for ratio, expected in ((sequence_ratio, 0.15), (own_length_ratio, 0.2), (undivided_ratio, 0.6)):
        log_ratio, weight = ratio(given)
        assert log_ratio.shape == weight.shape == (1, 1)
        assert log_ratio.item() == pytest.approx(expected)
        assert weight.item() == 1


def test_own_length_is_the_canvas_where_answers_fill_it():
    full = scores([4, 4, 4])
    torch.testing.assert_close(own_length_ratio(full), sequence_ratio(full))
    short = scores([1, 2, 4])
    factor = torch.tensor([[4.0], [2.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(own_length_ratio(short)[0], sequence_ratio(short)[0] * factor)
    torch.testing.assert_close(undivided_ratio(short)[0], sequence_ratio(short)[0] * 4)


def test_divisors_weigh_the_gradient_of_the_first_update():
    """At ratio 1 a token of a completion counts 1/L, 1/|y| or 1: the direction of 1/L and none is the same."""
    gradients = {}
    for name, ratio in RATIOS.items():
        given = scores([1, 2, 4])
        given = Scores(given.new, given.new.detach(), None, given.weight, given.length)
        losses, _ = PolicyGradient(ratio=ratio, beta=0.0)(given, torch.tensor([1.0, -1.0, 0.5]).double(), 3)
        (gradients[name],) = torch.autograd.grad(losses.mean(), given.new)
    torch.testing.assert_close(gradients["none"], 4 * gradients["1/L"])
    factor = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).view(1, 3, 1)
    torch.testing.assert_close(gradients["1/|y|"], factor * gradients["1/L"])


@pytest.mark.parametrize(
    ("start", "text", "reward"),
    [
        (6, "+7+8+9", 1),
        (6, "+7-6+7+8+9", 1),  # it may turn round
        (8, "+9-8+9", 1),  # or pass the goal, if it comes back
        (6, "+7+9", 0),  # a slip
        (6, "+7+8", 0),  # short of the goal
        (6, "+7+8+9-8", 0),  # goes on after it
        (6, "+7+8+9+", 0),  # half a step
        (6, "-7+8+9", 0),  # a wrong sign
        (6, "+7+8+9 ", 0),
        (6, "789", 0),
        (9, "", 0),
        (0, "-9", 0),  # there is no step down from 0
        (8, "+٩", 0),  # another 9
    ],
)
def test_a_walk_is_right_or_wrong(start, text, reward):
    verdict = length.verify(start, text)
    assert verdict == {"reward": reward, "exact": reward, "tokens": len(text), "ended": 1}
    assert length.verify(start, "+" * LENGTH) == {"reward": 0, "exact": 0, "tokens": LENGTH, "ended": 0}


def test_demonstrations_are_right_and_of_many_lengths():
    problems = [Walks().problem("train", 0, i) for i in range(400)]
    assert all(p.verify(p.answer)["reward"] == 1 and len(p.answer) < LENGTH for p in problems)
    assert {p.prompt for p in problems} == {f"{digit}>" for digit in range(GOAL)}
    far = {len(p.answer) for p in problems if p.prompt == "0>"}
    assert min(far) == 2 * GOAL
    assert len(far) > 5
    for distance in range(1, GOAL + 1):
        assert Walks(distance, distance).problem("test", 0, 0).prompt == f"{GOAL - distance}>"
    assert sorted(n for steps in BANDS.values() for n in steps) == [*range(1, GOAL + 1)]


@pytest.mark.parametrize("divisor", RATIOS)
def test_a_clip_in_nats_is_the_same_in_every_unit(divisor):
    """The score of an answer of the typical length may move by so many nats, up and down."""
    objective = objective_of(divisor, 0.5)
    each = {"1/L": 0.5 / LENGTH, "1/|y|": 0.5 / TYPICAL, "none": 0.5}[divisor]
    assert math.log1p(objective.clip_high) == pytest.approx(each)
    assert math.log1p(-objective.clip_range) == pytest.approx(-each)
    assert objective_of(divisor, None).clip_range == math.inf


def test_weights_travel_as_text():
    there, back = length.untaught(3), length.base(length.as_text(length.untaught(3)))
    assert torch.equal(*(parameters_to_vector(policy.parameters()) for policy in (there, back)))


@pytest.fixture
def tiny(monkeypatch):
    """Policies that take no time."""
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(length, "untaught", lambda seed: new_policy(**sizes, seed=seed))


def test_the_gradients_of_the_divisors(tiny, monkeypatch):
    """Of answers that are all wrong there is none; of equally long ones, both are the same but for the length."""
    weights = length.as_text(length.untaught(0))
    pushes = length.pushes(0, weights=weights, problems=1)
    assert pushes == {divisor: {"length": 0, "reward": 0} for divisor in ("1/L", "1/|y|")}
    monkeypatch.setattr(length, "verify", lambda start, text: {"reward": float("7" in text)})
    policy = length.base(weights)
    monkeypatch.setattr(policy, "lengths", lambda ids: torch.full(ids.shape[:1], 9))
    found = length.half_gradients(policy, 0, 2)
    assert float(found["reward"].norm()) > 0
    torch.testing.assert_close(found["per token"] * 10, found["reward"])  # 9 and the end
    assert float(found["length"].norm()) == 0


def test_runs_of_a_hardly_taught_policy(tiny):
    """All arms begin with the same policy."""
    weights = length.taught(0, lessons=2)["weights"]
    settings = {"weights": weights, "lr": 1e-3, "clip_nats": 1.0, "rollouts": 1, "problems": 1}
    curves = [length.trained(0, divisor=divisor, every=1, **settings)["curve"] for divisor in RATIOS]
    assert [[point["rollout"] for point in curve] for curve in curves] == [[0, 1]] * 3
    assert curves[0][0] == curves[1][0] == curves[2][0]
    assert 0 <= length.pilot(0, divisor="none", **settings)["score"] <= 1
    measured = length.measured(length.base(weights), 0, 1)
    assert measured["reward"] == 0
    assert measured["right_tokens"] is None
    fewest = sum(range(1, GOAL + 1)) * 2 / GOAL
    assert measured["wrong_extra"] == pytest.approx(measured["wrong_tokens"] - fewest, abs=1e-3)
