"""Likelihoods of blocks against enumeration: unbiased, summing to one, the law of the decoder."""

import itertools
import math

import pytest
import torch
from block_cases import LENGTH, block_policy, drawn, keys_of, some_completions, some_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning import (
    ELBO,
    BlockDecoding,
    BlockELBO,
    Layout,
    Policy,
    Prompts,
    Seen,
    random_order,
)
from espo_lightning.lab.exact import enumerate_completions, exact_policy_gradient
from espo_lightning.lab.exact_blocks import (
    block_completion_law,
    block_elbo,
    block_gap,
    block_log_likelihood,
    block_score_moments,
    block_sizes,
    block_tables,
)

SYMBOLS, MASK_ID = 3, 3


class NoMask(Policy):
    """A policy whose law over tokens leaves out the mask, as decoders do."""

    def forward(self, ids, attention, select, reduce, *columns, **more):
        def among_symbols(logits, *columns):
            return reduce(logits.index_fill(-1, torch.tensor(MASK_ID), float("-inf")), *columns)

        return super().forward(ids, attention, select, among_symbols, *columns, **more)


def tiny(block: int, origin: str, seed: int = 0, scale: float = 1.0) -> NoMask:
    config = LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=64, is_causal=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1]) * 2)
    return NoMask(model.double(), None, mask_id=MASK_ID, layout=Layout(block, origin)).eval()


PROMPT = Prompts(torch.tensor([[0, 2, 1]]), None)  # with origin global and blocks of 2, its tail shares a block
CASES = pytest.mark.parametrize(("block", "origin"), [(1, "global"), (2, "global"), (2, "response"), (4, "response")])


def outcomes(sizes: list[int]) -> list[tuple[float, list[bool]]]:
    """Every (chance, hidden positions) of a count form with counts 0..n in each block."""
    single = [
        [
            (1 / (n + 1) / math.comb(n, k), [i in subset for i in range(n)])
            for k in range(n + 1)
            for subset in itertools.combinations(range(n), k)
        ]
        for n in sizes
    ]
    return [
        (math.prod(chance for chance, _ in each), list(itertools.chain(*(hidden for _, hidden in each))))
        for each in itertools.product(*single)
    ]


@CASES
@pytest.mark.parametrize("coupled", [True, False])
def test_unbiased_with_its_gradient_against_enumeration(block, origin, coupled):
    """The mean over all masks that the law can draw, each by its chance, is the ELBO by enumeration of orders."""
    policy, completion, law = tiny(block, origin), torch.tensor([[2, 0, 1, 1]]), BlockELBO(1, coupled, block=block)
    sizes = block_sizes(policy, PROMPT, 4)
    assert sizes == policy.layout.blocks(PROMPT, 4)[0].bincount().tolist()
    keys = keys_of(3000)
    seen = Seen(torch.ones(3000, 4, dtype=torch.bool), torch.ones(3000, 3), keys)
    seen = seen._replace(blocks=policy.layout.blocks(PROMPT, 4).expand(3000, -1))
    masks = law.masks(keys, seen)
    possible = outcomes(sizes)
    rows = []
    for chance, hidden in possible:
        found = (masks.hidden[0] == torch.tensor(hidden)).all(-1).nonzero().flatten()
        assert abs(len(found) / 3000 - chance) < 5 * math.sqrt(chance / 3000)
        rows.append(int(found[0]))
    masks, chances = masks.of(torch.tensor(rows)), torch.tensor([chance for chance, _ in possible])
    n = len(rows)
    many = Prompts(PROMPT.ids.expand(n, -1), None)
    scores = law.terms(policy, many, completion.expand(n, -1), masks).sum(-1)[0].double()
    mean = (chances * scores).sum()
    exact = block_elbo(block_tables(policy, PROMPT, completion[0]))
    assert mean.item() == pytest.approx(exact.item(), abs=1e-5)
    weights = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(mean, weights), torch.autograd.grad(exact, weights)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    variance = (chances * scores.square()).sum() - mean.square()
    moments = block_score_moments(block_tables(policy, PROMPT, completion[0]), coupled=coupled)
    assert moments.mean.item() == pytest.approx(exact.item(), abs=1e-9)
    assert moments.variance.item() == pytest.approx(variance.item(), abs=1e-4)


@CASES
def test_the_law_by_enumeration_sums_to_one_and_its_parts_agree(block, origin):
    policy = tiny(block, origin)
    law = block_completion_law(policy, PROMPT, SYMBOLS, 4)
    assert law.log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)
    completions = enumerate_completions(SYMBOLS, 4)
    for index in (0, 17, 42, 80):
        tables = block_tables(policy, PROMPT, completions[index])
        assert law.log_likelihood[index].item() == pytest.approx(block_log_likelihood(tables).item(), abs=1e-5)
        assert law.elbo[index].item() == pytest.approx(block_elbo(tables).item(), abs=1e-5)
        gap = law.log_likelihood[index] - law.elbo[index]
        assert block_gap(tables).item() == pytest.approx(gap.item(), abs=1e-5)
        assert gap >= -1e-6
    if block == 1:
        torch.testing.assert_close(law.elbo, law.log_likelihood, rtol=0, atol=1e-9)
    else:
        assert (law.log_likelihood - law.elbo).max() > 1e-3


@CASES
def test_random_order_decoding_draws_from_that_law(block, origin):
    policy, n = tiny(block, origin), 4000
    decoding = BlockDecoding(4, block, 4, order=random_order)
    many = Prompts(PROMPT.ids.expand(n, -1), None)
    completion = decoding.generate(policy, many, keys_of(n, seed=11))
    index = (completion * SYMBOLS ** torch.arange(4)).sum(-1)
    observed = index.bincount(minlength=SYMBOLS**4).double()
    expected = n * block_completion_law(policy, PROMPT, SYMBOLS, 4).log_likelihood.exp().detach()
    common = expected > 5
    parts = torch.stack([torch.cat([x[common], x[~common].sum().view(1)]) for x in (observed, expected)])
    statistic = ((parts[0] - parts[1]).square() / parts[1].clamp(min=1e-9)).sum().item()
    freedom = int(common.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_its_exact_gradient_is_that_of_the_expected_reward():
    policy, rewards = tiny(2, "global"), torch.rand(81, generator=torch.Generator().manual_seed(0)).double()
    law = block_completion_law(policy, PROMPT, SYMBOLS, 4)
    ours = exact_policy_gradient(policy, law.log_likelihood, law.log_likelihood, rewards)
    grads = torch.autograd.grad((law.log_likelihood.exp() * rewards).sum(), list(policy.parameters()))
    torch.testing.assert_close(ours, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("origin", ["global", "response"])
def test_blocks_of_one_token_are_the_exact_likelihood_whatever_the_key(origin):
    policy, prompts, completion = block_policy(1, origin), some_prompts(), some_completions()
    law = BlockELBO(1, block=1)
    scores = [
        law.terms(policy, prompts, completion, drawn(policy, law, prompts, completion, keys_of(4, seed))).sum(-1)
        for seed in range(3)
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-5)
    for row in range(4):
        one = Prompts(prompts.ids[row : row + 1], prompts.mask[row : row + 1])
        total, canvas = 0.0, torch.full((1, LENGTH), policy.mask_id)
        for i in range(LENGTH):  # the chain rule, a forward for every token
            select = torch.zeros(1, prompts.ids.shape[1] + LENGTH, dtype=torch.bool)
            select[0, prompts.ids.shape[1] + i] = True
            ids = torch.cat([one.ids, canvas], 1)
            total += policy(ids, one.seen_by(policy, LENGTH), select, lambda x: x.log_softmax(-1))[
                0, completion[row, i]
            ]
            canvas[0, i] = completion[row, i]
        assert scores[0][0, row].item() == pytest.approx(total.item(), abs=1e-4)


@pytest.mark.parametrize("settings", [(2, True, False, 0), (2, False, True, 1)])
def test_a_canvas_of_one_block_is_scored_as_by_the_elbo(settings):
    policy, prompts, completion, keys = block_policy(8, "response"), some_prompts(), some_completions(), keys_of(4)
    ours, elbo = BlockELBO(*settings, block=8), ELBO(*settings)
    elbo.check(policy, LENGTH)
    a = ours.terms(policy, prompts, completion, drawn(policy, ours, prompts, completion))
    b = elbo.terms(policy, prompts, completion, elbo.draw(keys, LENGTH))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_block_of_prompt_and_canvas_is_full_attention():
    policy, prompts, completion = block_policy(64, "global"), some_prompts(), some_completions()
    full = Policy(policy.model, policy.tokenizer, mask_id=policy.mask_id)
    law = BlockELBO(2, block=64)
    masks = drawn(policy, law, prompts, completion)
    torch.testing.assert_close(
        law.terms(policy, prompts, completion, masks),
        ELBO(2).terms(full, prompts, completion, masks),
        rtol=1e-6,
        atol=1e-6,
    )
