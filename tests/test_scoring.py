"""Scores of a network: attention, chunks of the head, gradients view by view, the last layer."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from likelihood_cases import PROMPT, keys_of, rng, tabular
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning.objectives.policy_gradient import espo_loss
from espo_lightning.objectives.ratios import sequence_ratio, token_ratio
from espo_lightning.policies import prefix as prefix_module
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.prefix import apply_head
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score, token_log_probs

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
