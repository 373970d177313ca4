"""ELBOs against enumeration: mean, gradient, variance."""

import itertools
import math

import pytest
import torch
from likelihood_cases import COUNT_LAWS, PROMPT, assert_mean, assert_variance, draws_of, keys_of, tabular

from espo_lightning.lab.exact import exact_elbo, score_moments, subset_log_probs
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score

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
