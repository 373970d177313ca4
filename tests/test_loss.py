"""The objective by hand: clip branches, KL estimators, advantages, units."""

import math

import pytest
import torch

from espo_lightning.objectives.advantages import leave_one_out, mean_centred, softmax_difference, standardised, z_score
from espo_lightning.objectives.kl import k1, k1_score, k2, k2_u, k3
from espo_lightning.objectives.policy_gradient import clip_range_of_nats, espo_loss, nats_of_clip_range
from espo_lightning.objectives.ratios import sequence_ratio, token_ratio

DRAWS, BATCH, LENGTH = 3, 5, 7


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_terms(seed: int, scale: float = 1.0, shape=(DRAWS, BATCH, LENGTH)) -> torch.Tensor:
    return scale * torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def setting(seed: int = 0, scale: float = 1.0) -> dict:
    """Random inputs of the loss, float64; ratios spread around 1 by ``scale``."""
    terms = random_terms(seed).requires_grad_()
    return {
        "terms": terms,
        "old": terms.detach() + random_terms(seed + 1, scale),
        "ref": terms.detach() + random_terms(seed + 2, scale),
        "advantages": random_terms(seed + 3, shape=(BATCH,)),
    }


def loss_and_gradient(terms, **rest) -> tuple[torch.Tensor, torch.Tensor]:
    loss, _ = espo_loss(terms, **rest)
    return loss.detach(), torch.autograd.grad(loss, terms)[0]


def assert_mean(samples: torch.Tensor, expected: float) -> None:
    """The sample mean lies within 4 standard errors."""
    assert abs(samples.mean() - expected) < 4 * samples.std() / math.sqrt(len(samples))


# ---- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "slope", "low", "high"),  # slope: d loss / d rho; low, high: clip statistics
    [
        (1.5, 2.0, -2.4, 0.0, 0, 1),  # min(3.0, 1.2 * 2): clipped
        (1.5, -2.0, 3.0, 2.0, 0, 1),  # min(-3.0, -2.4): not clipped
        (0.5, 2.0, -1.0, -2.0, 1, 0),  # min(1.0, 1.6)
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # min(-1.0, -1.6): clipped
        (1.1, 2.0, -2.2, -2.0, 0, 0),
        (1.1, -2.0, 2.2, 2.0, 0, 0),
        (0.9, 2.0, -1.8, -2.0, 0, 0),
        (0.9, -2.0, 1.8, 2.0, 0, 0),
        (1.5, 0.0, 0.0, 0.0, 0, 1),
    ],
)
@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
def test_every_clip_branch(ratio, rho, advantage, loss, slope, low, high):
    """Uniform terms: the sequence ratio and all token ratios are rho."""
    length, draws = 4, 2
    old = torch.full((draws, 1, length), -1.5, dtype=torch.float64)
    terms = (old + math.log(rho)).requires_grad_()
    value, statistics = espo_loss(
        terms, old, None, torch.tensor([advantage], dtype=torch.float64), clip_range=0.2, beta=0.0, ratio=ratio
    )
    assert value.item() == pytest.approx(loss, abs=1e-6)
    (grad,) = torch.autograd.grad(value, terms)
    expected = torch.full_like(grad, slope * rho / (draws * length))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)
    assert statistics.clip_low.tolist() == [low]
    assert statistics.clip_high.tolist() == [high]
    assert statistics.log_ratio.item() == pytest.approx(length * math.log(rho), abs=1e-6)  # nats, before the 1/L


def test_clip_statistics_count_the_ratios_of_each_side():
    old = torch.zeros(1, 2, 4, dtype=torch.float64)
    terms = torch.tensor([[[1.5, 1.1, 0.5, 0.5], [1.0, 1.0, 1.0, 1.3]]], dtype=torch.float64).log()
    settings = {"ref": None, "advantages": torch.ones(2, dtype=torch.float64), "clip_range": 0.2, "beta": 0.0}
    _, statistics = espo_loss(terms, old, ratio=token_ratio, **settings)
    assert statistics.clip_low.tolist() == [0.5, 0.0]
    assert statistics.clip_high.tolist() == [0.25, 0.25]
    _, statistics = espo_loss(terms, old, **settings)  # geometric means (1.5 * 1.1 / 4)^(1/4) = 0.80143 and 1.3^(1/4)
    assert statistics.clip_low.tolist() == [0.0, 0.0]
    assert statistics.clip_high.tolist() == [0.0, 0.0]


def test_no_clip_range_is_no_clipping():
    inputs = setting(scale=2.0)
    loss, statistics = espo_loss(**inputs, clip_range=math.inf, beta=0.0)
    rho = ((inputs["terms"] - inputs["old"]).sum((0, 2)) / (DRAWS * LENGTH)).exp()
    torch.testing.assert_close(loss, -(rho * inputs["advantages"]).mean(), rtol=1e-14, atol=0)
    assert statistics.clip_low.sum() == statistics.clip_high.sum() == 0


@pytest.mark.parametrize("clip_range", [0.2, 4e-4, 0.0])
@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
def test_gradient_at_ratio_one(ratio, clip_range):
    inputs = setting()
    inputs["old"] = inputs["terms"].detach().clone()
    loss, grad = loss_and_gradient(**inputs, clip_range=clip_range, beta=0.0, ratio=ratio)
    expected = (-inputs["advantages"] / (BATCH * LENGTH * DRAWS)).view(1, -1, 1).expand_as(grad)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-16)
    assert loss.item() == pytest.approx(-inputs["advantages"].mean().item(), abs=1e-15)


def test_clip_range_zero_keeps_only_what_moved_the_wrong_way():
    rho = torch.tensor([1.01, 1.01, 0.99, 0.99], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    terms = rho.log().view(1, 4, 1).clone().requires_grad_()
    inputs = {"old": torch.zeros_like(terms), "ref": None, "advantages": advantages}
    _, grad = loss_and_gradient(terms, **inputs, clip_range=0.0, beta=0.0)
    assert (grad.flatten() != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("clip_range", "up", "down", "digits"),
    [(0.2, 46.7, -57.1, 1), (4e-4, 0.102, -0.102, 3), (0.5, 103.8, -177.4, 1), (0.0, 0.0, 0.0, 12)],
)
def test_clip_range_in_nats_of_the_published_settings(clip_range, up, down, digits):
    assert round(nats_of_clip_range(clip_range, 256), digits) == up
    assert round(nats_of_clip_range(-clip_range, 256), digits) == down
    assert clip_range_of_nats(nats_of_clip_range(clip_range, 256), 256) == pytest.approx(clip_range, rel=1e-12, abs=0)


@pytest.mark.parametrize("nats", [1e-3, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("length", [1, 16, 256])
def test_nats_and_clip_range_are_inverse_and_say_where_the_clip_is(nats, length):
    clip_range = clip_range_of_nats(nats, length)
    assert nats_of_clip_range(clip_range, length) == pytest.approx(nats, rel=1e-12)
    old = torch.zeros(1, 2, length, dtype=torch.float64)
    rise = torch.tensor([nats * (1 - 1e-6), nats * (1 + 1e-6)], dtype=torch.float64)
    terms = (rise / length).view(1, 2, 1).expand(1, 2, length)
    _, statistics = espo_loss(terms, old, None, torch.ones(2, dtype=torch.float64), clip_range=clip_range, beta=0.0)
    assert statistics.clip_high.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("change", [100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_beyond_the_range_of_floats_leaves_loss_and_gradient_finite(dtype, change, advantage):
    """One token of four moves so far that its ratio overflows: clipped, it has no gradient, and others keep theirs."""
    old = torch.zeros(1, 1, 4, dtype=dtype)
    terms = torch.tensor([[[change, 0.0, 0.1, -0.1]]], dtype=dtype, requires_grad=True)
    settings = {"ref": None, "advantages": torch.tensor([advantage], dtype=dtype), "clip_range": 0.2, "beta": 0.0}
    loss, statistics = espo_loss(terms, old, ratio=token_ratio, **settings)
    (grad,) = torch.autograd.grad(loss, terms)
    assert loss.isfinite()
    assert grad.isfinite().all()
    if advantage * change > 0 or not advantage:
        assert grad[0, 0, 0] == 0
    torch.testing.assert_close(grad[0, 0, 1], torch.tensor(-advantage / 4, dtype=dtype))
    assert statistics.clip_high.item() + statistics.clip_low.item() == 0.25


# ---- the whole loss -------------------------------------------------------------------------------------------------


def official(terms, old, ref, advantages, *, clip_range, beta):
    """The authors' formula, written from METHOD's words: scores first, then the ratio, the clip and half a square."""
    canvas = terms.size(2)
    elbo, old_elbo, ref_elbo = (t.sum(2).mean(0) for t in (terms, old, ref))
    coef_1 = torch.exp((elbo - old_elbo) / canvas)
    coef_2 = torch.clamp(coef_1, 1 - clip_range, 1 + clip_range)
    policy_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    kl = 0.5 * (elbo - ref_elbo) ** 2
    return (policy_loss + beta * kl / canvas).mean()


@pytest.mark.parametrize("beta", [0.0, 1e-2])
@pytest.mark.parametrize("clip_range", [0.2, 4e-4, 0.0])
@pytest.mark.parametrize("scale", [2.0, 0.1, 1e-4])
def test_official_formula_in_float64(scale, clip_range, beta):
    for seed in range(0, 40, 4):
        inputs = setting(seed, scale)
        loss, grad = loss_and_gradient(**inputs, clip_range=clip_range, beta=beta)
        expected = official(**inputs, clip_range=clip_range, beta=beta)
        (expected_grad,) = torch.autograd.grad(expected, inputs["terms"])
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kl", [k1, k1_score, k2, k2_u, k3])
@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
def test_loss_of_a_batch_is_the_weighted_sum_of_its_chunks(ratio, kl):
    inputs = setting(scale=0.3)
    settings = {"clip_range": 0.1, "beta": 0.02, "ratio": ratio, "kl": kl}
    loss, grad = loss_and_gradient(**inputs, **settings)
    total, total_grad = 0.0, 0.0
    for chunk in (slice(0, 1), slice(1, 3), slice(3, 5)):
        share = (chunk.stop - chunk.start) / BATCH
        part = {key: x[chunk] if x.ndim == 1 else x[:, chunk] for key, x in inputs.items() if key != "terms"}
        value, _ = espo_loss(inputs["terms"][:, chunk], **part, **settings)
        total = total + share * value.detach()
        total_grad = total_grad + share * torch.autograd.grad(value, inputs["terms"])[0]
    torch.testing.assert_close(total, loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(total_grad, grad, rtol=1e-12, atol=1e-16)


def test_without_beta_no_reference_is_needed_and_none_is_used():
    inputs = setting()
    loss, statistics = espo_loss(**inputs | {"ref": None}, clip_range=0.2, beta=0.0)
    assert statistics.kl.tolist() == [0.0] * BATCH
    other, _ = espo_loss(**inputs | {"ref": inputs["ref"] * float("nan")}, clip_range=0.2, beta=0.0)
    assert loss.item() == other.item()
    with pytest.raises(TypeError):
        espo_loss(**inputs | {"ref": None}, clip_range=0.2, beta=0.1)


@pytest.mark.parametrize("kl", [k1, k1_score, k2, k2_u, k3])
def test_penalty_is_beta_times_the_estimator_over_the_length(kl):
    inputs = setting(scale=0.3)
    settings = {"clip_range": 0.2, "kl": kl}
    with_penalty, statistics = espo_loss(**inputs, beta=0.5, **settings)
    without, _ = espo_loss(**inputs, beta=0.0, **settings)
    by_hand = kl((inputs["terms"] - inputs["ref"]).sum(-1))
    torch.testing.assert_close(statistics.kl, by_hand.detach(), rtol=0, atol=0)
    assert not statistics.kl.requires_grad
    torch.testing.assert_close(with_penalty - without, 0.5 * by_hand.mean() / LENGTH, rtol=1e-12, atol=1e-15)


def test_statistics_are_detached():
    _, statistics = espo_loss(**setting(), clip_range=0.2, beta=0.1)
    assert not any(x.requires_grad for x in statistics)
    assert all(x.shape == (BATCH,) for x in statistics)


# ---- KL estimators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [-2.0, -0.5, 0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("kl", "value", "gradient"),
    [
        (k1, lambda d: d, lambda d: 1.0),
        (k1_score, lambda d: d, lambda d: 1 + d),
        (k2, lambda d: d * d / 2, lambda d: d),
        (k2_u, lambda d: d * d / 2, lambda d: d),
        (k3, lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_value_and_gradient_of_every_estimator(kl, value, gradient, delta):
    """Two equal draws. k2, k2_u and k3 pull the score towards the reference; k1 pushes it down whatever delta is."""
    draws = torch.full((2, 1), delta, dtype=torch.float64, requires_grad=True)
    estimate = kl(draws)
    assert estimate.shape == (1,)
    assert estimate.item() == pytest.approx(value(delta), abs=1e-14)
    (grad,) = torch.autograd.grad(estimate.sum(), draws)
    assert grad.tolist() == [[pytest.approx(gradient(delta) / 2, abs=1e-14)]] * 2
    if kl in (k2, k2_u, k3):
        assert torch.sign(grad).flatten().tolist() == [math.copysign(1, delta) if delta else 0.0] * 2


def test_k2_u_by_hand():
    draws = torch.tensor([[1.0, 2.0], [3.0, -2.0], [-2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    # 1/6 sum over ordered pairs of half products: (1*3 - 1*2 - 3*2) / 6 and (2*-2 + 0 + 0) / 6
    assert k2_u(draws).tolist() == [pytest.approx(-5 / 6), pytest.approx(-4 / 6)]
    (grad,) = torch.autograd.grad(k2_u(draws).sum(), draws)  # the sum of the other draws, over 6
    expected = torch.tensor([[1.0, -2.0], [-1.0, 2.0], [4.0, 0.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("draws", "inflated"), [(1, 2.5), (2, 1.5), (4, 1.0)])
def test_mask_noise_inflates_k2_and_not_k2_u(draws, inflated):
    """delta = 1, standard deviation 2 per draw: k2 has the mean 1/2 + 4 / (2 M), k2_u the true 1/2."""
    noisy = 1 + 2 * torch.randn((draws, 200_000), generator=rng(draws), dtype=torch.float64)
    assert inflated == 0.5 + 4 / (2 * draws)
    assert_mean(k2(noisy), inflated)
    if draws > 1:
        assert_mean(k2_u(noisy), 0.5)
        assert k2_u(noisy).min() < 0


def test_gradient_of_k2_u_is_unbiased_where_the_noise_has_a_gradient():
    """delta_m = theta + exp(theta) noise_m at theta = 0: d(theta^2 / 2) = 0, and k2 adds half the variance's slope."""
    theta = torch.zeros(200_000, dtype=torch.float64, requires_grad=True)
    noise = torch.randn((2, 200_000), generator=rng(7), dtype=torch.float64)
    for kl, expected in [(k2_u, 0.0), (k2, 0.5)]:  # 1/2 d/dtheta exp(2 theta) / 2 = 1/2
        (grad,) = torch.autograd.grad(kl(theta + theta.exp() * noise).sum(), theta)
        assert_mean(grad, expected)


def test_k2_u_needs_two_draws():
    with pytest.raises(ValueError, match="at least 2 independent mask draws, got 1"):
        k2_u(torch.zeros(1, 3))
    inputs = {key: x[:1] if x.ndim == 3 else x for key, x in setting().items()}
    with pytest.raises(ValueError, match="at least 2"):
        espo_loss(**inputs, clip_range=0.2, beta=0.1, kl=k2_u)


# ---- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3, 6, 16])
def test_advantages_against_their_definitions(group):
    rewards = torch.rand((8, group), generator=rng(group), dtype=torch.float64)
    others = [[(row.sum() - r) / (group - 1) for r in row] for row in rewards]
    expected = rewards - torch.tensor(others, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(leave_one_out(rewards), mean_centred(rewards) * group / (group - 1), rtol=0, atol=1e-14)
    for advantage in (leave_one_out, mean_centred, standardised):
        assert advantage(rewards).sum(-1).abs().max() < 1e-12
        torch.testing.assert_close(advantage(rewards + 3.0), advantage(rewards), rtol=1e-9, atol=1e-12)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    expected = {
        mean_centred: [[0.5, -0.5, -0.5, 0.5], [-1.0, -1.0, -1.0, 3.0]],
        leave_one_out: [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-4 / 3, -4 / 3, -4 / 3, 4.0]],
    }
    scale = [math.sqrt(1 / 3) + 1e-4, 2 + 1e-4]  # sample standard deviations: sqrt(4 * 0.25 / 3), sqrt(12 / 3)
    expected[standardised] = [[a / s for a in row] for row, s in zip(expected[mean_centred], scale)]
    for advantage, rows in expected.items():
        torch.testing.assert_close(advantage(rewards), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("advantage", [leave_one_out, mean_centred, standardised, z_score, softmax_difference])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 0.0, 1e30])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_equal_rewards_have_advantages_of_exactly_zero(advantage, reward, group):
    """The float32 mean of equal rewards may differ from them in the last bit."""
    rewards = torch.full((3, group), reward)
    rewards[1, 0] += 1 + abs(reward)
    advantages = advantage(rewards)
    assert not advantages[[0, 2]].any()
    assert advantages[1].all()
    assert advantages.isfinite().all()


def test_other_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(z_score(rewards), torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64))
    a, b = math.exp(0.5), math.exp(-0.5)
    weight = 4 * (a - b) / (2 * a + 2 * b)
    expected = torch.tensor([[weight, -weight, -weight, weight]], dtype=torch.float64)
    torch.testing.assert_close(softmax_difference(rewards), expected)


@pytest.mark.parametrize("advantage", [leave_one_out, mean_centred, standardised])
def test_equal_rewards_give_no_advantage_and_no_gradient(advantage):
    advantages = advantage(torch.full((1, BATCH), 0.25, dtype=torch.float64)).flatten()
    assert advantages.tolist() == [0.0] * BATCH
    _, grad = loss_and_gradient(**setting() | {"advantages": advantages}, clip_range=0.2, beta=0.0)
    assert grad.abs().max() == 0
