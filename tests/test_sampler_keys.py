"""Decoding: what a completion depends on, and how steps and blocks fill it."""

import itertools
import math
import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import name_of
from decoding_cases import (
    PROMPT,
    Constant,
    Recorder,
    assert_law,
    keys_of,
    policy_fixture,  # noqa: F401
    rng,
    some_prompts,
)

from espo_lightning import (
    Decoding,
    Prompts,
    dream_schedule,
    entropy_order,
    generate,
    low_confidence,
    margin_order,
    origin_schedule,
    random_order,
)
from espo_lightning.lab.tabular import TabularPolicy

# ---- keys -----------------------------------------------------------------------------------------------------------


SETTINGS = [
    Decoding(16, 16, 16),
    Decoding(16, 8, 6, 0.5),
    Decoding(16, 4, 8, 2.0, random_order),
    Decoding(16, 16, 4, 0.0),
    Decoding(16, 16, 8, 0.7, entropy_order, 0.9, 0.1, dream_schedule),
    Decoding(16, 8, 8, 1.0, margin_order, 0.8),
    Decoding(16, 8, 8, 1.0, random_order, schedule=origin_schedule),
    Decoding(16, 8, 16, 0.7, threshold=0.5),
    Decoding(16, 4, 8, prefix_cache=True),
    Decoding(16, 4, 16, 0.7, threshold=0.5, early_stop=True, prefix_cache=True),
]


@pytest.mark.parametrize("decoding", SETTINGS, ids=name_of)
def test_completion_depends_on_its_key_and_prompt_alone(policy, decoding):
    prompts, keys = some_prompts(6), keys_of(2, 6)
    whole = generate(policy, prompts, keys, decoding)
    assert torch.equal(generate(policy, prompts, keys, decoding), whole)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(generate(policy, prompts.of(order), keys[order], decoding), whole[order])
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(generate(policy, prompts.of(one), keys[one], decoding), whole[one])
    # wider padding, and a batch-mate that is longer
    longer = torch.randint(7, 60, (1, 9), generator=rng(9))
    ids = torch.cat([torch.cat([torch.zeros(6, 4, dtype=torch.int64), prompts.ids], 1), longer])
    mask = torch.arange(9).expand(7, -1) >= torch.tensor([[4]] * 6 + [[0]])
    padded = generate(policy, Prompts(ids, mask), torch.cat([keys, torch.tensor([77])]), decoding)
    assert torch.equal(padded[:6], whole)
    noise = ids.clone()
    noise[:6, :4] = 33  # what stands under the padding does not matter
    assert torch.equal(generate(policy, Prompts(noise, mask), torch.cat([keys, torch.tensor([77])]), decoding), padded)


@pytest.mark.parametrize("decoding", SETTINGS[:3], ids=name_of)
def test_another_key_gives_another_completion(policy, decoding):
    prompts = some_prompts(1).repeat_each(64)
    completions = generate(policy, prompts, keys_of(3, 64), decoding)
    assert len({tuple(row) for row in completions.tolist()}) == 64
    assert generate(policy, prompts, keys_of(3, 64)[:1].expand(64), decoding).unique(dim=0).shape[0] == 1


def test_greedy_decoding_needs_no_key_and_temperature_zero_is_the_limit(policy):
    prompts = some_prompts(8)
    greedy = Decoding(16, 8, 8).greedy
    one, other = (generate(policy, prompts, keys_of(seed, 8), greedy) for seed in (4, 5))
    assert torch.equal(one, other)
    assert torch.equal(generate(policy, prompts, keys_of(6, 8), Decoding(16, 8, 8, 1e-4)), one)


def test_positions_and_steps_have_randomness_of_their_own():
    """Independent positions: every pair of neighbours has the product law, also across steps and blocks."""
    logits = [math.log(0.1), math.log(0.2), math.log(0.7), 0.0]
    for decoding in (Decoding(4, 4, 1), Decoding(4, 4, 4, order=random_order), Decoding(4, 1, 4)):
        tokens = generate(Constant(logits, 3), PROMPT.repeat_each(20_000), keys_of(7, 20_000), decoding)
        single = torch.tensor([0.1, 0.2, 0.7])
        for a, b in itertools.combinations(range(4), 2):
            assert_law((tokens[:, a] * 3 + tokens[:, b]).bincount(minlength=9), single.outer(single).flatten())


@pytest.mark.parametrize("decoding", SETTINGS, ids=name_of)
def test_prompts_and_global_generators_are_not_touched(policy, decoding):
    prompts = some_prompts(4)
    prompts = Prompts(prompts.ids, torch.arange(5).expand(4, -1) >= torch.tensor([[0], [2], [1], [0]]))
    keys = keys_of(8, 4)
    before = prompts.ids.clone(), prompts.mask.clone(), keys.clone()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    recorder = Recorder(policy)
    completion = generate(recorder, prompts, keys, decoding)
    assert completion.shape == (4, 16)
    assert not completion.requires_grad
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(torch.equal(a, b) for a, b in zip((prompts.ids, prompts.mask, keys), before))
    seen = {tuple(row) for canvas in recorder.canvases for row in canvas[:, :5].tolist()}
    assert seen == {tuple(row) for row in before[0].tolist()}


# ---- steps and blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decoding",
    [Decoding(16, 16, 16), Decoding(16, 4, 8), Decoding(16, 4, 12, order=random_order), Decoding(12, 2, 6, 0.0)],
    ids=name_of,
)
def test_blocks_are_filled_from_the_left_as_scheduled(policy, decoding):
    recorder, prompts, length = Recorder(policy), some_prompts(5), decoding.length
    final = generate(recorder, prompts, keys_of(9, 5), decoding)
    canvases = [canvas[:, 5:] for canvas in recorder.canvases]
    assert len(canvases) == decoding.steps  # one call of the policy per step
    assert (canvases[0] == policy.mask_id).all()
    step = 0
    for block in range(decoding.blocks):
        start, end = block * decoding.block_length, (block + 1) * decoding.block_length
        for commit, _ in decoding.plan:
            now, then = canvases[step], [*canvases, final][step + 1]
            masked = now == policy.mask_id
            assert not masked[:, :start].any()  # earlier blocks are complete
            assert masked[:, end:].all()  # later ones untouched
            changed = now != then
            assert (changed.sum(1) == commit).all()
            assert (masked | ~changed).all()  # what is committed stays
            assert not changed[:, :start].any()
            assert not changed[:, end:].any()
            chosen = recorder.selections[step][:, 5:]  # the head runs on the masked positions of the block alone
            assert torch.equal(chosen, masked & (torch.arange(length) >= start) & (torch.arange(length) < end))
            assert not recorder.selections[step][:, :5].any()
            step += 1
    assert (final != policy.mask_id).all()


def test_low_confidence_commits_the_most_confident_proposal_at_temperature_one(policy):
    """Greedy, one token a step: the position whose best token has the highest probability."""
    recorder, prompts = Recorder(policy), some_prompts(6)
    final = generate(recorder, prompts, keys_of(10, 6), Decoding(12, 12, 12, 0.0))
    canvases = [*recorder.canvases, torch.cat([prompts.ids, final], 1)]
    for now, then in itertools.pairwise(canvases):
        with torch.no_grad():
            logits = policy(now, None, torch.ones_like(now, dtype=torch.bool), lambda x: x).view(*now.shape, -1)
        logits[..., policy.mask_id] = -math.inf
        confidence, token = logits.softmax(-1).max(-1)
        position = confidence.masked_fill(now != policy.mask_id, -1).argmax(1, keepdim=True)
        expected = now.scatter(1, position, token.gather(1, position))
        assert torch.equal(then, expected)


def law_of_low_confidence(policy: TabularPolicy, temperature: float, block: int) -> torch.Tensor:
    """Exact law of all V^L completions, one token a step: [V^L], position 0 the lowest digit.

    P(commit (i, v)) = p_T(v | i) prod over other hidden j of the block of P(proposal at j has a lower confidence).
    """
    symbols, length, mask = policy.symbols, policy.length, policy.mask_id
    logits = policy.logits().detach()

    @cache
    def law(state: tuple) -> torch.Tensor:
        result = torch.zeros(symbols**length, dtype=torch.float64)
        hidden = [i for i, token in enumerate(state) if token == mask]
        if not hidden:
            result[sum(token * symbols**i for i, token in enumerate(state))] = 1
            return result
        row = logits[sum(token * (symbols + 1) ** i for i, token in enumerate(state))]
        proposal, confidence = (row / temperature).softmax(-1), row.softmax(-1)
        active = [i for i in hidden if i // block == hidden[0] // block]
        for i, v in itertools.product(active, range(symbols)):
            chance = proposal[i, v]
            for j in active:
                if j != i:
                    chance = chance * proposal[j][confidence[j] < confidence[i, v]].sum()
            result += chance * law((*state[:i], v, *state[i + 1 :]))
        return result

    return law((mask,) * length)


@pytest.mark.parametrize(
    ("symbols", "length", "block", "temperature"), [(3, 3, 3, 1.0), (3, 3, 3, 1.7), (2, 4, 4, 0.6), (2, 4, 2, 1.0)]
)
def test_low_confidence_samples_its_exact_step_law(symbols, length, block, temperature):
    policy, n = TabularPolicy(symbols, length, generator=rng(length + block)), 40_000
    law = law_of_low_confidence(policy, temperature, block)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    completions = generate(
        policy, PROMPT.repeat_each(n), keys_of(12, n), Decoding(length, block, length, temperature, low_confidence)
    )
    codes = (completions * symbols ** torch.arange(length)).sum(1)
    counts, rare = codes.bincount(minlength=len(law)), law * n < 15
    if rare.any():  # one cell of them all
        counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
        law = torch.cat([law[~rare], law[rare].sum().view(1)])
    assert_law(counts, law)


def test_low_confidence_is_not_the_random_order():
    """So that the test above could fail: the two laws are far apart on the same tables."""
    policy = TabularPolicy(3, 3, generator=rng(6))
    law = law_of_low_confidence(policy, 1.0, 3)
    sampled = generate(policy, PROMPT.repeat_each(40_000), keys_of(12, 40_000), Decoding(3, 3, 3, order=random_order))
    shares = (sampled * 3 ** torch.arange(3)).sum(1).bincount(minlength=27) / 40_000
    assert (shares - law).abs().sum() / 2 > 0.1
