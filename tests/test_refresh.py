"""Keys and values that are computed anew every so many steps, and those of what follows a block: what they are."""

import itertools
from dataclasses import replace

import pytest
import torch
from cache_cases import BASE, CACHED
from decoder_cases import policy_fixture  # noqa: F401
from decoding_cases import keys_of, some_prompts

from espo_lightning import BlockDecoding, Decoding, Policy, Prompts, generate

EACH = pytest.mark.parametrize("decoding", CACHED.values(), ids=CACHED)


def padded(rows: int, width: int = 6) -> Prompts:
    prompts = some_prompts(rows, width)
    return Prompts(prompts.ids, torch.arange(width) >= torch.arange(rows).unsqueeze(1) % 4)


PROMPTS = {"": some_prompts(5), "padded": padded(5), "one token": some_prompts(5, 1)}


class Stale:
    """A second implementation beside the first, without a cache: their logits are compared in every pass.

    The network reads the canvas of the last full pass and, behind it, what is computed anew of the present one. The old
    canvas attends to itself alone; what is new to itself, and to the old canvas where that is not computed anew.
    """

    def __init__(self, policy: Policy):
        self.policy, self.mask_id, self.errors = policy, policy.mask_id, []
        self.eos_ids, self.eos_id = policy.eos_ids, policy.eos_id

    def prefix(self, start: int, stop: int | None = None):
        self.first, self.part = None, slice(start - self.policy.shift, stop)
        self.cache = self.policy.prefix(start, stop=stop)
        return self

    def keep(self, rows: torch.Tensor) -> None:
        self.first = self.first[rows]
        self.cache.keep(rows)

    def __call__(self, ids, attention, select, reduce, *columns, prefix):
        def compared(logits, *columns):
            self.errors.append((logits - self.logits(ids, attention, select)).abs().max().item())
            return reduce(logits, *columns)

        return self.policy(ids, attention, select, compared, *columns, prefix=self.cache)

    def logits(self, ids, attention, select):
        self.first = ids.clone() if self.first is None else self.first
        places = torch.arange(ids.shape[1])
        new = torch.zeros_like(places, dtype=torch.bool)
        new[self.part] = True
        real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
        keys = torch.cat([real, real[:, self.part]], 1)[:, None]  # [N, 1, T + new]
        of_old = torch.cat([torch.ones_like(new), torch.zeros_like(places[new], dtype=torch.bool)])
        of_new = torch.cat([~new, torch.ones_like(places[new], dtype=torch.bool)])
        seen = torch.where(of_old.unsqueeze(1), of_old, of_new) & keys  # [N, queries, keys]
        dtype = self.policy.model.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
        both, positions = torch.cat([self.first, ids[:, self.part]], 1), torch.cat([places, places[self.part]])[None]
        logits = self.policy.model(both, attention_mask=bias, position_ids=positions).logits[:, ids.shape[1] :]
        row, position = select[:, self.part].nonzero(as_tuple=True)
        return logits[row, position - self.policy.shift]


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
