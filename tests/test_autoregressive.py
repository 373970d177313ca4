"""Causal policies: their exact likelihood, and its gradients against enumeration."""

import pytest
import torch
from causal_cases import EOS, FAMILIES, PAD, Counting, causal, prompts_of, terms_of, texts, unpadded

from espo_lightning import (
    Prompts,
    espo_loss,
    k1,
    k2,
    k3,
    sequence_ratio,
    token_ratio,
)
from espo_lightning.lab.exact import exact_kl, exact_policy_gradient
from espo_lightning.policies.reference import make_reference

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


def some_completions(rows: int = 7, length: int = 6) -> torch.Tensor:
    """Ends at the first, at a middle and at the last position, and none at all; junk after the end."""
    completion = torch.randint(2, 9, (rows, length), generator=torch.Generator().manual_seed(5))
    completion[0, 0] = completion[1, 2] = completion[2, -1] = completion[3, 3] = completion[3, 5] = EOS
    return completion


# ---- the likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_the_log_probs_of_transformers_up_to_the_end(family, attention):
    """Every row against transformers' own forward of it alone, without padding."""
    policy, prompts, completion = causal(family, attention=attention), prompts_of(7), some_completions()
    terms = terms_of(policy, prompts, completion)
    for row, ends in enumerate([0, 2, 5, 3, 5, 5, 5]):
        alone = torch.cat([unpadded(prompts, row).ids, completion[row : row + 1]], 1)
        logits = causal(family, attention=attention).model(alone).logits[0, -7:-1]
        expected = logits.log_softmax(-1).gather(1, completion[row].unsqueeze(1)).squeeze(1)
        expected[ends + 1 :] = 0
        torch.testing.assert_close(terms[row], expected, rtol=1e-5, atol=1e-5)
        assert (terms[row] != 0).sum() == ends + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_their_gradients_ignore_what_stands_under_the_padding_and_after_the_end(family):
    policy, prompts, completion = causal(family), prompts_of(7), some_completions()
    results = []
    for pad, junk in ((PAD, EOS), (7, 3)):
        ids = prompts.ids.masked_fill(~prompts.mask, pad)
        after = torch.arange(6) > policy.lengths(completion).unsqueeze(1)
        policy.zero_grad()
        terms = terms_of(policy, Prompts(ids, prompts.mask), completion.masked_fill(after, junk))
        terms.sum().backward()
        results.append((terms.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    assert results[0][1].isfinite().all()
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_of_all_completions_add_up_to_one(family):
    policy = causal(family, vocabulary=4)
    completions = texts(policy, 4, 4)
    assert len(completions) == 3**4 + 3**3 + 3**2 + 3 + 1
    log_likelihood = terms_of(policy, prompts_of(1, vocabulary=4).repeat_each(len(completions)), completions).sum(1)
    assert log_likelihood.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_every_end_of_text_token_ends_a_completion():
    policy = causal(eos_token_id=[4, EOS])
    terms = terms_of(policy, prompts_of(1), torch.tensor([[2, 4, 3, EOS]]))
    assert (terms != 0).tolist() == [[True, True, False, False]]


def test_one_forward_without_the_last_token_and_the_head_where_a_token_is_scored():
    policy = Counting(causal())
    terms_of(policy, prompts_of(7), some_completions())
    assert policy.calls == [((7, 5 + 6 - 1), 1 + 3 + 6 + 4 + 6 + 6 + 6)]


def test_references_score_like_their_policy():
    policy = causal()
    with torch.no_grad():
        expected = terms_of(policy, prompts_of(7), some_completions())
        assert torch.equal(terms_of(make_reference(policy), prompts_of(7), some_completions()), expected)


# ---- gradients against enumeration -----------------------------------------------------------------------------------


V, L = 3, 3


@pytest.fixture(scope="module")
def law():
    """A policy, all its completions on a canvas, their terms [1, N, L], and log-likelihoods [N] with their graph."""
    policy = causal(vocabulary=V, seed=3)
    completions = texts(policy, V, L)
    terms = terms_of(policy, prompts_of(1, vocabulary=V).repeat_each(len(completions)), completions).unsqueeze(0)
    return policy, completions, terms, terms.sum((0, 2))


def gradient(policy, scalar: torch.Tensor) -> torch.Tensor:
    parameters = list(policy.parameters())
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def assert_same_direction_and_length(one: torch.Tensor, other: torch.Tensor) -> None:
    assert other.norm() > 1e-2
    assert (one - other).norm() < 1e-4 * other.norm()  # float32


@pytest.mark.parametrize("clip_range", [0.2, 4e-4, 0.0])
@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_grpo_and_gspo_have_the_exact_policy_gradient_on_policy(law, ratio, clip_range):
    """Its mean over all completions is grad E[R] / L, whatever the level of the ratio and the clip range."""
    policy, completions, terms, log_likelihood = law
    rewards = torch.randn(len(completions), generator=torch.Generator().manual_seed(1))
    probability = log_likelihood.detach().exp()
    weighted = probability * (rewards - (probability * rewards).sum()) * len(completions)  # the loss means over rows
    loss, _ = espo_loss(terms, terms.detach(), None, weighted, clip_range=clip_range, beta=0.0, ratio=ratio)
    mean_reward = (log_likelihood.exp() * rewards).sum()
    assert_same_direction_and_length(-L * gradient(policy, loss), gradient(policy, mean_reward))
    exact = exact_policy_gradient(policy, log_likelihood, log_likelihood, rewards, centred=False)
    assert_same_direction_and_length(exact, gradient(policy, mean_reward))


def test_expected_gradients_of_the_kl_estimators(law):
    """k2 has that of KL(policy || reference), k3 that of KL(reference || policy), k1 none (Tang & Munos 2025)."""
    policy, completions, terms, log_likelihood = law
    with torch.no_grad():
        ref = terms_of(
            causal(vocabulary=V, seed=4), prompts_of(1, vocabulary=V).repeat_each(len(completions)), completions
        )
    probability, delta = log_likelihood.detach().exp(), (terms - ref).sum(-1)
    expected = {kl: gradient(policy, (probability * kl(delta)).sum()) for kl in (k1, k2, k3)}
    ref = ref.sum(1)
    assert_same_direction_and_length(expected[k2], gradient(policy, exact_kl(log_likelihood, ref)))
    assert_same_direction_and_length(expected[k3], gradient(policy, exact_kl(ref, log_likelihood)))
    assert expected[k1].norm() < 1e-4 * expected[k2].norm()
