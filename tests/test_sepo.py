"""SEPO on tables: its weights, its gradient, its corrector."""

import json
import math

import pytest
import torch
from balance_cases import CLOSE, GOLDEN, completion_law, policy_of, tensor, total_variation
from decoding_cases import PROMPT, keys_of, rng
from trajectory_cases import ALL

from espo_lightning import (
    Decoding,
    OneMasked,
    PolicyGradient,
    Scores,
    TruncatedRatio,
    hamming_ball,
    log_probs,
    random_order,
    total,
    truncated_ratio,
)
from espo_lightning.lab.tabular import TabularPolicy

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
SEPO = json.loads((GOLDEN / "sepo.json").read_text())["enumeration"]


# ---- SEPO -----------------------------------------------------------------------------------------------------------


def one_masked_scores(policy, old=None) -> Scores:
    """Of all 27 completions, each position alone hidden."""
    masks = OneMasked(None).draw(torch.arange(27), 3)
    new, before = (None if p is None else log_probs(p, PROMPT.repeat_each(27), ALL, masks) for p in (policy, old))
    before = None if before is None else before.detach()
    return Scores(new, before, None, masks.weight.double(), torch.full((27,), 3))


def test_the_ball_and_its_weights_are_the_recorded_ones():
    policy, old = policy_of(SEPO["joint"]), policy_of(SEPO["joint_old"])
    scores = one_masked_scores(policy, old)
    ball = hamming_ball(scores, scores.new)
    torch.testing.assert_close(ball, tensor(SEPO["S_hamming"]), **CLOSE)
    p = policy.table.detach().softmax(0)  # log p(x | x and the texts at distance 1), by summing
    near = (ALL.unsqueeze(1) != ALL).sum(-1) <= 1
    torch.testing.assert_close(ball, (p / (near * p).sum(1)).log(), **CLOSE)
    torch.testing.assert_close((ball - hamming_ball(scores, scores.old)).exp(), tensor(SEPO["weights"]), **CLOSE)


@pytest.mark.parametrize("clip", [None, SEPO["epsilon"]])
def test_sepos_gradient_is_that_of_the_local_likelihood(clip):
    """E over the old law of clip(w) (r - E r) grad S: with the weights of the ball, the recorded numbers."""
    policy, old = policy_of(SEPO["joint"]), policy_of(SEPO["joint_old"])
    reward, law = tensor(SEPO["reward"]), old.table.detach().softmax(0)
    advantages = reward - (law * reward).sum()
    ratio = TruncatedRatio(1 - 1e-9, hamming_ball) if clip is None else TruncatedRatio(clip, hamming_ball)
    if clip is None:
        assert tensor(SEPO["weights"]).max() < 2  # so that only the lower bound could act
    losses, _ = PolicyGradient(ratio, clip_range=math.inf, beta=0.0)(one_masked_scores(policy, old), advantages, 1)
    (grad,) = torch.autograd.grad(-(law * losses).sum(), policy.table)
    torch.testing.assert_close(grad, tensor(SEPO[f"gradient_{'un' if clip is None else ''}clipped"]), **CLOSE)


@pytest.mark.parametrize(
    ("score", "key"), [(hamming_ball, "hamming_ball (c = 1 - L)"), (total, "pseudo_likelihood")], ids=["ball", "pseudo"]
)
def test_its_direction_is_near_that_of_the_reward(score, key):
    policy, recorded = policy_of(SEPO["joint"]), SEPO["scores"][key]
    scores = one_masked_scores(policy)
    value, reward = score(scores, scores.new, None), tensor(SEPO["reward"])
    law = policy.table.softmax(0)
    torch.testing.assert_close(value, tensor(recorded["S"]), **CLOSE)
    mean = (law * reward).sum()
    (exact,) = torch.autograd.grad(mean, policy.table, retain_graph=True)
    torch.testing.assert_close(exact, tensor(SEPO["true_gradient"]), **CLOSE)
    p = law.detach()
    (ours,) = torch.autograd.grad((p * (reward - mean.detach()) * value).sum(), policy.table, retain_graph=True)
    torch.testing.assert_close(ours, tensor(recorded["centred_gradient"]), **CLOSE)
    assert float(torch.cosine_similarity(ours, exact, 0)) == pytest.approx(recorded["cosine_centred"], abs=1e-9)
    (baseline,) = torch.autograd.grad((p * value).sum(), policy.table)
    assert float(baseline.norm()) == pytest.approx(recorded["norm_E_grad_S"], abs=1e-12)


@pytest.mark.parametrize("consistent", [True, False])
def test_at_masked_states_there_is_nothing_to_learn(consistent):
    """Concrete scores of unmasking neighbours are alpha / (1 - alpha) p(v | state): the sum over v of pi grad log s,
    with pi proportional to s, is the gradient of a sum of probabilities, however it is normalised."""
    policy = TabularPolicy(3, 3, generator=rng(2), consistent=consistent)
    digits = torch.arange(64).unsqueeze(1) // 4 ** torch.arange(3) % 4
    hidden = (digits == 3).unsqueeze(-1)
    log_s = policy.logits().log_softmax(-1) + math.log(0.3 / 0.7)
    for own in (False, True):  # normalised over all neighbours of a state, or over those at one position
        pi = torch.where(hidden, log_s, -math.inf).detach()
        pi = pi.softmax(-1) if own else pi.flatten(1).softmax(-1).view_as(pi)
        terms = torch.where(hidden, pi.nan_to_num() * log_s, 0.0)
        for state in range(64):
            if hidden[state].any():
                (grad,) = torch.autograd.grad(terms[state].sum(), policy.table, retain_graph=True)
                assert grad.abs().max() < 1e-14


def test_a_clipped_weight_keeps_its_gradient():
    """Where PPO's clip drops it: both for too large and too small weights, in the direction of the advantage."""
    new = tensor([[[0.0, 0.9]], [[0.0, -0.9]]]).transpose(0, 1).requires_grad_()  # [1, 2, 2]
    old, weight = torch.zeros(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, 2, dtype=torch.float64)
    scores = Scores(new, old, None, weight, torch.full((2,), 2))
    advantages = tensor([2.0, -3.0])
    losses, _ = PolicyGradient(truncated_ratio, clip_range=math.inf, beta=0.0)(scores, advantages, 1)
    (grad,) = torch.autograd.grad(losses.sum(), new)
    expected = -advantages * tensor([1.2, 0.8])
    torch.testing.assert_close(grad[0], expected.unsqueeze(-1).expand(-1, 2), **CLOSE)
    torch.testing.assert_close(losses.detach(), expected, **CLOSE)
    plain, _ = PolicyGradient(clip_range=0.2, beta=0.0)(scores, advantages, 1)
    assert not torch.autograd.grad(plain.sum(), new)[0].any()


def test_the_corrector_moves_an_inconsistent_law_as_recorded():
    policy, n = policy_of(SEPO["table_inconsistent"]), 60_000
    before = tensor(SEPO["p_random_order_inconsistent"])
    torch.testing.assert_close(completion_law(policy), before, **CLOSE)
    for steps, distance in zip((1, 3, 10), SEPO["tv_after_correctors_inconsistent"]):
        decoding = Decoding(3, 3, 3, order=random_order, corrector=steps)
        ids = decoding.generate(policy, PROMPT.repeat_each(n), keys_of(3, n))
        after = torch.bincount((ids * 3 ** torch.arange(3)).sum(1), minlength=27) / n
        assert total_variation(after.double(), before) == pytest.approx(distance, abs=0.012)
