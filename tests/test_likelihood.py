"""Mask laws and Monte-Carlo likelihoods against exact enumeration; gradients of the loss through them."""

import copy
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning.keys import fold_in, randint, random_bits, random_subset, real, uniform, unit
from espo_lightning.lab.exact import exact_elbo, score_moments, subset_log_probs
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.objectives.policy_gradient import espo_loss
from espo_lightning.objectives.ratios import sequence_ratio, token_ratio
from espo_lightning.policies import prefix as prefix_module
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.prefix import apply_head
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO, MeanField, QuadratureELBO, TimeELBO
from espo_lightning.scoring.masks import Masks, bernoulli_masks, count_masks, full_mask, quadrature_masks
from espo_lightning.scoring.score import score, token_log_probs

PROMPT = Prompts(torch.zeros(1, 2, dtype=torch.int64), None)
COUNT_LAWS = [(False, 0), (True, 0), (False, 1)]  # coupled, smallest


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_of(seed: int, n: int) -> torch.Tensor:
    return fold_in(seed, torch.arange(n))


def assert_law(observed: torch.Tensor, probabilities: torch.Tensor | None = None) -> None:
    """Chi-square test of counts [cells], uniform by default, at the level 1e-4 that is fixed here, once for all."""
    if probabilities is None:
        probabilities = torch.full((len(observed),), 1 / len(observed))
    expected = observed.sum() * probabilities.double()
    assert expected.min() >= 5  # else the chi-square law is no approximation
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2) > 1e-4


def assert_mean(samples: torch.Tensor, expected: float) -> None:
    """The sample mean lies within 4 standard errors."""
    assert abs(samples.mean() - expected) < 4 * samples.std() / math.sqrt(len(samples))


def assert_variance(samples: torch.Tensor, expected: float) -> None:
    """The sample variance lies within 4 of its standard errors."""
    assert_mean((samples - samples.mean()) ** 2, expected)


def tabular(seed: int, length: int = 4, symbols: int = 3) -> tuple[TabularPolicy, torch.Tensor, torch.Tensor]:
    """A policy, a completion [L], and its table."""
    policy = TabularPolicy(symbols, length, generator=rng(seed))
    completion = torch.randint(symbols, (length,), generator=rng(seed + 1000))
    return policy, completion, subset_log_probs(policy, PROMPT, completion).detach()


def draws_of(policy, completion: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Scores [B] of one completion on masks for B rows."""
    n = masks.hidden.shape[1]
    with torch.no_grad():
        return score(policy, PROMPT.repeat_each(n), completion.expand(n, -1), masks).sum(-1).mean(0)


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


# --- unbiasedness and variance ------------------------------------------------------------------------------


def law_by_hand(length: int, coupled: bool, smallest: int) -> tuple[Masks, torch.Tensor]:
    """Every subset once, as the rows of one draw, with float64 weights; and the probability of each."""
    span = length + 1 - smallest
    hidden, weight, probability = [], [], []
    for k in range(smallest, length + 1):
        for subset in itertools.combinations(range(length), k):
            row = [i in subset for i in range(length)]
            inside, outside = (span / k if k else 0.0), (span / (length - k) if k < length else 0.0)
            hidden.append(row)
            weight.append([(inside if h else outside) / 2 if coupled else inside * h for h in row])
            probability.append(1 / (span * math.comb(length, k)))
    return (
        Masks(torch.tensor([hidden]), torch.tensor([weight], dtype=torch.float64), coupled),
        torch.tensor(probability, dtype=torch.float64),
    )


@pytest.mark.parametrize(("coupled", "smallest"), COUNT_LAWS)
@pytest.mark.parametrize("length", [1, 3, 5])
def test_score_averaged_over_its_law_is_the_elbo(coupled, smallest, length):
    policy, completion, table = tabular(length, length)
    masks, probability = law_by_hand(length, coupled, smallest)
    assert probability.sum().item() == pytest.approx(1, abs=1e-14)
    scores = draws_of(policy, completion, masks)
    mean = (probability * scores).sum().item()
    assert mean == pytest.approx(exact_elbo(table).item(), abs=1e-12)
    exact = score_moments(table, coupled=coupled, smallest=smallest)
    assert exact.mean.item() == pytest.approx(mean, abs=1e-12)
    variance = (probability * (scores - mean) ** 2).sum().item()
    assert exact.variance.item() == pytest.approx(variance, abs=1e-11)


@pytest.mark.parametrize("length", [3, 5])
def test_elbo_gradient_averaged_over_its_law_is_that_of_the_elbo(length):
    policy, completion, _ = tabular(length, length)
    masks, probability = law_by_hand(length, True, 0)
    n = len(probability)
    scores = score(policy, PROMPT.repeat_each(n), completion.expand(n, -1), masks).sum(-1)[0]
    mean_gradient = torch.autograd.grad((probability * scores).sum(), policy.table)[0]
    exact = torch.autograd.grad(exact_elbo(subset_log_probs(policy, PROMPT, completion)), policy.table)[0]
    torch.testing.assert_close(mean_gradient, exact, rtol=0, atol=1e-13)


ELBOS = [
    ELBO(coupled=False),
    ELBO(coupled=False, draws=2),
    ELBO(coupled=False, smallest_count=1),
    ELBO(),
    ELBO(draws=4),
    ELBO(draws=4, stratified=True),
    ELBO(draws=3, coupled=False, stratified=True, smallest_count=1),
]


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("elbo", ELBOS, ids=repr)
def test_drawn_elbos_have_the_exact_mean_and_variance(elbo, seed):
    policy, completion, table = tabular(seed)
    scores = draws_of(policy, completion, elbo.draw(keys_of(21 + seed, 20000), 4))
    exact = score_moments(
        table, draws=elbo.draws, coupled=elbo.coupled, stratified=elbo.stratified, smallest=elbo.smallest_count
    )
    assert exact.mean.item() == pytest.approx(exact_elbo(table).item(), abs=1e-12)
    assert_mean(scores, exact.mean.item())
    assert_variance(scores, exact.variance.item())


def stratified_ratios(length: int, draws: int, coupled: bool) -> torch.Tensor:
    """Exact variance with stratified counts over that with independent ones, on 20 random tables."""
    ratios = []
    for seed in range(20):
        _, _, table = tabular(seed, length, symbols=2)
        independent = score_moments(table, draws=draws, coupled=coupled)
        stratified = score_moments(table, draws=draws, coupled=coupled, stratified=True)
        assert stratified.mean.item() == pytest.approx(independent.mean.item(), abs=1e-12)
        ratios.append(stratified.variance / independent.variance)
    return torch.stack(ratios)


@pytest.mark.parametrize("length", [4, 6, 8])
@pytest.mark.parametrize("coupled", [False, True])
def test_stratification_removes_variance(coupled, length):
    # M = L + 1: every count once, so nothing is left between the counts; M = 4: fewer on average
    assert stratified_ratios(length, length + 1, coupled).max() < 1
    assert stratified_ratios(length, 4, coupled).mean() < 0.9


def test_stratification_is_no_guarantee_on_a_single_table():
    # a coupled score is nearly the same at k and L - k, which two evenly spaced counts may both be
    ratios = stratified_ratios(5, 2, coupled=True)
    assert ratios.min() < ratios.mean() < 1 < ratios.max()


def test_coupling_is_no_guarantee_against_two_independent_forwards():
    ratios = []
    for seed in range(20):
        _, _, table = tabular(seed, 5)
        two = score_moments(table, draws=2, coupled=False).variance
        ratios.append((two / score_moments(table, coupled=True).variance).item())
    assert min(ratios) < 1 < max(ratios)


@pytest.mark.parametrize("coupled", [False, True])
def test_single_passes_are_the_parts_of_every_draw(coupled):
    policy, completion, _ = tabular(7)
    prompts, completions = PROMPT.repeat_each(20), completion.expand(20, -1)
    masks = ELBO(draws=3, coupled=coupled).draw(keys_of(22, 20), 4)
    views, per_draw = masks.single_passes(), 1 + coupled
    assert len(views) == 3 * per_draw
    terms = score(policy, prompts, completions, masks)
    for m in range(3):
        parts = [score(policy, prompts, completions, view) for view in views[m * per_draw : (m + 1) * per_draw]]
        torch.testing.assert_close(sum(parts), terms[m : m + 1], rtol=0, atol=0)
        assert sum((view.weight > 0).int() for view in views[m * per_draw : (m + 1) * per_draw]).max() == 1
    assert all(not view.coupled and not view.weight[~view.hidden].any() for view in views)


# --- scoring a network --------------------------------------------------------------------------------------


class Tokenizer:
    """All that scoring needs of a tokenizer is that there is one."""


VOCABULARY, MASK = 17, 16


def tiny_llama(seed: int = 0) -> Policy:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        is_causal=False,
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).eval()
    generator = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.35, generator=generator)
    return Policy(model, Tokenizer(), mask_id=MASK)


def batch(n: int = 5, width: int = 4, length: int = 6) -> tuple[Prompts, torch.Tensor]:
    """Prompts of different lengths, left-padded, and completions."""
    generator = rng(99)
    mask = torch.arange(width) >= torch.arange(n).unsqueeze(1) % width
    ids = torch.randint(2, MASK, (n, width), generator=generator).masked_fill(~mask, 0)
    return Prompts(ids, mask), torch.randint(1, MASK, (n, length), generator=generator)


def test_attention_is_full():
    policy, (prompts, completion) = tiny_llama(), batch()
    for attention in (None, prompts.attention(6)):
        ids = torch.cat([prompts.ids, completion], 1)
        select = torch.ones_like(ids, dtype=torch.bool)
        first = policy(ids, attention, select, lambda logits: logits).view(5, 10, -1)
        ids[:, -1] = MASK
        second = policy(ids, attention, select, lambda logits: logits).view(5, 10, -1)
        assert ((first - second).abs().amax(-1) > 1e-3).all()  # the last token moves every logit


def test_row_does_not_depend_on_batch_mates_or_padding():
    policy, (prompts, completion) = tiny_llama(), batch()
    masks = ELBO(draws=2).draw(keys_of(23, 5), 6)
    with torch.no_grad():
        together = score(policy, prompts, completion, masks)
        assert (together != 0).all()
        for row in range(5):
            rows = slice(row, row + 1)
            alone = score(policy, prompts.of(rows), completion[rows], masks.of(rows))
            unpadded = Prompts(prompts.ids[rows, row % 4 :], None)
            other_padding = Prompts(F.pad(prompts.ids[rows], (3, 0), value=7), F.pad(prompts.mask[rows], (3, 0)))
            for variant in (
                alone,
                score(policy, unpadded, completion[rows], masks.of(rows)),
                score(policy, other_padding, completion[rows], masks.of(rows)),
            ):
                torch.testing.assert_close(variant, together[:, rows], rtol=1e-5, atol=1e-5)


def test_terms_are_the_weighted_log_probs_one_view_at_a_time():
    policy, (prompts, completion) = tiny_llama(), batch()
    masks = ELBO(draws=2).draw(keys_of(24, 5), 6)
    with torch.no_grad():
        terms = score(policy, prompts, completion, masks)
        for m, hidden in enumerate(masks.hidden):
            for half in (hidden, ~hidden):
                ids = torch.cat([prompts.ids, completion.masked_fill(half, MASK)], 1)
                everything = torch.ones_like(ids, dtype=torch.bool)
                logits = policy(ids, prompts.attention(6), everything, lambda x: x).view(5, 10, -1)[:, 4:]
                log_probs = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
                expected = (log_probs * masks.weight[m])[half]
                torch.testing.assert_close(terms[m][half], expected, rtol=1e-5, atol=1e-5)


def test_terms_equal_themselves_bit_for_bit_with_and_without_gradients():
    policy, (prompts, completion) = tiny_llama(), batch()
    masks = ELBO(draws=2).draw(keys_of(25, 5), 6)
    with torch.no_grad():
        old = score(policy, prompts, completion, masks)
    assert torch.equal(score(policy, prompts, completion, masks), old)


def test_prompts_and_completions_are_not_altered():
    policy, (prompts, completion) = tiny_llama(), batch()
    copies = prompts.ids.clone(), prompts.mask.clone(), completion.clone()
    score(policy, prompts, completion, ELBO().draw(keys_of(26, 5), 6))
    assert all(torch.equal(a, b) for a, b in zip(copies, (*prompts, completion)))


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_head_in_chunks_gives_the_same_values_and_gradients(monkeypatch, as_tuple, rows):
    head = torch.nn.Linear(8, 11, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=rng(0))
    hidden = torch.randn(10, 8, generator=rng(1), dtype=torch.float64).requires_grad_()
    targets, sizes = torch.randint(11, (10,), generator=rng(2)), []

    def reduce(logits, targets):
        sizes.append(len(logits))
        log_probs = token_log_probs(logits, targets)
        return (log_probs, logits.logsumexp(-1)) if as_tuple else log_probs

    def run() -> tuple:
        out = apply_head(head, hidden, reduce, (targets,))
        out = out if as_tuple else (out,)
        weights = torch.arange(1.0, 11.0)
        grads = torch.autograd.grad(sum((weights * o).sum() for o in out), [hidden, *head.parameters()])
        with torch.no_grad():
            without = apply_head(head, hidden, reduce, (targets,))
        return *out, *grads, *(without if as_tuple else (without,))

    whole = run()
    assert sizes == [10, 10]
    sizes.clear()
    monkeypatch.setattr(prefix_module, "HEAD_BYTES", 4 * 11 * rows)
    chunked = run()
    assert max(sizes) == rows
    assert sum(sizes) == 30  # once forward, once recomputed, once without gradients
    assert len(whole) == len(chunked)
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the head's output is rounded to float32


def test_score_with_a_chunked_head(monkeypatch):
    policy, (prompts, completion) = tiny_llama(), batch()
    masks = ELBO(draws=2).draw(keys_of(27, 5), 6)
    results = []
    for head_bytes in (prefix_module.HEAD_BYTES, 4 * VOCABULARY * 7):
        monkeypatch.setattr(prefix_module, "HEAD_BYTES", head_bytes)
        terms = score(policy, prompts, completion, masks)
        results.append((terms, *torch.autograd.grad(terms.sum(), list(policy.parameters()))))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


# --- gradients of the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_range", [0.0, 4e-4, 0.2, math.inf])
@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
def test_at_ratio_one_the_gradient_in_the_score_is_the_advantage(ratio, clip_range):
    draws, rows, length = 3, 4, 5
    old = torch.randn(draws, rows, length, generator=rng(0), dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5, 0.25, -2.0], dtype=torch.float64)
    terms = old.clone().requires_grad_()
    loss, statistics = espo_loss(terms, old, None, advantages, clip_range=clip_range, beta=0.0, ratio=ratio)
    (gradient,) = torch.autograd.grad(loss, terms)
    # S = mean over draws of the sum over positions, so d/dS = the sum over draws of d/dterm, at every position
    expected = (-advantages / (rows * length)).unsqueeze(-1).expand(rows, length)
    torch.testing.assert_close(gradient.sum(0), expected, rtol=0, atol=1e-16)
    torch.testing.assert_close(gradient, (expected / draws).expand(draws, rows, length), rtol=0, atol=1e-16)
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-15)
    assert not statistics.clip_low.any()
    assert not statistics.clip_high.any()


@pytest.mark.parametrize("seed", [8, 9])
def test_at_ratio_one_token_and_sequence_level_gradients_coincide(seed):
    policy, completion, _ = tabular(seed)
    completions = torch.stack([completion, completion.roll(1), completion.flip(0)])
    masks = ELBO(draws=2).draw(keys_of(28, 3), 4)
    gradients = []
    for ratio, moved in itertools.product((token_ratio, sequence_ratio), (False, True)):
        terms = score(policy, PROMPT.repeat_each(3), completions, masks)
        old = terms.detach() + moved * torch.randn(terms.shape, generator=rng(seed), dtype=torch.float64)
        loss, _ = espo_loss(
            terms, old, None, torch.tensor([1.0, -0.3, -0.7]).double(), clip_range=math.inf, beta=0.0, ratio=ratio
        )
        gradients.append(torch.autograd.grad(loss, policy.table)[0])
    token, token_moved, sequence, sequence_moved = gradients
    torch.testing.assert_close(token, sequence, rtol=0, atol=1e-15)
    assert token.norm() > 1e-3
    assert (token_moved - sequence_moved).norm() > 1e-3  # they differ off-policy, and only there


def setting(kind: str) -> tuple:
    """(policy, prompts, completions) of a tabular policy or of a small network."""
    if kind == "tabular":
        policy, completion, _ = tabular(10)
        return policy, PROMPT.repeat_each(3), torch.stack([completion, completion.roll(1), completion.flip(0)])
    return tiny_llama(), *batch(3)


@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("kind", ["tabular", "llama"])
def test_gradient_view_by_view_is_that_of_one_graph(kind, coupled, ratio):
    policy, prompts, completions = setting(kind)
    masks = ELBO(draws=2, coupled=coupled).draw(keys_of(29, 3), completions.shape[1])
    parameters = list(policy.parameters())

    terms = score(policy, prompts, completions, masks)
    old, ref = (terms.detach() + 0.5 * torch.randn(terms.shape, generator=rng(s)).to(terms) for s in (1, 2))
    advantages = torch.tensor([1.0, -0.4, -0.6]).to(terms)

    def loss(terms: torch.Tensor) -> torch.Tensor:
        return espo_loss(terms, old, ref, advantages, clip_range=0.2, beta=0.05, ratio=ratio)[0]

    one_graph = torch.autograd.grad(loss(terms), parameters)

    with torch.no_grad():
        leaf = score(policy, prompts, completions, masks)
    leaf.requires_grad_()
    (coefficients,) = torch.autograd.grad(loss(leaf), leaf)
    assert (coefficients != 0).any()
    accumulated = [torch.zeros_like(p) for p in parameters]
    views = masks.single_passes()
    for n, view in enumerate(views):
        part = score(policy, prompts, completions, view)[0]
        objective = (coefficients[n * masks.hidden.shape[0] // len(views)] * part).sum()
        for total, gradient in zip(accumulated, torch.autograd.grad(objective, parameters)):
            total += gradient

    tolerance = 1e-15 if kind == "tabular" else 1e-5
    scale = max(g.abs().max().item() for g in one_graph)
    assert scale > 1e-3
    for a, b in zip(accumulated, one_graph):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1))


def test_the_last_layer_at_selected_positions_gives_the_numbers_of_the_whole_layer():
    """`selective_layer` against transformers' own forward: scores and every gradient."""
    size = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24}
    policies = new_policy(**size), new_policy(**size, whole_last_layer=True)
    assert [policy.selective for policy in policies] == [True, False]
    prompts = policies[0].encode(["ab", "cdef"])
    completion = torch.randint(7, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    masks = ELBO(draws=3).draw(torch.arange(2), 6)
    gradients = []
    for policy in policies:
        terms = score(policy, prompts, completion, masks)
        terms.square().sum().backward()
        gradients.append([terms.detach(), *(p.grad.clone() for p in policy.parameters())])
    for selected, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(selected, whole, rtol=1e-5, atol=1e-6)


def test_a_copied_policy_runs_its_own_last_layer():
    """`selective_layer` is bound to its layer: a frozen reference must not run the policy's."""
    policy = new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24)
    twin = copy.deepcopy(policy)
    prompts, masks = policy.encode(["ab"]), ELBO().draw(torch.arange(1), 4)
    completion = torch.tensor([[8, 9, 10, 11]])
    before = score(twin, prompts, completion, masks)
    with torch.no_grad():
        for parameter in policy.model.model.layers[-1].parameters():
            parameter.add_(1.0)
    assert torch.equal(score(twin, prompts, completion, masks), before)
    assert not torch.equal(score(policy, prompts, completion, masks), before)


def test_halves_with_nothing_hidden_cost_no_forward_rows():
    rows = []
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    original = policy.forward
    policy.forward = lambda ids, *rest: (rows.append(len(ids)), original(ids, *rest))[1]
    prompts, completion = policy.encode(["ab", "ab", "ab"]), torch.full((3, 4), 9)
    hidden = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])[None]
    weight = torch.ones(1, 3, 4)
    terms = score(policy, prompts, completion, Masks(hidden, weight, True))
    assert rows == [1 + 1 + 2]
    assert (terms < 0).all()
    nothing = score(policy, prompts, completion, Masks(torch.zeros_like(hidden), weight, False))
    assert rows == [4, 1]
    assert torch.equal(nothing, torch.zeros(1, 3, 4))
