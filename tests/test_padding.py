"""Padding changes nothing: in no type of numbers, by no kernel of attention, for no layout."""

import pytest
import torch
import torch.nn.functional as F
from block_cases import LENGTHS, alone, block_policy, some_prompts
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from espo_lightning import AutoregressiveDecoding, BlockDecoding, Policy, Prompts
from espo_lightning.keys import fold_in
from espo_lightning.policies.layout import bias, causally
from espo_lightning.policies.masked_lm import MaskedLM

CANVAS = torch.randint(7, 30, (len(LENGTHS), 8), generator=torch.Generator().manual_seed(0))
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}  # eager's softmax: float32
LAYOUTS = {
    "full": {},
    "causal": {"causal": True},
    "blocks of 1": {"block": 1},
    "blocks": {"block": 4},
    "blocks of the response": {"block": 4, "origin": "response"},
}


def logits(policy: Policy, prompts: Prompts, canvas: torch.Tensor) -> torch.Tensor:
    """[B, L, V]."""
    ids = torch.cat([prompts.ids, canvas], 1)
    select = F.pad(torch.ones_like(canvas, dtype=torch.bool), (prompts.ids.shape[1], 0))
    return policy(ids, prompts.seen_by(policy, canvas.shape[1]), select, lambda x: x).view(*canvas.shape, -1)


def gradient(policy: Policy, total: torch.Tensor) -> torch.Tensor:
    """Of all weights, as one vector."""
    policy.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).double()


def assert_padding_changes_nothing(policy: Policy, prompts: Prompts, close: float) -> None:
    """Neither what is computed of real tokens nor what is learnt of them."""
    together = logits(policy, prompts, CANVAS[: len(prompts.ids)])
    singles = torch.cat([logits(policy, alone(prompts, row), CANVAS[row : row + 1]) for row in range(len(prompts.ids))])
    assert together.isfinite().all()
    assert together.std() > 0.1  # what is compared is something
    torch.testing.assert_close(together, singles, rtol=0, atol=close)
    learnt, expected = (gradient(policy, x.log_softmax(-1)[..., 7].mean()) for x in (together, singles))
    assert learnt.isfinite().all()
    assert (learnt - expected).norm() < 5 * close * expected.norm()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_padded_batch_are_those_of_a_batch_of_one(layout, attention, dtype):
    policy = block_policy(**{"block": None, "dtype": dtype} | LAYOUTS[layout])
    policy.model.set_attn_implementation(attention)
    assert_padding_changes_nothing(policy, some_prompts(), CLOSE[dtype])


def masked_lm(kind: str) -> MaskedLM:
    """In float64; a ModernBERT looks 4 tokens to each side in its first layer, and at all in its second."""
    size = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
    size |= {"intermediate_size": 24, "max_position_embeddings": 40}
    windows = {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            model = BertForMaskedLM(BertConfig(**size))
        else:
            model = ModernBertForMaskedLM(ModernBertConfig(**size, **windows, **ids))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.4)
    return MaskedLM(model.double().eval(), None, mask_id=4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_so_are_those_of_a_masked_lm_whose_window_sees_only_padding(kind, attention):
    policy = masked_lm(kind)
    policy.model.set_attn_implementation(attention)
    prompts = some_prompts((6, 2, 4), width=16)
    ids = (prompts.ids % 20 + 5).masked_fill(~prompts.mask, 1)
    assert_padding_changes_nothing(policy, Prompts(ids, prompts.mask), 1e-4)
    kept = Prompts(ids[:1, -6:], prompts.mask[:1, -6:])  # of a padded batch, a row without padding
    torch.testing.assert_close(logits(policy, kept, CANVAS[:1]), logits(policy, Prompts(kept.ids, None), CANVAS[:1]))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_no_row_of_a_bias_is_without_a_key(dtype):
    """So that none can be NaN, however far down scores and rounding push what is hidden."""
    sees = torch.tensor([[[False, False, False], [False, True, False], [True, True, True]]])
    added = bias(sees, dtype)
    assert added.dtype == dtype
    assert torch.equal(added[0, 0] == 0, torch.tensor([[True] * 3, [False, True, False], [True] * 3]))
    low = (added - 100).to(torch.float16).softmax(-1)
    assert torch.equal(low[0, 0, 1], torch.tensor([0, 1, 0], dtype=torch.float16))
    assert low.isfinite().all()


def test_causal_rows_see_the_keys_before_them_and_those_of_a_prefix():
    keys = torch.tensor([[False, True, True, True]])
    whole = torch.tensor([[[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]], dtype=torch.bool)
    assert torch.equal(causally(keys, 4), whole)
    assert torch.equal(causally(keys, 2), whole[:, 2:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_prompts_are_written_on_as_they_are_alone_in_float64(attention):
    """Token by token behind cached prefixes, causally; and block by block."""
    keys, prompts = fold_in(3, torch.arange(len(LENGTHS))), some_prompts()
    written = {
        AutoregressiveDecoding(8): block_policy(None, causal=True),
        BlockDecoding(8, 4, 8): block_policy(4, "global"),
    }
    for decoding, policy in written.items():
        policy.model.set_attn_implementation(attention)
        together = decoding.generate(policy, prompts, keys)
        for row in range(len(LENGTHS)):
            single = decoding.generate(policy, alone(prompts, row), keys[row : row + 1])
            assert torch.equal(single, together[row : row + 1])
