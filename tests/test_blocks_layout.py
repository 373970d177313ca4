"""Layouts: who attends to whom, and a forward pass that follows them."""

import pytest
import torch
import torch.nn.functional as F
from block_cases import EACH, LENGTHS, alone, block_policy, some_prompts

from espo_lightning import (
    Layout,
    new_policy,
)
from espo_lightning.policies.layout import CAUSAL, FULL


def sees_by_hand(layout: Layout, prompt: int, length: int) -> torch.Tensor:
    """The definition, position by position, of one prompt without padding."""

    def block_of(i: int) -> int:
        if layout.block is None:
            return i if layout.causal else 0
        if layout.origin == "global":
            return i // layout.block
        return 0 if i < prompt else 1 + (i - prompt) // layout.block

    places = range(prompt + length)
    return torch.tensor([[block_of(j) <= block_of(i) for j in places] for i in places])


@EACH
@pytest.mark.parametrize("block", [1, 3, 4, 16, 64])
def test_who_sees_whom(block, origin):
    layout, prompts = Layout(block, origin), some_prompts()
    sees = layout.attention(prompts, 12)
    for row, length in enumerate(LENGTHS):
        real = torch.cat([prompts.mask[row], torch.ones(12, dtype=torch.bool)])
        assert torch.equal(sees[row][real][:, real], sees_by_hand(layout, length, 12))
        assert not sees[row][:, ~real].any()
        assert torch.equal(layout.attention(alone(prompts, row), 12)[0], sees_by_hand(layout, length, 12))


def test_full_and_causal_layouts_are_told_by_keys_alone():
    prompts = some_prompts()
    for layout in (FULL, CAUSAL):
        assert torch.equal(layout.attention(prompts, 3), prompts.attention(3))
        assert layout.attention(prompts._replace(mask=None), 3) is None
        assert not layout.splits(100)
    assert (str(FULL), str(CAUSAL)) == ("full attention", "causal attention")
    assert new_policy(causal=True).layout == CAUSAL
    assert new_policy().layout == FULL


@EACH
@pytest.mark.parametrize("block", [1, 3, 4, 16, 64])
def test_slots_hold_every_token_once_in_its_block(block, origin):
    layout, prompts, length = Layout(block, origin), some_prompts(), 12
    slots = layout.slots(prompts, length)
    width = prompts.ids.shape[1]
    canvas = torch.cat([prompts.ids, 1000 + torch.arange(length).expand(len(LENGTHS), -1)], 1)
    shown = slots.show(canvas, empty=-1)
    assert torch.equal(shown.gather(1, slots.where), canvas[:, width:])
    sees, groups = layout.attention(prompts, length), layout.groups(prompts, length)
    for row in range(len(LENGTHS)):
        real = slots.keys[row]
        tokens = shown[row][real]
        expected = canvas[row, prompts.attention(length)[row]]
        assert torch.equal(tokens, expected)  # each once, in order
        columns = slots.columns[row][real]
        assert torch.equal(groups[row, columns], slots.groups[row][real])
        everything = slice(0, None)
        mine = slots.sees(everything, everything)[row][real][:, real]
        assert torch.equal(mine, sees[row][columns][:, columns])
    starts = slots.groups[:, width:].view(len(LENGTHS), slots.count, block)
    assert (starts == starts[..., :1]).all()  # a block is a block in every row


@EACH
def test_a_forward_pass_follows_the_layout(origin):
    """A token moves the predictions of its own block and later ones, and no others."""
    policy, prompts = block_policy(4, origin), some_prompts()
    width = prompts.ids.shape[1]
    canvas = torch.randint(7, 60, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([prompts.ids, canvas], 1)
    sees = prompts.seen_by(policy, 12)

    def logits(ids):
        return policy(ids, sees, torch.ones_like(ids, dtype=torch.bool), lambda x: x).view(*ids.shape, -1)

    before = logits(ids)
    for column in range(width, width + 12):
        changed = ids.clone()
        changed[:, column] = (changed[:, column] - 6) % 50 + 7
        moved = (logits(changed) - before).abs().amax(-1) > 1e-6
        real = prompts.attention(12)
        assert torch.equal(moved & real, sees[:, :, column] & real)


@EACH
def test_padding_and_batch_mates_change_nothing(origin):
    policy, prompts = block_policy(4, origin), some_prompts()
    canvas = torch.randint(7, 60, (len(LENGTHS), 8), generator=torch.Generator().manual_seed(0))

    def logits(prompts, canvas):
        ids = torch.cat([prompts.ids, canvas], 1)
        select = F.pad(torch.ones_like(canvas, dtype=torch.bool), (prompts.ids.shape[1], 0))
        return policy(ids, prompts.seen_by(policy, 8), select, lambda x: x).view(*canvas.shape, -1)

    together = logits(prompts, canvas)
    wider = logits(some_prompts(width=20), canvas)
    torch.testing.assert_close(wider, together, rtol=0, atol=1e-4)  # logits of about 10 in float32
    for row in range(len(LENGTHS)):
        single = logits(alone(prompts, row), canvas[row : row + 1])[0]
        torch.testing.assert_close(single, together[row], rtol=0, atol=1e-4)


def test_a_block_policy_must_be_told_who_attends_to_whom():
    policy, ids = block_policy(), torch.full((1, 8), 9)
    for attention in (None, torch.ones_like(ids, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"block-causal attention \(block 4, origin global\): pass attention="):
            policy(ids, attention, torch.ones_like(ids, dtype=torch.bool), lambda x: x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(0), "block must be a whole number of tokens from 1 up"),
        (lambda: Layout(-4), "block must be a whole number"),
        (lambda: Layout(2.5), "block must be a whole number"),
        (lambda: Layout(True), "block must be a whole number"),
        (lambda: Layout(4, "prompt"), "block origin must be global or response, got 'prompt'"),
        (lambda: Layout(4, causal=True), "a causal policy has no blocks"),
        (lambda: new_policy(causal=True, block=4), "a causal policy has no blocks"),
    ],
)
def test_nonsense_layouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_exclude_a_shift_and_kernels_that_cannot_be_told():
    policy = block_policy()
    kind = type(policy)
    with pytest.raises(ValueError, match="needs logits_shift 0"):
        kind(policy.model, policy.tokenizer, mask_id=2, shift=1, layout=Layout(4))
    policy.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs attention sdpa or eager, got flash_attention_2"):
        kind(policy.model, policy.tokenizer, mask_id=2, layout=Layout(4))
