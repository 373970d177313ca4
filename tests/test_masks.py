"""Keyed uniforms, and the laws of masks and weights."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from likelihood_cases import COUNT_LAWS, assert_mean, assert_variance, draws_of, keys_of, rng, tabular

from espo_lightning.keys import fold_in, randint, random_bits, random_subset, real, uniform, unit
from espo_lightning.lab.exact import exact_elbo
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.scoring.likelihood import ELBO, MeanField, QuadratureELBO, TimeELBO
from espo_lightning.scoring.masks import bernoulli_masks, count_masks, full_mask, quadrature_masks


def assert_law(observed: torch.Tensor, probabilities: torch.Tensor | None = None) -> None:
    """Chi-square test of counts [cells], uniform by default, at the level 1e-4 that is fixed here, once for all."""
    if probabilities is None:
        probabilities = torch.full((len(observed),), 1 / len(observed))
    expected = observed.sum() * probabilities.double()
    assert expected.min() >= 5  # else the chi-square law is no approximation
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2) > 1e-4


# --- keyed randomness ---------------------------------------------------------------------------------------


def test_uniform_is_uniform_on_the_half_open_interval():
    u = uniform(keys_of(1, 2000), 32)
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-3 < 1 - 1e-3 < u.max() < 1
    assert_law((u * 100).long().flatten().bincount(minlength=100))
    # first against second number of a key, and same number of neighbouring keys: independent
    assert_law(((u[:, 0] * 8).long() * 8 + (u[:, 1] * 8).long()).bincount(minlength=64))
    assert_law(((u[:-1, 0] * 8).long() * 8 + (u[1:, 0] * 8).long())[::2].bincount(minlength=64))


def test_every_bit_is_fair():
    bits = random_bits(keys_of(2, 4000), 4).flatten()
    ones = torch.stack([(bits >> shift & 1).sum() for shift in range(64)]).double()
    z = (ones - 8000) / math.sqrt(4000)
    assert z.abs().max() < 5  # 64 bits, chance of a false alarm 4e-5


def test_uniforms_where_there_is_no_float64():
    """Apple's GPUs: 24 bits that float32 holds exactly, the leading ones of the float64 numbers."""
    bits = random_bits(keys_of(1, 2000), 32)
    wide, narrow = unit(bits, torch.float64), unit(bits, torch.float32)
    assert torch.equal(wide, uniform(keys_of(1, 2000), 32))
    assert narrow.dtype == torch.float32
    assert torch.equal((wide * 2**24).floor(), (narrow * 2**24).double())
    assert unit(torch.tensor([-1, 0]), torch.float32).tolist() == [1 - 2**-24, 0.0]
    assert [real(torch.device(name)) for name in ("mps", "cpu", "cuda")] == [torch.float32, *[torch.float64] * 2]


def test_randint_is_uniform():
    assert_law(randint(keys_of(3, 20000), 7).bincount(minlength=7))


def test_keys_do_not_collide():
    grid = fold_in(fold_in(torch.arange(300).unsqueeze(1), torch.arange(-100, 200)), 5).flatten()
    assert grid.unique().numel() == 90000
    one, other = (fold_in(fold_in(0, a), torch.arange(20000)) for a in (1, 2))
    assert torch.cat([one, other, torch.arange(20000)]).unique().numel() == 60000
    assert random_bits(one, 3).unique().numel() == 60000
    assert fold_in(1, 2) != fold_in(2, 1)


def test_fold_in_broadcasts():
    grid = fold_in(torch.arange(3).unsqueeze(1), torch.arange(4))
    assert all(grid[i, j] == fold_in(i, j) for i in range(3) for j in range(4))


ALL_LAWS = [
    ELBO(draws=3),
    ELBO(draws=3, coupled=False, smallest_count=1),
    ELBO(draws=4, stratified=True),
    TimeELBO(draws=2),
    QuadratureELBO(nodes=3),
    MeanField(),
]


@pytest.mark.parametrize("law", ALL_LAWS, ids=repr)
def test_masks_depend_on_the_key_alone(law):
    keys = keys_of(4, 64)
    whole, order = law.draw(keys, 9), torch.randperm(64, generator=rng(0))
    shuffled = law.draw(keys[order], 9)
    assert whole.weight.dtype == torch.float32
    assert whole.hidden.shape == whole.weight.shape
    for part, expected in [(shuffled, whole.of(order)), (law.draw(keys[10:13], 9), whole.of(slice(10, 13)))]:
        torch.testing.assert_close(part.hidden, expected.hidden, rtol=0, atol=0)
        torch.testing.assert_close(part.weight, expected.weight, rtol=0, atol=0)


@pytest.mark.parametrize("law", [ELBO(), ELBO(stratified=True), TimeELBO(), ELBO(coupled=False, smallest_count=1)])
def test_first_draws_do_not_depend_on_the_number_of_draws(law):
    keys = keys_of(5, 32)
    one, four = law.draw(keys, 8), dataclasses.replace(law, draws=4).draw(keys, 8)
    torch.testing.assert_close(one.hidden, four.hidden[:1], rtol=0, atol=0)


def test_global_generators_are_not_touched():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    policy, completion, _ = tabular(0)
    for law in ALL_LAWS:
        draws_of(policy, completion, law.draw(keys_of(6, 3), 4))
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0]
    assert before[1][2] == after[1][2]
    assert (before[1][1] == after[1][1]).all()
    assert torch.equal(before[2], after[2])


# --- the law of the masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [0, 1])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("draws", [1, 3, 8])
def test_counts_are_uniform(smallest, stratified, draws):
    masks = count_masks(keys_of(7, 6000), 5, draws, coupled=False, stratified=stratified, smallest=smallest)
    counts = masks.hidden.sum(-1) - smallest
    assert counts.min() >= 0
    for of_draw in counts:
        assert_law(of_draw.bincount(minlength=6 - smallest))


@pytest.mark.parametrize("smallest", [0, 1])
def test_independent_draws_are_independent(smallest):
    masks = count_masks(keys_of(8, 8000), 3, 2, coupled=False, stratified=False, smallest=smallest)
    span = 4 - smallest
    counts = masks.hidden.sum(-1) - smallest
    assert_law((counts[0] * span + counts[1]).bincount(minlength=span * span))


@pytest.mark.parametrize("smallest", [0, 1])
@pytest.mark.parametrize("draws", [2, 3, 4, 6, 11])
def test_stratified_counts_are_the_shifts_of_one_pattern(smallest, draws):
    length = 5
    span = length + 1 - smallest
    masks = count_masks(keys_of(9, 3000), length, draws, coupled=False, stratified=True, smallest=smallest)
    patterns = set(map(tuple, (masks.hidden.sum(-1) - smallest).T.tolist()))
    expected = {tuple((u + m * span // draws) % span for m in range(draws)) for u in range(span)}
    assert patterns == expected
    for m in range(draws):  # every draw's marginal over the starts is exactly uniform
        assert sorted(pattern[m] for pattern in expected) == list(range(span))
    for pattern in expected:  # and the counts of one completion are spread as evenly as possible
        used = torch.tensor(pattern).bincount(minlength=span)
        assert used.max() - used.min() <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_subset_is_uniform_given_the_count(count):
    hidden = random_subset(keys_of(10, 6000), torch.full((6000,), count), 5)
    assert (hidden.sum(-1) == count).all()
    observed = (hidden * 2 ** torch.arange(5)).sum(-1).bincount(minlength=32)
    allowed = [a for a in range(32) if a.bit_count() == count]
    assert observed[allowed].sum() == 6000
    if len(allowed) > 1:
        assert_law(observed[allowed])


@pytest.mark.parametrize("stratified", [False, True])
def test_subset_is_uniform_given_the_count_in_masks(stratified):
    masks = count_masks(keys_of(11, 20000), 4, 2, coupled=True, stratified=stratified)
    for hidden in masks.hidden:
        probabilities = torch.tensor([1 / (5 * math.comb(4, a.bit_count())) for a in range(16)])
        assert_law((hidden * 2 ** torch.arange(4)).sum(-1).bincount(minlength=16), probabilities)
    same = (masks.hidden[0] == masks.hidden[1]).all(-1) & (masks.hidden[0].sum(-1) == 2)
    assert not stratified or not same.any()
    assert stratified or same.any()


@pytest.mark.parametrize(("coupled", "smallest"), COUNT_LAWS)
def test_weights_of_every_position(coupled, smallest):
    length = 7
    masks = count_masks(keys_of(12, 500), length, 2, coupled=coupled, stratified=False, smallest=smallest)
    span = length + 1 - smallest
    for hidden, weight in zip(masks.hidden.view(-1, length).tolist(), masks.weight.view(-1, length).tolist()):
        k = sum(hidden)
        for is_hidden, w in zip(hidden, weight):
            inside = span / k if is_hidden else 0.0
            outside = 0.0 if is_hidden else span / (length - k)
            exact = (inside + outside) / 2 if coupled else inside
            assert w == pytest.approx(exact, rel=2**-23)
    assert (masks.weight > 0).all() == coupled  # coupled: every position is scored, in exactly one of the halves
    assert masks.coupled == coupled


def test_coupled_scores_every_position_once():
    policy, completion, _ = tabular(1)
    calls = []

    class Spy(TabularPolicy):
        def forward(self, ids, attention, select, reduce, *columns):
            calls.append(select[:, 2:])
            return super().forward(ids, attention, select, reduce, *columns)

    spy = Spy(3, 4, generator=rng(1))
    masks = ELBO(draws=3).draw(keys_of(13, 50), 4)
    scores = draws_of(spy, completion, masks)
    (selected,) = calls
    rows = torch.cat([masks.hidden, ~masks.hidden]).flatten(0, 1)
    rows = rows[rows.any(-1)]  # only halves with something hidden are run, in this order
    assert torch.equal(selected[-len(rows) :], rows)  # (a first row that hides nothing may stand before)
    assert selected.sum() == 3 * 50 * 4  # every position of every draw, once
    torch.testing.assert_close(scores, draws_of(policy, completion, masks), rtol=0, atol=0)


def test_bernoulli_masks_have_uniform_t_and_weight_one_over_t():
    masks = bernoulli_masks(keys_of(14, 4000), 256, 2)
    weight = masks.weight.amax(-1)
    assert ((masks.weight == weight.unsqueeze(-1)) == masks.hidden)[weight > 0].all()
    t = torch.where(weight > 0, 1 / weight.double(), 0.0)  # nothing hidden: t is small and unknown
    assert t.max() <= 1
    assert_law((t * 10).long().clamp(max=9).flatten().bincount(minlength=10))
    share = masks.hidden.double().mean(-1)
    z = ((share - t) / (t * (1 - t) / 256).sqrt())[(t > 0.1) & (t < 0.9)]
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert_variance(z, 1.0)
    narrow = bernoulli_masks(keys_of(15, 4000), 64, 1, low=0.2, high=0.6).weight.amax(-1).flatten()
    assert 1 / 0.6 <= narrow.min() < narrow.max() <= 1 / 0.2 + 1e-6
    assert_law(((1 / narrow.double() - 0.2) / 0.4 * 8).long().clamp(0, 7).bincount(minlength=8))


def time_form(table: torch.Tensor, low: float, high: float) -> float:
    """E over t ~ U(0, 1) of 1{low <= t <= high} (1/t) E_mask sum of log-probs: a polynomial in t, by Gauss-Legendre."""
    length = table.shape[1]
    sizes = torch.tensor([a.bit_count() for a in range(2**length)]).double()
    total = 0.0
    for x, w in zip(*np.polynomial.legendre.leggauss(length)):
        t = low + (high - low) * (x + 1) / 2
        total += w / 2 * (high - low) * (t ** (sizes - 1) * (1 - t) ** (length - sizes) * table.sum(1)).sum().item()
    return total


def test_time_form_is_the_elbo_and_bernoulli_draws_estimate_it():
    policy, completion, table = tabular(2)
    assert time_form(table, 0, 1) == pytest.approx(exact_elbo(table).item(), abs=1e-12)
    masks = bernoulli_masks(keys_of(16, 40000), 4, 1)
    scores = draws_of(policy, completion, masks)
    # 1/t has no variance on (0, 1): test where it is bounded; the rest of the law of t is tested above
    assert_mean(torch.where(masks.weight.amax(-1)[0] <= 20, scores, 0.0), time_form(table, 0.05, 1))
    narrow = draws_of(policy, completion, TimeELBO(low=0.3, high=0.8).draw(keys_of(17, 40000), 4))
    assert_mean(narrow, time_form(table, 0.3, 0.8) / 0.5)


@pytest.mark.parametrize(("nodes", "length"), [(1, 4), (2, 7), (3, 8), (3, 256)])
def test_quadrature_weights(nodes, length):
    masks = quadrature_masks(keys_of(18, 20), length, nodes)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    assert masks.hidden.shape == (nodes, 20, length)
    for hidden, weight, x, w in zip(masks.hidden, masks.weight, points, weights):
        k = max(1, round((x + 1) / 2 * length))
        assert (hidden.sum(-1) == k).all()
        assert (weight[~hidden] == 0).all()
        # mean over the nodes of the sum over positions = sum over nodes of w/2 L (mean log-prob of the hidden)
        torch.testing.assert_close(weight[hidden] / nodes, torch.full((20 * k,), w / 2 * length / k))
    assert masks.weight.sum(-1).mean(0) == pytest.approx(length, rel=1e-6)
    assert not masks.coupled


def test_quadrature_estimates_its_own_weighted_sum():
    policy, completion, table = tabular(3)
    scores = draws_of(policy, completion, QuadratureELBO(nodes=2).draw(keys_of(19, 20000), 4))
    sizes = torch.tensor([a.bit_count() for a in range(16)])
    expected = sum(0.5 * 4 / k * table.sum(1)[sizes == k].mean().item() for k in (1, 3))  # nodes 0.21, 0.79
    assert_mean(scores, expected)


def test_full_mask_is_the_mean_field():
    policy, completion, table = tabular(4)
    masks = full_mask(keys_of(20, 3), 4)
    assert masks.hidden.all()
    assert (masks.weight == 1).all()
    expected = table[-1].sum().expand(3)
    torch.testing.assert_close(draws_of(policy, completion, masks), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELBO(smallest_count=2), "smallest must be 0"),
        (lambda: ELBO(smallest_count=1), "coupled=False"),
        (lambda: ELBO(draws=0), "at least 1"),
        (lambda: TimeELBO(low=0.5, high=0.5).draw(keys_of(0, 1), 4), "low < high"),
    ],
)
def test_contradictory_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
