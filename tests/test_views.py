"""Mask laws that look at what was decoded: marginals, what is never scored, noise on prompts, refusals."""

import math

import pytest
import torch
from conftest import small_policy

from espo_lightning import BlockViews, MeanField, Prompts, RandomViews, Seen, TokenViews, log_probs
from espo_lightning.keys import fold_in

KEYS, LENGTH, PROMPT = 6000, 12, 5


def seen(length: int, update: int = 0, updates: int = 1, keys: int = KEYS) -> Seen:
    """Completions that end after ``length`` tokens, behind prompts whose first token is padding."""
    valid = torch.arange(LENGTH).expand(keys, -1) < length
    real = torch.arange(PROMPT).expand(keys, -1) > 0
    return Seen(valid, real, torch.arange(keys), update, updates)


def draw(law, look: Seen, salt: int = 0):
    return law.masks(fold_in(salt, look.keys), look)


def assert_uniform(values: torch.Tensor, outcomes: int) -> None:
    """Chi-square, at 5 standard deviations of its own distribution."""
    counts = torch.bincount(values, minlength=outcomes).double()
    assert len(counts) == outcomes
    expected = len(values) / outcomes
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < outcomes - 1 + 5 * math.sqrt(2 * max(1, outcomes - 1)), counts


def assert_rate(hits: torch.Tensor, chance: float) -> None:
    n = hits.numel()
    assert abs(float(hits.double().mean()) - chance) < 5 * math.sqrt(max(chance * (1 - chance), 1e-9) / n)


LAWS = [MeanField(prompt_noise=0.15, to_end=True), TokenViews(), RandomViews(3), BlockViews(2, 4)]


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("length", [1, 6, 12])
def test_nothing_is_scored_after_the_end_and_something_is_before(law, length):
    look = seen(length)
    masks = draw(law, look)
    scored = masks.scored.any(0)  # [M, B, L]
    assert not (scored & ~look.valid).any()
    assert scored.any(-1).all()
    assert (masks.weight >= 0).all()


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_masks_depend_on_their_own_key_only(law):
    look = seen(9, keys=40)
    whole = draw(law, look)
    rows = torch.tensor([3, 17, 31])
    part = law.masks(fold_in(0, look.keys)[rows], look.of_rows(rows))
    for a, b in zip(whole.of(rows), part):
        assert a is b is None or (a == b if isinstance(a, bool) else torch.equal(a, b))
    if law.random:
        other = draw(law, look, salt=1)
        assert not all(torch.equal(a, b) for a, b in zip(whole, other) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("law", [MeanField(prompt_noise=0.15), BlockViews(2, 4, noise=0.15)], ids=repr)
def test_noise_hides_real_tokens_of_the_prompt_with_its_chance(law):
    masks = draw(law, seen(9))
    assert not masks.prompt[..., 0].any()  # padding
    assert_rate(masks.prompt[..., 1:], 0.15)
    assert draw(type(law)(**{**vars(law), next(n for n in vars(law) if "noise" in n): 0.0}), seen(9)).prompt is None


@pytest.mark.parametrize("law", [MeanField(prompt_noise=0.5), BlockViews(2, 4, noise=0.5)], ids=repr)
def test_noise_on_a_prompt_does_not_depend_on_the_padding_of_its_batch(law):
    look = seen(9, keys=50)
    wider = look._replace(prompt=torch.cat([torch.zeros(50, 3, dtype=torch.bool), look.prompt], 1))
    narrow, wide = draw(law, look), draw(law, wider)
    assert torch.equal(narrow.prompt, wide.prompt[..., 3:])
    assert torch.equal(narrow.hidden, wide.hidden)


def test_a_mean_field_without_noise_is_what_it_was():
    masks = MeanField().masks(torch.arange(3), seen(4, keys=3))
    assert masks.hidden.all()
    assert (masks.weight == 1).all()
    assert masks.prompt is None
    assert not MeanField().random
    assert MeanField(prompt_noise=0.1).random


def test_token_views_show_every_token_three_ways():
    masks = draw(TokenViews(0.2, 0.8), seen(9))
    first, second = masks.hidden
    assert first.all()
    assert masks.coupled
    assert (masks.weight[0, :, :9] == 1).all()
    hidden, weight = second[:, :9], masks.weight[1, :, :9]
    r = torch.where(hidden, 1 / weight, 1 - 1 / weight)
    torch.testing.assert_close(r, r[:, :1].expand_as(r), rtol=1e-5, atol=1e-6)  # one r a completion
    assert_uniform(((r[:, 0] - 0.2) / 0.6 * 10).long().clamp(0, 9), 10)
    chance = r[:, 0].double().mean()
    assert_rate(second, float(chance))  # on the whole canvas, also after the end
    assert masks.scored.sum() == 2 * 9 * KEYS  # 3 forwards, each token read once per draw


def test_random_views_hide_each_token_with_a_chance_of_its_own():
    masks = draw(RandomViews(2, 0.1, 0.9), seen(12))
    share = masks.hidden.double().mean(-1)
    assert abs(float(share.mean()) - 0.5) < 0.01
    # Var k/L = Var t + E t(1-t)/L for t ~ U(.1, .9)
    variance = 0.8**2 / 12 + (0.5 - (0.8**2 / 12 + 0.25)) / 12
    assert abs(float(share.var()) - variance) < 0.1 * variance
    assert (masks.weight[masks.hidden] == 1).all()
    short = draw(RandomViews(2), seen(4))
    assert short.hidden[..., 4:].all()
    assert short.hidden[..., :4].any(-1).all()


def test_a_rising_chance_starts_once_a_rollout_and_ends_at_one():
    law = RandomViews(1, 0.1, 0.9, rising=True)
    shares = [draw(law, seen(12, u, 4), salt=u).hidden.double().mean(-1).squeeze(0) for u in range(4)]
    means = torch.stack(shares).mean(1)
    expected = torch.tensor([0.5 + 0.5 * u / 3 for u in range(4)], dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=0, atol=0.02)
    assert (shares[-1] == 1).all()
    correlation = torch.corrcoef(torch.stack(shares[:2]))[0, 1]
    assert correlation > 0.5  # the same start in both updates
    with pytest.raises(ValueError, match="rising needs updates >= 2"):
        law.check(small_policy(), LENGTH, updates=1)


@pytest.mark.parametrize(("length", "blocks"), [(3, 1), (4, 1), (5, 2), (12, 3)])
def test_block_views_choose_block_and_count_uniformly(length, blocks):
    look = seen(length)
    masks = draw(BlockViews(2, 4, noise=0.0), look)
    for hidden in masks.hidden:
        first = hidden.int().argmax(-1)  # nothing before the block is hidden
        chosen = first // 4
        assert_uniform(chosen, blocks)
        for block in range(blocks):
            rows = chosen == block
            inside = hidden[rows][:, 4 * block : min(4 * block + 4, length)]
            assert_uniform(inside.sum(-1) - 1, inside.shape[1])
            assert hidden[rows][:, 4 * block + 4 :].all()
        assert hidden[:, length:].all()
    same = (masks.hidden[0].int().argmax(-1) // 4 == masks.hidden[1].int().argmax(-1) // 4).double()
    assert_rate(same, 1 / blocks)  # draws are independent


def test_the_weights_of_block_views_make_the_score_nats_per_sequence():
    masks = draw(BlockViews(2, 4), seen(9))
    torch.testing.assert_close(masks.weight.sum(-1), torch.full((2, KEYS), 9.0))
    noisy = draw(BlockViews(1, 4, noise=0.3), seen(12)).hidden[0]
    plain = draw(BlockViews(1, 4, noise=0.0), seen(12)).hidden[0]
    last = plain.int().argmax(-1) >= 8
    assert_rate(noisy[last][:, :8], 0.3)


def test_noise_on_the_prompt_changes_the_scores_and_is_the_same_for_all_policies():
    policy = small_policy()
    prompts = Prompts(torch.randint(7, 30, (4, PROMPT), generator=torch.Generator().manual_seed(0)), None)
    completion = torch.randint(7, 30, (4, 6), generator=torch.Generator().manual_seed(1))
    look = Seen.of(policy, prompts, completion, torch.arange(4))
    masks = MeanField(prompt_noise=0.5).masks(look.keys, look)
    noisy = log_probs(policy, prompts, completion, masks)
    by_hand = Prompts(prompts.ids.masked_fill(masks.prompt[0], policy.mask_id), None)
    torch.testing.assert_close(noisy, log_probs(policy, by_hand, completion, masks._replace(prompt=None)))
    assert not torch.equal(noisy, log_probs(policy, prompts, completion, masks._replace(prompt=None)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanField(prompt_noise=1.0), "prompt_noise must be a chance"),
        (lambda: MeanField(prompt_noise=math.nan), "prompt_noise must be a chance"),
        (lambda: TokenViews(0.0, 0.8), "low and high must be chances"),
        (lambda: TokenViews(0.8, 0.2), "low and high must be chances"),
        (lambda: RandomViews(0), "draws must be at least 1"),
        (lambda: RandomViews(1, 0.1, 1.0), "low and high must be chances"),
        (lambda: BlockViews(0, 4), "draws must be at least 1"),
        (lambda: BlockViews(1, 0), "block must be at least 1"),
        (lambda: BlockViews(1, 4, noise=-0.1), "noise must be a chance"),
        (lambda: BlockViews(1, 5).check(small_policy(), 12), "block 5 does not divide the canvas"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
