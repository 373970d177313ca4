"""Keys and values that are computed anew every so many steps, and those of what follows a block: what they are."""

import itertools
from dataclasses import replace

import pytest
import torch
from cache_cases import BASE, CACHED, Stale, padded
from decoder_cases import policy_fixture  # noqa: F401
from decoding_cases import keys_of, some_prompts

from espo_lightning import BlockDecoding, Decoding, generate

EACH = pytest.mark.parametrize("decoding", CACHED.values(), ids=CACHED)


PROMPTS = {"": some_prompts(5), "padded": padded(5), "one token": some_prompts(5, 1)}


@EACH
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_caches_are_what_they_say(policy, decoding, prompts):
    """To their rounding; and they are not the full decoding, which goes another way."""
    policy, keys = policy.double(), keys_of(10, 5)
    stale = Stale(policy)
    ours = generate(stale, prompts, keys, decoding)
    assert max(stale.errors) < 1e-5
    full = replace(decoding, prefix_cache=False, refresh=None, dual_cache=False)
    if prompts.ids.shape[1] > 1:
        assert not torch.equal(ours, generate(policy, prompts, keys, full))


@EACH
def test_refreshed_in_every_step_they_are_the_full_decoding_bit_for_bit(policy, decoding):
    policy, keys = policy.double(), keys_of(11, 5)
    full = replace(decoding, prefix_cache=False, refresh=None, dual_cache=False)
    for prompts in PROMPTS.values():
        expected, trace = full.decode(policy, prompts, keys)
        ids, other = replace(decoding, refresh=1).decode(policy, prompts, keys)
        assert torch.equal(ids, expected)
        assert torch.equal(other.steps, trace.steps)
        assert torch.equal(other.entropy, trace.entropy)


def test_what_a_pass_computes(policy):
    """All 17 tokens where keys and values are due; else the prefix is left out, or all but the block."""
    shift, start, block = policy.shift, 5, 4

    def widths(decoding: Decoding) -> list[int]:
        seen = []
        hook = policy.model.model.embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(ids[0].shape[1]))
        generate(policy, some_prompts(3), keys_of(12, 3), decoding)
        hook.remove()
        return seen

    for refresh, dual in itertools.product((None, 1, 2, 3), (False, True)):
        expected = []
        for number, step in itertools.product(range(3), range(4)):
            stop = start + (number + 1) * block if dual else 17
            kept = stop - (start + number * block) + shift
            expected.append(17 if step % (refresh or 4) == 0 else kept)
        assert widths(replace(BASE, refresh=refresh, dual_cache=dual)) == expected


def test_every_setting_has_an_effect(policy):
    settings = ({}, {"refresh": 2}, {"refresh": 3}, {"dual_cache": True}, {"dual_cache": True, "refresh": 2})
    prompts, keys = some_prompts(16), keys_of(15, 16)
    results = [generate(policy, prompts, keys, replace(BASE, **change)) for change in settings]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(results, 2))


@EACH
def test_a_completion_depends_on_its_key_and_prompt_alone(policy, decoding):
    prompts, keys = padded(5), keys_of(2, 5)
    whole = generate(policy, prompts, keys, decoding)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(generate(policy, prompts.of(one), keys[one], decoding), whole[one])


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (Decoding, {"refresh": 2}, "about prefix_cache, which is off"),
        (Decoding, {"dual_cache": True, "block_length": 4}, "about prefix_cache, which is off"),
        (Decoding, {"prefix_cache": True, "refresh": 0}, "refresh must be at least 1, got 0"),
        (Decoding, {"prefix_cache": True, "refresh": 1.5}, "refresh must be a whole number, got 1.5"),
        (Decoding, {"prefix_cache": True, "refresh": 16}, "refresh must be below the steps of a block, 16"),
        (Decoding, {"prefix_cache": True, "block_length": 4, "refresh": 4}, "below the steps of a block, 4"),
        (Decoding, {"prefix_cache": True, "dual_cache": True}, "dual_cache has no effect with one block"),
        (BlockDecoding, {"block_length": 4, "dual_cache": True}, "about prefix_cache, which is off"),
        (BlockDecoding, {"block_length": 4, "refresh": 2}, "about prefix_cache, which is off"),
    ],
)
def test_nonsense_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
