"""What notebook 12 measures: bias, noise and improvement, against what is written down by hand."""

import pytest
import torch

from espo_lightning.lab.exact import enumerate_completions
from espo_lightning.lab.studies import bound
from espo_lightning.lab.studies.bound import KINDS, LENGTH, SYMBOLS, kept, law_of, likelihood_of, measure, rewards_of
from espo_lightning.scoring.block import BlockELBO
from espo_lightning.scoring.likelihood import ELBO


def rows_of(policy, samples: int = 4) -> dict[str, dict]:
    return {row["reward"]: row for row in measure(policy, seed=0, samples=samples, gain=1e-4)}


def test_a_table_without_noise_has_a_tight_bound():
    policy = KINDS["table"](0, 0.0)
    with torch.no_grad():
        law = law_of(policy)
    assert float(law.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(law.elbo, law.log_likelihood, atol=1e-12)
    for row in rows_of(policy).values():
        assert row["gap"] == pytest.approx(0, abs=1e-12)
        assert row["norm"] == pytest.approx(1, abs=0.1)
        assert row["cosine"] > 0.9  # of the gradient in the states' own parameters, which the joint law does not have


@pytest.mark.parametrize("level", [0.5, 2.0])
def test_noise_loosens_the_bound(level):
    gaps = [float(((law := law_of(KINDS["table"](1, x))).log_likelihood.exp() @ (law[0] - law[1])).detach()) for x in
            (level / 4, level)]  # fmt: skip
    assert 0 < gaps[0] < gaps[1]


def test_blocks_of_one_token_have_no_gap(monkeypatch):
    monkeypatch.setattr(bound, "BLOCK_LESSONS", 1)
    policy = KINDS["blocks"](0, 1)
    assert isinstance(likelihood_of(policy), BlockELBO)
    with torch.no_grad():
        law = law_of(policy)
    assert torch.equal(law.elbo, law.log_likelihood)  # and so the gradients are the same
    assert float(law.elbo.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert not rewards_of(0, law)["gap"].any()  # no completion's gap is above the median


def test_one_block_is_full_attention(monkeypatch):
    monkeypatch.setattr(bound, "BLOCK_LESSONS", 2)
    whole = KINDS["blocks"](0, LENGTH)
    assert type(likelihood_of(whole)) is ELBO
    assert torch.equal(law_of(whole).elbo, law_of(KINDS["taught network"](0, 2)).elbo)


def test_lessons_bring_a_network_nearer_to_its_law():
    target = (
        2 * torch.randn(SYMBOLS**LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).softmax(0)
    before, after = (float(target @ law_of(KINDS["taught network"](0, n)).elbo.detach()) for n in (0, 40))
    assert after > before + 0.1


def test_rewards():
    law = law_of(KINDS["table"](0, 1.0))
    rewards = rewards_of(0, law)
    assert set(rewards["share"].mul(LENGTH).round().int().tolist()) == set(range(LENGTH + 1))
    assert 0.05 < float(rewards["one in ten"].mean()) < 0.15
    gap = (law.log_likelihood - law.elbo).detach()
    assert torch.equal(rewards["gap"] > 0, gap > gap.median())


def test_bias_is_the_reward_s_covariance_with_the_gap_s_gradient():
    """Exact minus ELBO is the sum over y of p A grad gap: written down with autograd, on a loose table."""
    policy = KINDS["table"](2, 1.0)
    law = law_of(policy)
    p = law.log_likelihood.detach().exp()
    reward = rewards_of(2, law)["one in ten"]
    advantage = reward - p @ reward
    exact, elbo = (torch.autograd.grad((p * advantage * s).sum(), policy.table, retain_graph=True)[0] for s in law)
    true = torch.autograd.grad(law.log_likelihood.exp() @ reward, policy.table, retain_graph=True)[0]
    assert torch.allclose(exact, true, atol=1e-14)  # the score-function gradient is that of the mean reward
    row = {row["reward"]: row for row in measure(policy, seed=2, samples=4, gain=1e-4)}["one in ten"]
    cos = float((exact * elbo).sum() / exact.norm() / elbo.norm())
    assert row["cosine"] == pytest.approx(cos, abs=1e-6)
    assert row["improvement"] == pytest.approx(cos, abs=2e-3)  # of a small step


def test_noise_is_that_of_sampled_gradients():
    """Two parts that add up, and masks that are half of it again with two draws, against brute force."""
    policy, samples = KINDS["table"](3, 0.5), 300
    law = law_of(policy)
    p, reward = law.log_likelihood.detach().exp(), rewards_of(3, law)["share"]
    row = {r["reward"]: r for r in measure(policy, 3, samples, 1e-3)}["share"]
    words, generator = enumerate_completions(SYMBOLS, LENGTH), torch.Generator().manual_seed(9)
    drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
    for draws in (1, 2):
        gradients = []
        masks = ELBO(draws=draws).draw(torch.arange(samples) + 10_000, LENGTH)
        for i, index in enumerate(drawn.tolist()):
            terms = ELBO(draws=draws).terms(policy, bound.PROMPT, words[index][None], masks.of(slice(i, i + 1)))
            advantage = reward[index] - p @ reward
            gradients.append(advantage * torch.autograd.grad(terms.sum() / draws, policy.table)[0].flatten())
        stacked = torch.stack(gradients)
        exact = torch.autograd.grad((p * (reward - p @ reward) * law.elbo).sum(), policy.table, retain_graph=True)[0]
        noise = float(stacked.square().sum(1).mean() / exact.square().sum()) - 1
        assert row["completion_noise"] + row["mask_noise"] / draws == pytest.approx(noise, rel=0.35)


def test_kept_by_hand():
    row = {"cosine": 0.8, "completion_noise": 30.0, "mask_noise": 60.0}
    assert kept(row, forwards=64) == pytest.approx(0.8 / (1 + 90 / 32) ** 0.5)
    assert kept(row, forwards=64, draws=2) == pytest.approx(0.8 / (1 + 60 / 16) ** 0.5)
    assert kept(row, forwards=64, tight=True) == pytest.approx(1 / (1 + 90 / 32) ** 0.5)


def test_study():
    rows = bound.bound(0, levels={"table": [0.5], "random network": [1.0]}, samples=2, gain=0.01)["rows"]
    assert [(row["kind"], row["level"]) for row in rows[::3]] == [("table", 0.5), ("random network", 1.0)]
    assert len(rows) == 6
