"""Decoding: the schedule, and the law of the sampled tokens."""

import itertools
import math

import pytest
import torch
from decoding_cases import PROMPT, Constant, assert_law, keys_of, nucleus, rng

from espo_lightning import (
    Decoding,
    Step,
    dream_schedule,
    entropy_order,
    even_schedule,
    generate,
    low_confidence,
    origin_schedule,
    random_order,
)
from espo_lightning.decoding.orders import perturb
from espo_lightning.decoding.proposals import sample_tokens, warp
from espo_lightning.keys import fold_in, uniform

BELOW_ONE = 1 - 2.0**-53  # the largest number that `uniform` returns


def sample(logits, temperature, u, forbidden, top_p=1.0):
    """A proposal as `generate` makes it, with one token forbidden."""
    warped = warp(logits.index_fill(-1, torch.tensor(forbidden), float("-inf")), temperature, top_p)
    return sample_tokens(warped, u) if temperature else warped.argmax(-1)


# ---- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "block", "steps", "per_block"),
    [
        (32, 32, 16, [2] * 16),
        (32, 32, 12, [3] * 8 + [2] * 4),
        (8, 8, 3, [3, 3, 2]),
        (7, 7, 4, [2, 2, 2, 1]),
        (5, 5, 1, [5]),
        (256, 32, 128, [2] * 16),  # the published evaluation
        (256, 32, 64, [4] * 8),
        (12, 4, 9, [2, 1, 1]),
        (6, 1, 6, [1]),
    ],
)
def test_commits(length, block, steps, per_block):
    decoding = Decoding(length, block, steps)
    assert decoding.blocks == length // block
    assert decoding.plan == [Step(count) for count in per_block]


def test_even_schedule_fills_a_block_evenly_with_the_remainder_first():
    for tokens in range(1, 13):
        for steps in range(1, tokens + 1):
            counts = [step.count for step in even_schedule(tokens, steps)]
            assert len(counts) == steps
            assert sum(counts) == tokens
            assert min(counts) >= 1
            assert max(counts) - min(counts) <= 1
            assert counts == sorted(counts, reverse=True)


def test_dream_schedule_by_hand():
    """t = 1, 0.75025, 0.5005, 0.25075, 0.001: 8 * 0.24975 = 1.998, 7 * 0.3329 = 2.33, 5 * 0.499 = 2.495, the rest."""
    assert [step.count for step in dream_schedule(8, 4)] == [1, 2, 2, 3]
    assert [step.count for step in dream_schedule(5, 1)] == [5]
    counts = [step.count for step in dream_schedule(256, 256)]
    assert (counts[0], counts[-1], sum(counts), len(counts)) == (0, 2, 256, 256)


def test_origin_schedule_by_hand():
    plan = origin_schedule(8, 4)
    assert plan[-1] == Step(8)
    assert [step.count for step in plan[:-1]] == [0, 0, 0]
    assert [step.bar for step in plan[:-1]] == pytest.approx([0.75025, 0.667111, 0.500999], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 5}, "length 16 is not a multiple of block_length 5"),
        ({"block_length": 32}, "length 16 is not a multiple of block_length 32"),
        ({"block_length": 0}, "not a multiple of block_length 0"),
        ({"block_length": -4}, "not a multiple of block_length -4"),
        ({"steps": 0}, "between 1 and 16; got 0"),
        ({"steps": -1}, "got -1"),
        ({"steps": 17}, "between 1 and 16; got 17"),
        ({"block_length": 4, "steps": 6}, "multiple of the number of blocks, 4"),
        ({"block_length": 4, "steps": 2}, "between 4 and 16; got 2"),
        ({"length": -16, "block_length": 4}, "-16"),
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"top_p": 0.0}, "top_p must be above 0 .* got 0.0"),
        ({"top_p": 1.1}, "top_p must be .* got 1.1"),
        ({"order_temperature": -1.0}, "order_temperature must be 0 .* got -1.0"),
        ({"order_temperature": 0.5, "order": random_order}, "no effect with random_order"),
        ({"schedule": lambda tokens, steps: [Step(2), Step(3, bar=0.5)]}, "all 16 tokens .* only 5 are sure"),
        ({"schedule": origin_schedule}, "needs order=random_order"),
        ({"threshold": 0.0}, "threshold must be a probability .* got 0.0"),
        ({"threshold": 1.0}, "threshold must be a probability .* got 1.0"),
        ({"threshold": 0.9, "order": entropy_order}, "threshold .* needs order=low_confidence"),
        ({"threshold": 0.9, "order_temperature": 0.1}, "threshold .* needs"),
        ({"threshold": 0.9, "schedule": dream_schedule}, "threshold .* needs"),
        ({"prefix_cache": True, "steps": 1}, "prefix_cache has no effect with one step per block"),
        ({"prefix_cache": True, "block_length": 4, "steps": 4}, "prefix_cache has no effect"),
    ],
)
def test_contradictory_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**changes)


def test_greedy_changes_the_temperatures_only():
    decoding = Decoding(8, 4, 4, 0.7, random_order)
    assert decoding.greedy == Decoding(8, 4, 4, 0.0, random_order)
    dream = Decoding(8, 4, 4, 0.7, entropy_order, 0.9, 0.5, dream_schedule, early_stop=True)
    assert dream.greedy == Decoding(8, 4, 4, 0.0, entropy_order, 0.9, 0.0, dream_schedule, early_stop=True)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_peaked_plus_flat_is_sampled_as_it_is(temperature):
    """V = 2000, half of the mass on one token and half in a flat tail: where 8-bit Gumbel noise gives the head 0.998.

    50,000 draws: 25 / 2 per tail token, a chi-square of 1998 degrees. The banned token would take nearly all.
    """
    vocabulary, head, banned, n = 2000, 3, 1234, 50_000
    logits = torch.zeros(vocabulary)
    logits[head] = temperature * math.log(vocabulary - 2)  # exp(logit / T) is the weight of the whole tail
    logits[banned] = 50.0
    probabilities = logits.clone().index_fill(0, torch.tensor(banned), -math.inf).div(temperature).softmax(0)
    assert probabilities[head].item() == pytest.approx(0.5, abs=1e-5)
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for u in uniform(fold_in(11, int(temperature * 2)), n).split(5000):
        counts += sample(logits.expand(len(u), -1), temperature, u, banned).bincount(minlength=vocabulary)
    assert_law(counts, probabilities)


def test_different_rows_have_their_own_law():
    logits = torch.randn((3, 7), generator=rng(0)) * 2
    u = uniform(torch.tensor([5]), 60_000)[0]
    rows = torch.arange(3).repeat(20_000)
    tokens = sample(logits[rows], 0.8, u, 6)
    for row in range(3):
        law = logits[row].index_fill(0, torch.tensor(6), -math.inf).div(0.8).softmax(0)
        assert_law(tokens[rows == row].bincount(minlength=7), law)


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, BELOW_ONE])
@pytest.mark.parametrize("impossible", [[0], [4], [0, 1], [3, 4], [0, 4], [0, 2, 4], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("banned", [0, 2, 4])
def test_no_token_of_probability_zero_is_drawn(u, impossible, banned):
    possible = set(range(5)) - set(impossible) - {banned}
    if not possible:
        possible, impossible = {(banned + 1) % 5}, [i for i in range(5) if i != (banned + 1) % 5]
    for value, temperature in itertools.product([0.0, -90.0, 80.0], [0.5, 1.0, 2.0]):
        logits = torch.full((1, 5), value)
        logits[0, impossible] = -math.inf
        point = torch.tensor([u], dtype=torch.float64)
        assert sample(logits, temperature, point, banned).item() in possible


def test_extreme_points_of_large_vocabularies_are_tokens_of_positive_probability():
    """Rounding of a long cumulative sum must not run past its end, nor stop on the zeros after it."""
    vocabulary = 126_464
    logits = torch.randn((1, vocabulary), generator=rng(1)) * 3
    logits[0, -100:] = -math.inf
    logits[0, :100] = -math.inf
    for u in (0.0, 1e-9, 1 - 2.0**-24, 1 - 2.0**-25, BELOW_ONE):
        token = sample(logits, 1.0, torch.tensor([u], dtype=torch.float64), vocabulary // 2).item()
        assert logits[0, token] > -math.inf
        assert token != vocabulary // 2
        assert (token < vocabulary // 2) == (u < 0.5)


def test_a_sum_that_falls_by_rounding_draws_no_impossible_token(monkeypatch):
    """As parallel sums may on a GPU: here each partial sum is off by up to 1e-3, so that it falls between zeros."""
    logits = torch.full((1, 2000), -math.inf)
    logits[0, ::50] = 0.0
    exact = torch.Tensor.cumsum
    noise = (torch.rand(2000, generator=rng(5)) - 0.5) * 2e-3
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: exact(x, dim) + noise)
    points = torch.linspace(0, 1, 10_001, dtype=torch.float64).clamp(max=BELOW_ONE)
    tokens = sample_tokens(logits.expand(len(points), -1), points)
    assert (tokens % 50 == 0).all()
    assert len(tokens.unique()) == 40


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.6), (0.5, 0.9), (2.0, 0.5), (1.3, 0.999)])
def test_top_p_keeps_the_nucleus_after_the_temperature(temperature, top_p):
    logits = torch.randn((1, 12), generator=rng(7)) * 2
    law = [*nucleus((logits[0, :-1] / temperature).softmax(-1).tolist(), top_p), 0.0]
    assert (law.count(0.0) == 1) == (top_p == 0.999)
    u = uniform(fold_in(21, 0), 20_000)
    tokens = sample(logits.expand(len(u), -1), temperature, u, 11, top_p)
    assert_law(tokens.bincount(minlength=12), torch.tensor(law))


def test_positions_are_drawn_without_replacement():
    """Dream's alg_temp: the two first of `perturb` are two draws without replacement from softmax(priority / T)."""
    priority, temperature, n = torch.tensor([0.3, -0.2, 0.9, 0.0]), 0.7, 40_000
    u = uniform(fold_in(22, torch.arange(n)), 4)
    first, second = perturb(priority.expand(n, -1), temperature, u).topk(2).indices.unbind(-1)
    p = (priority / temperature).softmax(-1)
    law = torch.stack([p[i] * p[j] / (1 - p[i]) if i != j else p[0] * 0 for i in range(4) for j in range(4)])
    assert_law((first * 4 + second).bincount(minlength=16), law)
    assert perturb(priority, temperature, torch.zeros(4)).isfinite().all()


def test_a_higher_point_never_gives_an_earlier_token_and_points_are_quantiles():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    points = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.99], dtype=torch.float64)
    tokens = sample(torch.cat([logits, torch.zeros(1, 1)], 1).expand(8, -1), 1.0, points, 4)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_zero_is_the_argmax_without_the_mask_token():
    logits = torch.randn((50, 9), generator=rng(2))
    logits[:, 5] = 100.0
    for u in (0.0, BELOW_ONE):
        tokens = sample(logits, 0.0, torch.full((50,), u, dtype=torch.float64), 5)
        assert tokens.tolist() == [max(set(range(9)) - {5}, key=row.__getitem__) for row in logits.tolist()]


def test_logits_are_not_altered():
    logits = torch.randn((4, 6), generator=rng(3))
    before = logits.clone()
    for temperature in (0.0, 0.7):
        sample(logits, temperature, torch.full((4,), 0.3), 2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("order", [low_confidence, random_order])
@pytest.mark.parametrize("mask_id", [0, 2, 4])
def test_no_mask_token_in_completions_even_if_the_policy_prefers_it(temperature, order, mask_id):
    logits = [0.0] * 5
    logits[mask_id] = 1e4
    decoding = Decoding(12, 4, 6, temperature, order)
    completion = generate(Constant(logits, mask_id), PROMPT.repeat_each(200), keys_of(1, 200), decoding)
    assert (completion != mask_id).all()
    assert completion.unique().numel() == (1 if temperature == 0 else 4)
