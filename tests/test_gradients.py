"""Moments of gradient estimators against per-sample autograd, and small canvases against the policy they show."""

import itertools
import math

import pytest
import torch

from espo_lightning import ELBO, Decoding, MeanField, espo_loss, generate, k2, low_confidence, score, token_ratio
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import (
    all_symbols,
    completion_law,
    elbos,
    enumerate_completions,
    exact_policy_gradient,
    lattice_edges,
    log_likelihoods,
    low_confidence_log_likelihoods,
)
from espo_lightning.lab.gradients import EdgeGradients, Estimator, completion_edges, estimator_moments, mask_completions
from espo_lightning.lab.tabular import FreeCells, TabularPolicy
from espo_lightning.policies.policy import Prompts
from espo_lightning.scoring.masks import Masks
from tests.conftest import small_policy

PROMPT = Prompts(torch.zeros(1, 2, dtype=torch.int64), None)
V, L = 3, 3


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def policy():
    return TabularPolicy(V, L, generator=rng(0))


@pytest.fixture(scope="module")
def gradients(policy):
    return EdgeGradients(policy, PROMPT, V, L)


def test_weighted_edges_equal_autograd(policy, gradients):
    rewards = torch.rand(V**L, generator=rng(1), dtype=torch.float64)
    law = completion_law(policy, PROMPT, V, L)
    torch.testing.assert_close(log_likelihoods(gradients.edges), law.log_likelihood.detach(), rtol=0, atol=1e-12)
    for function, values in ((log_likelihoods, law.log_likelihood), (elbos, law.elbo)):
        expected = exact_policy_gradient(policy, values, law.log_likelihood, rewards, centred=False)
        ours = gradients.of(lambda e, f=function: (law.log_likelihood.detach().exp() * rewards * f(e)).sum())
        torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-7)


def test_every_entry_of_a_completions_table_is_its_edge(policy, gradients):
    edges, index = gradients.edges.flatten(), completion_edges(V, L)
    place = 4 ** torch.arange(L)
    for y, tokens in enumerate(enumerate_completions(V, L).tolist()):
        for code, i in itertools.product(range(2**L), range(L)):
            canvas = [V if code >> j & 1 else tokens[j] for j in range(L)]
            state = (torch.tensor(canvas) * place).sum()
            expected = policy.table[state, i].log_softmax(-1)[tokens[i]].item() if code >> i & 1 else 0.0
            assert edges[index[y, code, i]].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("likelihood", [ELBO(draws=2), ELBO(coupled=False, smallest_count=1), MeanField()])
@pytest.mark.parametrize("ratio", [None, token_ratio])
def test_moments_equal_the_scatter_of_sample_gradients(policy, gradients, likelihood, ratio):
    """One backward pass per (completion, masks), through `score`, on the same masks."""
    samples, old = 3, TabularPolicy(V, L, generator=rng(2))
    advantages = torch.randn(V**L, generator=rng(3), dtype=torch.float64)
    probability = completion_law(old, PROMPT, V, L).log_likelihood.detach().exp()
    masked = mask_completions(likelihood, V, L, samples, key=7)
    old_terms = masked.terms(lattice_edges(old, PROMPT, all_symbols(V, L)).detach())

    def loss(terms, old_terms, ref, advantages, rows):
        surrogate, _ = espo_loss(
            terms, old_terms, None, advantages, clip_range=0.5, beta=0.0, **({"ratio": ratio} if ratio else {})
        )
        return rows * surrogate + k2((terms - ref).sum(-1)).sum()

    estimator = Estimator(
        masked, lambda t: loss(t, old_terms, old_terms, advantages[masked.completion], len(masked.completion))
    )
    (moments,) = estimator_moments(gradients, gradients.products(), probability, {"it": estimator}).values()
    completions = enumerate_completions(V, L)
    sample_gradients, weights = [], []
    drawn = likelihood.draw(fold_in(7, torch.arange(len(masked.completion))), L)
    for row, y in enumerate(masked.completion.tolist()):
        masks = drawn.of(slice(row, row + 1))
        terms, before = (score(p, PROMPT, completions[y : y + 1], masks) for p in (policy, old))
        torch.testing.assert_close(terms, masked.terms(gradients.edges)[:, row : row + 1], rtol=0, atol=1e-6)
        value = loss(terms, before.detach(), before.detach(), advantages[y : y + 1], 1)
        sample_gradients.append(torch.autograd.grad(value, policy.table)[0].flatten())
        weights.append(probability[y] / samples)
    samples_, weights = torch.stack(sample_gradients), torch.stack(weights).unsqueeze(-1)
    mean = (weights * samples_).sum(0)
    variance = (weights * (samples_ - mean).square()).sum().item()
    of_completion = samples_.view(V**L, samples, -1)
    mask_variance = (probability * of_completion.var(1, correction=1).sum(-1)).sum().item()
    torch.testing.assert_close(moments.mean, mean.float(), rtol=1e-4, atol=1e-6)
    assert moments.variance == pytest.approx(variance, rel=1e-4)
    assert moments.mask_variance == pytest.approx(mask_variance, rel=1e-3, abs=1e-9)
    assert moments.noise == pytest.approx(variance / mean.square().sum().item(), rel=1e-4)


def test_sampled_masks_reach_the_elbo_in_the_mean(gradients):
    """The mean gradient of the negative scores tends to that of the ELBO."""
    probability = log_likelihoods(gradients.edges).exp()
    exact = gradients.of(lambda e: (probability * elbos(e)).sum())
    estimator = Estimator(mask_completions(ELBO(), V, L, 3000, key=1), lambda t: t.mean(0).sum())
    (moments,) = estimator_moments(gradients, gradients.products(), probability, {"elbo": estimator}).values()
    error = (moments.mean - exact).norm().item()
    assert error < 4 * math.sqrt(moments.mask_variance / 3000)
    assert moments.mask_variance > 0


def test_low_confidence_law_is_that_of_the_decoder():
    policy = TabularPolicy(2, 3, generator=rng(4), scale=1.5)
    n = 20_000
    law = low_confidence_log_likelihoods(lattice_edges(policy, PROMPT, all_symbols(2, 3))).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    keys = fold_in(3, torch.arange(n))
    decoding = Decoding(length=3, block_length=3, steps=3, order=low_confidence)
    completion = generate(policy, PROMPT.repeat_each(n), keys, decoding)
    counts = torch.bincount((completion * 2 ** torch.arange(3)).sum(1), minlength=8)
    expected = law.detach() * n
    chi_square = ((counts - expected).square() / expected)[expected > 1].sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, 0.1 %
    uniform = completion_law(policy, PROMPT, 2, 3).log_likelihood.detach().exp() * n
    assert ((counts - uniform).square() / uniform).sum().item() > 100  # and not that of the random order
    torch.autograd.grad(law.log().sum(), policy.table)[0].isfinite().all()


def test_free_cells_show_the_policy_itself():
    """Probabilities on the small canvas are those of the whole one, renormalised over the symbols."""
    policy = small_policy().double()
    prompt = policy.encode(["abc", "a"]).of(slice(1, 2))  # padded
    canvas, free, symbols = torch.tensor([20, 21, 22, 23, 24]), [1, 3], [8, 9, 10]
    cells = FreeCells(policy, canvas, free, symbols)
    assert cells.expand(torch.tensor([[2, 0], [3, 1]])).tolist() == [
        [20, 10, 22, 8, 24],
        [20, policy.mask_id, 22, 9, 24],
    ]
    completion = torch.tensor([[2, 1]])
    for hidden in ([True, False], [False, True], [True, True]):
        small = torch.tensor(hidden)[None, None]
        terms = score(cells, prompt, completion, Masks(small, small.float(), False))[0, 0]
        ids = torch.cat([prompt.ids, cells.expand(torch.where(small[0], cells.mask_id, completion))], 1)
        out = policy.model(ids, attention_mask=policy._bias(prompt.attention(5), ids.shape[1])).logits[0, -5:]
        for j, i in enumerate(free):
            expected = out[i, symbols].log_softmax(-1)[completion[0, j]].item() if hidden[j] else 0.0
            assert terms[j].item() == pytest.approx(expected, abs=1e-6)
    law = completion_law(cells, prompt, 3, 2)
    assert law.log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)
    drawn = generate(cells, prompt.repeat_each(5), fold_in(0, torch.arange(5)), Decoding(2, 2, 2))
    assert drawn.max() < 3


@pytest.mark.parametrize("free", [[2, 1], [], [0, 5], [1, 1]])
def test_free_cells_refuse_positions_outside_the_canvas(free):
    with pytest.raises(ValueError, match="ascending positions of a canvas of 5"):
        FreeCells(small_policy(), torch.zeros(5, dtype=torch.int64), free, [8, 9])
