"""The study of notebook 11: what it says of log-ratios, weights and gradients."""

import math

import pytest
import torch

from espo_lightning.lab.studies import horizon
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO, MeanField
from espo_lightning.scoring.masks import Masks
from espo_lightning.training.rollout import Rollout


@pytest.mark.parametrize("length", [4, 16, 64])
def test_the_weights_are_as_large_as_theory_says(length):
    harmonic = sum(1 / k for k in range(1, length + 1))
    theory = (length + 1) / (2 * length) * harmonic
    found = {name: horizon.mean_square_weight(law, length) for name, law in horizon.LIKELIHOODS.items()}
    assert found["ELBO"] == pytest.approx(theory, rel=0.1)
    assert found["M = 2"] == pytest.approx(theory / 2, rel=0.1)
    assert found["uncoupled"] == pytest.approx(theory, rel=0.1)  # twice the mean square, of two draws
    assert found["mean field"] == 1


def rollout_of(policy, advantages) -> Rollout:
    prompts = policy.encode(["1>2", "3>4"])
    completion = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
    some = {"old": [], "ref": [], "masks": [], "length": torch.tensor([4, 4]), "count": torch.ones(2), "counted": 2}
    none = {"rewards": torch.zeros(1, 2), "decoded": completion, "texts": [], "verdicts": [], "idle": False}
    return Rollout(prompts=prompts, completion=completion, advantages=torch.tensor(advantages), **some, **none)


def test_log_ratios_by_hand(monkeypatch):
    weight = torch.tensor([[[2.0, 0.0, 4.0, 2.0]]])
    terms = {"old": torch.zeros(1, 1, 4), "new": torch.tensor([[[0.2, 0.0, -0.4, 0.6]]])}
    monkeypatch.setattr(horizon, "score", lambda policy, *_: terms[policy])
    rollout = rollout_of(new_policy(16, 1, 2, 16), [1.0, -1.0])
    found = horizon.log_ratios(rollout, Masks(weight > 0, weight, False), "old", "new")
    assert found["change"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2 + 0.3**2) / 3))  # where it is scored
    assert found["token"] == pytest.approx(math.sqrt((0.2**2 + 0.4**2 + 0.6**2) / 4))
    assert found["sequence"] == pytest.approx(0.4 / 4)
    assert found["largest"] == pytest.approx(0.6)
    assert found["clipped"]["token"]["0.2"] == 0.75
    assert found["clipped"]["sequence"]["0.2"] == 0
    assert found["clipped"]["sequence"]["0.05"] == 1


def test_the_levels_have_one_gradient_until_the_policy_moves():
    policy, other = new_policy(16, 1, 2, 16, seed=0), new_policy(16, 1, 2, 16, seed=1)
    rollout = rollout_of(policy, [1.0, -1.0])
    masks = ELBO().draw(torch.tensor([3, 4]), 4)
    same, moved = (horizon.scattered(rollout, masks, policy, new, 2) for new in (policy, other))
    assert same["cosine"] == pytest.approx(1)
    assert same["token_noise"] == pytest.approx(same["sequence_noise"])
    assert moved["cosine"] < 0.999
    assert moved["token_noise"] != pytest.approx(moved["sequence_noise"], rel=1e-3)


def test_of_the_mean_field_no_token_weighs_more_than_another():
    policy, other = new_policy(16, 1, 2, 16, seed=0), new_policy(16, 1, 2, 16, seed=1)
    masks = MeanField().draw(torch.tensor([3, 4]), 4)
    found = horizon.log_ratios(rollout_of(policy, [1.0, -1.0]), masks, policy, other)
    assert found["token"] == pytest.approx(found["change"])


def test_gradients_of_less_than_two_completions_do_not_scatter():
    policy = new_policy(16, 1, 2, 16)
    masks = ELBO().draw(torch.tensor([3, 4]), 4)
    with pytest.raises(ValueError, match=r"at least 2 completions with an advantage, got 1.*more prompts"):
        horizon.scattered(rollout_of(policy, [1.0, 0.0]), masks, policy, policy, 2)
