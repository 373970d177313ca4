"""Likelihoods of blocks: masks, and one pass against a forward for each block."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from block_cases import EACH, LENGTH, block_policy, drawn, keys_of, some_completions, some_prompts

from espo_lightning import (
    BlockELBO,
    LoRA,
    Prompts,
)
from espo_lightning.keys import fold_in, randint, random_subset
from espo_lightning.policies.load import _checkpoint_layers
from espo_lightning.policies.lora import add_adapter
from espo_lightning.policies.reference import make_reference
from espo_lightning.scoring.masks import count_masks

LAWS = [BlockELBO(2, block=4), BlockELBO(3, stratified=True, block=4), BlockELBO(2, False, False, 1, block=4)]


# ---- masks ----------------------------------------------------------------------------------------------------------


def one_block_by_hand(keys, length, draws, coupled, stratified, smallest):
    """The law of Eq. 3 as it was written before there were blocks."""
    span = length + 1 - smallest
    draw = torch.arange(draws).unsqueeze(-1)
    if stratified:
        counts = (randint(fold_in(keys, -1), span) + draw * span // draws) % span + smallest
    else:
        counts = randint(fold_in(fold_in(keys, -2), draw), span) + smallest
    hidden = random_subset(fold_in(fold_in(keys, -3), draw), counts, length)
    k = counts.unsqueeze(-1)
    weight = torch.where(hidden, span / k.clamp(min=1), 0.0)
    if coupled:
        weight = 0.5 * torch.where(hidden, weight, span / (length - k).clamp(min=1))
    return hidden, weight.float()


@pytest.mark.parametrize(("coupled", "stratified", "smallest"), [(1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_one_block_has_the_masks_of_the_elbo_bit_for_bit(length, coupled, stratified, smallest):
    law = {"coupled": bool(coupled), "stratified": bool(stratified), "smallest": smallest}
    masks = count_masks(keys_of(50), length, 3, **law)
    hidden, weight = one_block_by_hand(keys_of(50), length, 3, *law.values())
    assert torch.equal(masks.hidden, hidden)
    assert torch.equal(masks.weight, weight)
    blocks = BlockELBO(3, bool(coupled), bool(stratified), smallest, block=length).draw(keys_of(50), length)
    assert torch.equal(blocks.hidden, hidden)
    assert torch.equal(blocks.weight, weight)


@pytest.mark.parametrize("law", LAWS)
def test_counts_are_uniform_and_independent_in_every_block(law):
    """Blocks of 2, 4 and 2 positions, as an unaligned prompt makes them."""
    blocks = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]]).expand(6000, -1)
    settings = {"coupled": law.coupled, "stratified": law.stratified, "smallest": law.smallest_count}
    masks = count_masks(keys_of(6000), 8, law.draws, **settings, blocks=blocks)
    counts = torch.stack([masks.hidden[:, :, blocks[0] == b].sum(-1) for b in range(3)], -1)  # [M, B, 3]
    for b, size in enumerate((2, 4, 2)):
        possible = torch.arange(law.smallest_count, size + 1)
        for draw in counts[..., b]:
            share = (draw.unsqueeze(-1) == possible).double().mean(0)
            assert share.sum().item() == pytest.approx(1)
            assert (share - 1 / len(possible)).abs().max() < 4 * math.sqrt(0.25 / 6000)
    for position in range(8):  # which positions are hidden is uniform given the count
        b = int(blocks[0, position])
        size = int((blocks[0] == b).sum())
        shown = masks.hidden[0, :, position].double()
        assert abs(shown.mean() - counts[0, :, b].double().mean() / size) < 4 * math.sqrt(0.25 / 6000)
    joint = torch.corrcoef(counts[0].T.double())
    assert (joint - torch.eye(3)).abs().max() < 0.06
    if law.coupled:
        assert (masks.weight > 0).all()  # every position is scored once


# ---- one pass -------------------------------------------------------------------------------------------------------


def one_forward_per_block(policy, prompts, completion, masks):
    """The definition: every block by itself, after clean ones, later ones hidden."""
    layout, length = policy.layout, completion.shape[1]
    blocks = layout.blocks(prompts, length)
    result = torch.zeros(masks.weight.shape)
    for passes, draw, row in itertools.product(range(len(masks.passes)), range(len(masks.weight)), range(len(blocks))):
        hidden, one = masks.passes[passes, draw, row], Prompts(*(x[row : row + 1] for x in prompts))
        for block in blocks[row].unique():
            inside = blocks[row] == block
            canvas = completion[row].masked_fill((inside & hidden) | (blocks[row] > block), policy.mask_id)
            ids = torch.cat([one.ids, canvas.unsqueeze(0)], 1)
            select = F.pad(torch.ones(1, length, dtype=torch.bool), (one.ids.shape[1], 0))
            logits = policy(ids, one.seen_by(policy, length), select, lambda x: x)
            found = logits.log_softmax(-1).gather(-1, completion[row].unsqueeze(-1)).squeeze(-1)
            result[draw, row] += torch.where(inside & hidden, found, 0.0)
    return torch.where(masks.weight != 0, result, 0.0)


@EACH
@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("law", LAWS)
def test_one_pass_equals_one_forward_per_block(law, block, origin, monkeypatch):
    policy, prompts, completion = block_policy(block, origin), some_prompts(), some_completions()
    law = replace(law, block=block)
    masks = drawn(policy, law, prompts, completion)
    with torch.no_grad():
        expected = one_forward_per_block(policy, prompts, completion, masks)
        resumed = law.log_probs(policy, prompts, completion, masks)
        monkeypatch.setattr("espo_lightning.scoring.block.PART", 4)
        in_parts = law.log_probs(policy, prompts, completion, masks)
        policy.sharded = True
        joint = law.log_probs(policy, prompts, completion, masks)
    assert expected.abs().max() > 1
    torch.testing.assert_close(resumed, expected, rtol=1e-6, atol=1e-6)  # logits are rounded to float32
    torch.testing.assert_close(in_parts, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(joint, expected, rtol=1e-6, atol=1e-6)


@EACH
@pytest.mark.parametrize("part", [64, 4])
def test_both_forms_of_the_pass_have_the_same_gradient(origin, part, monkeypatch):
    monkeypatch.setattr("espo_lightning.scoring.block.PART", part)
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    gradients = []
    for policy.sharded in (False, True):
        assert policy.resumes != policy.sharded
        loss = LAWS[0].terms(policy, prompts, completion, masks).sum()
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_recomputed_layers_give_the_same_numbers():
    policy, prompts, completion = block_policy(), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    expected = LAWS[0].terms(policy, prompts, completion, masks)
    _checkpoint_layers(policy)
    policy.train()
    assert not policy.resumes
    torch.testing.assert_close(LAWS[0].terms(policy, prompts, completion, masks), expected, rtol=1e-6, atol=1e-6)


@EACH
def test_a_score_depends_on_its_own_row_only(origin):
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    keys = keys_of(4)
    together = LAWS[0].terms(policy, prompts, completion, drawn(policy, LAWS[0], prompts, completion))
    wide = some_prompts(width=20)
    torch.testing.assert_close(
        LAWS[0].terms(policy, wide, completion, drawn(policy, LAWS[0], wide, completion)),
        together,
        rtol=1e-5,
        atol=1e-5,
    )
    for row in range(4):
        one, rows = prompts.of(slice(row, row + 1)), slice(row, row + 1)
        one = Prompts(one.ids[one.mask].unsqueeze(0), None)
        masks = drawn(policy, LAWS[0], one, completion[rows], keys[rows])
        alone = LAWS[0].terms(policy, one, completion[rows], masks)
        torch.testing.assert_close(alone, together[:, rows], rtol=1e-5, atol=1e-5)


@EACH
def test_references_score_as_the_policy_they_were(origin):
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    expected = LAWS[0].log_probs(policy, prompts, completion, masks).detach()
    reference = make_reference(policy)
    policy.model = add_adapter(policy.model, LoRA(rank=2, alpha=4))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    for frozen in (reference, make_reference(policy)):
        assert torch.equal(LAWS[0].log_probs(frozen, prompts, completion, masks), expected)
    assert not torch.equal(LAWS[0].log_probs(policy, prompts, completion, masks), expected)


class Positions:
    """A policy that notes how many tokens it computes and where the head runs."""

    def __init__(self, policy):
        self.policy, self.tokens, self.head = policy, [], 0
        self.mask_id, self.layout, self.prefix, self.resumes = policy.mask_id, policy.layout, policy.prefix, True
        self.check_tokens = policy.check_tokens

    def __call__(self, ids, attention, select, *args, prefix=None, **kwargs):
        self.tokens.append(len(ids) * (ids.shape[1] - (0 if prefix is None else len(prefix))))
        self.head += int(select.sum())
        return self.policy(ids, attention, select, *args, prefix=prefix, **kwargs)


def test_prompt_and_clean_tokens_are_computed_once_and_the_head_where_it_is_read():
    policy, completion = Positions(block_policy(4, "response")), some_completions(2)
    prompts = some_prompts((6, 6))._replace(mask=None)
    law = BlockELBO(3, block=4)
    masks = law.draw(keys_of(2), LENGTH)
    law.log_probs(policy, prompts, completion, masks)
    passes = int(masks.scored.any(-1).sum())
    assert policy.tokens == [2 * (6 + LENGTH - 4), passes * LENGTH]
    assert policy.head == 2 * 3 * LENGTH  # every position once per draw
