"""The enumeration oracle against slower and simpler computations of the same numbers."""

import itertools
import math

import pytest
import torch

from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.decoding.orders import random_order
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import (
    completion_law,
    enumerate_completions,
    exact_elbo,
    exact_kl,
    exact_policy_gradient,
    order_gap,
    order_posterior,
    quadrature_moments,
    random_order_log_likelihood,
    score_moments,
    subset_log_probs,
)
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.policies.policy import Prompts
from espo_lightning.scoring.masks import quadrature_masks

PROMPT = Prompts(torch.zeros(1, 2, dtype=torch.int64), None)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_of(policy, completion) -> torch.Tensor:
    return subset_log_probs(policy, PROMPT, torch.as_tensor(completion))


def order_log_probs(policy: TabularPolicy, completion) -> dict[tuple, float]:
    """log-probability of revealing the completion in each of the L! orders, one forward per step."""
    length, result = len(completion), {}
    for order in itertools.permutations(range(length)):
        canvas, total = [policy.mask_id] * length, 0.0
        for position in order:
            ids, select = torch.tensor([canvas]), torch.zeros(1, length, dtype=torch.bool)
            select[0, position] = True
            total += policy(ids, None, select, lambda logits: logits.log_softmax(-1))[0, completion[position]].item()
            canvas[position] = completion[position]
        result[order] = total
    return result


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("completion", [(1,), (2, 0), (0, 2, 2), (2, 1, 0, 1)])
def test_elbo_likelihood_gap_and_posterior_equal_the_sum_over_orders(completion, consistent):
    length = len(completion)
    policy = TabularPolicy(3, length, generator=rng(length), consistent=consistent, scale=2.0)
    orders = order_log_probs(policy, completion)
    elbo = sum(orders.values()) / len(orders)
    likelihood = math.log(sum(math.exp(v) for v in orders.values()) / len(orders))
    table = table_of(policy, completion)
    assert exact_elbo(table).item() == pytest.approx(elbo, abs=1e-12)
    assert random_order_log_likelihood(table).item() == pytest.approx(likelihood, abs=1e-12)

    posterior = {order: math.exp(v - likelihood) / len(orders) for order, v in orders.items()}
    kl = sum(-math.log(len(orders) * p) for p in posterior.values()) / len(orders)
    assert order_gap(table).item() == pytest.approx(kl, abs=1e-12)
    weights = torch.zeros_like(table)
    for order, p in posterior.items():
        hidden = 2**length - 1
        for position in order:
            weights[hidden, position] += p
            hidden -= 2**position
    torch.testing.assert_close(order_posterior(table), weights, rtol=0, atol=1e-12)


def test_table_entries_are_log_probs_of_the_hidden_tokens():
    policy, completion = TabularPolicy(3, 3, generator=rng(0)), [2, 0, 1]
    table = table_of(policy, completion)
    assert table.shape == (8, 3)
    assert table.dtype == torch.float64
    for subset in range(8):
        digits = [3 if subset >> i & 1 else completion[i] for i in range(3)]
        row = policy.table[digits[0] + 4 * digits[1] + 16 * digits[2]].log_softmax(-1)
        for i in range(3):
            expected = row[i, completion[i]].item() if subset >> i & 1 else 0.0
            assert table[subset, i].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("symbols", "length"), [(2, 1), (2, 6), (3, 4), (5, 3)])
def test_law_sums_to_one_and_equals_the_tables(symbols, length):
    policy = TabularPolicy(symbols, length, generator=rng(symbols))
    law, completions = completion_law(policy, PROMPT, symbols, length), enumerate_completions(symbols, length)
    assert len(set(map(tuple, completions.tolist()))) == symbols**length == len(law.elbo)
    assert law.log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (law.elbo <= law.log_likelihood + 1e-12).all()
    for n in range(0, symbols**length, 7):
        table = table_of(policy, completions[n])
        assert law.elbo[n].item() == pytest.approx(exact_elbo(table).item(), abs=1e-12)
        assert law.log_likelihood[n].item() == pytest.approx(random_order_log_likelihood(table).item(), abs=1e-12)
        gap = random_order_log_likelihood(table) - exact_elbo(table)
        assert order_gap(table).item() == pytest.approx(gap.item(), abs=1e-12)


def test_elbo_of_consistent_conditionals_is_the_log_likelihood_of_the_joint():
    policy = TabularPolicy(3, 4, generator=rng(1), consistent=True, scale=2.0)
    law, joint = completion_law(policy, PROMPT, 3, 4), policy.table.log_softmax(0)
    torch.testing.assert_close(law.elbo, joint, rtol=0, atol=1e-10)
    torch.testing.assert_close(law.log_likelihood, joint, rtol=0, atol=1e-10)


def test_consistent_conditionals_are_those_of_the_joint():
    policy = TabularPolicy(2, 3, generator=rng(2), consistent=True)
    joint = {tuple(y): p for y, p in zip(enumerate_completions(2, 3).tolist(), policy.table.softmax(0).tolist())}
    probabilities = policy.logits().softmax(-1)
    for state in itertools.product(range(3), repeat=3):
        matching = [y for y in joint if all(s in (2, c) for s, c in zip(state, y))]
        for i in (i for i in range(3) if state[i] == 2):
            expected = sum(joint[y] for y in matching if y[i] == 1) / sum(joint[y] for y in matching)
            index = state[0] + 3 * state[1] + 9 * state[2]
            assert probabilities[index, i, 1].item() == pytest.approx(expected, abs=1e-14)


def test_random_order_decoder_samples_the_law():
    policy, n = TabularPolicy(2, 3, generator=rng(3)), 8000
    prompts = PROMPT.repeat_each(n)
    decoding = Decoding(length=3, block_length=3, steps=3, temperature=1.0, order=random_order)
    samples = generate(policy, prompts, fold_in(5, torch.arange(n)), decoding)
    observed = (samples * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8).double()
    expected = n * completion_law(policy, PROMPT, 2, 3).log_likelihood.exp()
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(3.5).double(), chi_square / 2) > 1e-4  # 7 degrees of freedom


def test_gradients_are_sums_over_the_same_edges():
    policy = TabularPolicy(2, 3, generator=rng(4))
    table = table_of(policy, [1, 0, 1])
    uniform, posterior = torch.autograd.grad(exact_elbo(table), table, retain_graph=True)[0], order_posterior(table)
    for subset in range(1, 8):
        size = subset.bit_count()
        for i in range(3):
            weight = 1 / (size * math.comb(3, size)) if subset >> i & 1 else 0.0
            assert uniform[subset, i].item() == pytest.approx(weight, abs=1e-14)
    by_edges = torch.autograd.grad((posterior * table).sum(), policy.table, retain_graph=True)[0]
    direct = torch.autograd.grad(random_order_log_likelihood(table), policy.table)[0]
    torch.testing.assert_close(by_edges, direct, rtol=0, atol=1e-14)


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_policy_gradient_of_the_likelihood_is_the_gradient_of_the_mean_reward(consistent, centred):
    policy = TabularPolicy(2, 4, generator=rng(5), consistent=consistent)
    rewards = torch.rand(16, generator=rng(6), dtype=torch.float64)
    law = completion_law(policy, PROMPT, 2, 4)
    gradient = exact_policy_gradient(policy, law.log_likelihood, law.log_likelihood, rewards, centred=centred)
    expected = torch.autograd.grad((law.log_likelihood.exp() * rewards).sum(), policy.table, retain_graph=True)[0]
    torch.testing.assert_close(gradient, expected.flatten(), rtol=0, atol=1e-13)
    if consistent:
        of_elbo = exact_policy_gradient(policy, law.elbo, law.log_likelihood, rewards, centred=centred)
        torch.testing.assert_close(of_elbo, expected.flatten(), rtol=0, atol=1e-13)


def test_mean_reward_gradient_against_finite_differences():
    policy, rewards, step = TabularPolicy(2, 3, generator=rng(7)), torch.arange(8.0).double(), 1e-6
    law = completion_law(policy, PROMPT, 2, 3)
    gradient = exact_policy_gradient(policy, law.log_likelihood, law.log_likelihood, rewards)
    for index in range(0, policy.table.numel(), 17):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                policy.table.view(-1)[index] += sign * step
                values.append((completion_law(policy, PROMPT, 2, 3).log_likelihood.exp() * rewards).sum().item())
                policy.table.view(-1)[index] -= sign * step
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_elbo_policy_gradient_is_biased_by_the_gap_and_more_so_without_centring(seed):
    rewards = torch.rand(64, generator=rng(seed + 100), dtype=torch.float64)
    gaps, cosines, uncentred = [], [], []
    for scale in (0.25, 0.5, 1.0, 2.0):  # the same directions, ever less consistent
        policy = TabularPolicy(2, 6, generator=rng(seed), scale=scale)
        law = completion_law(policy, PROMPT, 2, 6)
        true = exact_policy_gradient(policy, law.log_likelihood, law.log_likelihood, rewards)
        gaps.append((law.log_likelihood.exp() * (law.log_likelihood - law.elbo)).sum().item())
        cosines.append(cosine(true, exact_policy_gradient(policy, law.elbo, law.log_likelihood, rewards)))
        loose = exact_policy_gradient(policy, law.elbo, law.log_likelihood, rewards, centred=False)
        uncentred.append(cosine(true, loose))
    assert gaps == sorted(gaps)
    assert cosines == sorted(cosines, reverse=True)
    assert 0 < cosines[-1] < 0.9 < 0.98 < cosines[0] < 1
    assert all(u < c for u, c in zip(uncentred, cosines))


def test_noise_on_consistent_conditionals_trades_tightness_for_bias():
    consistent, free = (TabularPolicy(2, 5, generator=rng(8), consistent=c) for c in (True, False))
    noise, rewards = free.table.detach().clone(), torch.rand(32, generator=rng(9), dtype=torch.float64)
    gaps, cosines = [], []
    for size in (0.0, 0.1, 0.25, 0.5, 1.0):
        with torch.no_grad():
            free.table.copy_(consistent.logits() + size * noise)
        law = completion_law(free, PROMPT, 2, 5)
        gaps.append((law.log_likelihood.exp() * (law.log_likelihood - law.elbo)).sum().item())
        true, elbo = (exact_policy_gradient(free, s, law.log_likelihood, rewards) for s in law)
        cosines.append(cosine(true, elbo))
    assert gaps[0] == pytest.approx(0, abs=1e-12)
    assert gaps == sorted(gaps)
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[1] > 0.99 > cosines[-1]


def test_elbo_score_has_a_mean_gradient_only_if_the_bound_is_loose():
    ones = torch.ones(16, dtype=torch.float64)
    for consistent in (True, False):
        policy = TabularPolicy(2, 4, generator=rng(10), consistent=consistent)
        law = completion_law(policy, PROMPT, 2, 4)
        likelihood, elbo = (exact_policy_gradient(policy, s, law.log_likelihood, ones, centred=False) for s in law)
        assert likelihood.norm() < 1e-13
        assert (elbo.norm() < 1e-13) if consistent else (elbo.norm() > 0.1)


def test_kl():
    policy, ref = (TabularPolicy(3, 2, generator=rng(seed), consistent=True) for seed in (11, 12))
    ours, theirs = (completion_law(p, PROMPT, 3, 2).log_likelihood for p in (policy, ref))
    p, q = policy.table.softmax(0).tolist(), ref.table.softmax(0).tolist()
    assert exact_kl(ours, theirs).item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)), abs=1e-12)
    assert exact_kl(ours, ours).item() == 0
    # its gradient is that of k2 in the mean, on exact likelihoods: E[delta grad log p]
    gradient = torch.autograd.grad(exact_kl(ours, theirs), policy.table, retain_graph=True)[0]
    k2 = exact_policy_gradient(policy, ours, ours, (ours - theirs).detach(), centred=False)
    torch.testing.assert_close(gradient, k2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("coupled", [False, True])
def test_moments_of_every_kind_against_enumeration_by_hand(coupled):
    length, draws = 3, 2
    table = table_of(TabularPolicy(3, length, generator=rng(13)), [2, 1, 0]).detach()

    def score(subset: tuple) -> float:
        total = 0.0
        for part in [subset, tuple(set(range(length)) - set(subset))][: 1 + coupled]:
            code = sum(2**i for i in part)
            total += sum(table[code, i].item() * (length + 1) / len(part) for i in part) / (1 + coupled)
        return total

    def of_count(k: int) -> list[float]:
        return [score(subset) for subset in itertools.combinations(range(length), k)]

    def moments(outcomes: list[tuple[float, float]]) -> tuple[float, float]:  # (probability, value)
        mean = sum(p * v for p, v in outcomes)
        return mean, sum(p * (v - mean) ** 2 for p, v in outcomes)

    def pairs(counts: list[tuple[int, int]]) -> list[tuple[float, float]]:
        return [
            (1 / (len(counts) * math.comb(length, a) * math.comb(length, b)), (x + y) / 2)
            for a, b in counts
            for x in of_count(a)
            for y in of_count(b)
        ]

    counts = range(length + 1)
    single = [(1 / (4 * math.comb(length, k)), v) for k in counts for v in of_count(k)]
    assert score_moments(table, coupled=coupled) == pytest.approx(moments(single), abs=1e-12)
    independent = pairs(list(itertools.product(counts, counts)))
    assert score_moments(table, coupled=coupled, draws=draws) == pytest.approx(moments(independent), abs=1e-12)
    stratified = pairs([(u, (u + 2) % 4) for u in counts])
    result = score_moments(table, coupled=coupled, draws=draws, stratified=True)
    assert result == pytest.approx(moments(stratified), abs=1e-12)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_quadrature_moments_against_many_draws(nodes):
    table = table_of(TabularPolicy(3, 4, generator=rng(21)), [2, 1, 0, 1]).detach()
    masks = quadrature_masks(fold_in(5, torch.arange(20_000)), 4, nodes)
    code = (masks.hidden * 2 ** torch.arange(4)).sum(-1)  # [nodes, B]
    scores = (table[code] * masks.weight).sum(-1).mean(0)
    moments = quadrature_moments(table, nodes)
    assert moments.mean.item() == pytest.approx(scores.mean().item(), abs=4 * (moments.variance / 20_000).sqrt().item())
    assert moments.variance.item() == pytest.approx(scores.var().item(), rel=0.05, abs=1e-12)


def test_chunks_do_not_matter(monkeypatch):
    policy = TabularPolicy(3, 3, generator=rng(14))
    whole = completion_law(policy, PROMPT, 3, 3)
    monkeypatch.setattr("espo_lightning.lab.exact.CHUNK", 5)
    for a, b in zip(whole, completion_law(policy, PROMPT, 3, 3)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_prompt_and_its_padding_reach_the_policy():
    seen = []

    class Spy(TabularPolicy):
        def forward(self, ids, attention, *rest):
            seen.append((ids[:, :-2], attention))
            return super().forward(ids, attention, *rest)

    prompt = Prompts(torch.tensor([[7, 8, 9]]), torch.tensor([[False, True, True]]))
    subset_log_probs(Spy(2, 2, generator=rng(15)), prompt, torch.tensor([0, 1]))
    ((ids, attention),) = seen
    assert ids.tolist() == [[7, 8, 9]] * 4
    assert attention.tolist() == [[False, True, True, True, True]] * 4


def test_refusals():
    policy = TabularPolicy(2, 2, generator=rng(16))
    with pytest.raises(ValueError, match=r"2\^17 masks"):
        table_of(policy, [0] * 17)
    with pytest.raises(ValueError, match="one completion"):
        subset_log_probs(policy, PROMPT.repeat_each(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"10\^8 masked states"):
        completion_law(policy, PROMPT, 9, 8)
    with pytest.raises(ValueError, match="one prompt"):
        completion_law(policy, PROMPT.repeat_each(2), 2, 2)
    with pytest.raises(ValueError, match="smallest=0"):
        score_moments(table_of(policy, [0, 1]), coupled=True, smallest=1)
    with pytest.raises(ValueError, match="last 2 positions"):
        policy(torch.zeros(1, 4, dtype=torch.int64), None, torch.ones(1, 4, dtype=torch.bool), lambda logits: logits)
