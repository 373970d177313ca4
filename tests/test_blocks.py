"""Block-causal layouts and their decoding: who sees whom, an exact cache, keys, padding and batch-mates."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import small_module

from espo_lightning import (
    BlockDecoding,
    BlockELBO,
    Decoding,
    Layout,
    Prompts,
    Seen,
    Trajectory,
    dream_schedule,
    entropy_order,
    generate,
    margin_order,
    new_policy,
    origin_schedule,
    random_order,
)
from espo_lightning.keys import fold_in
from espo_lightning.policies.layout import CAUSAL, FULL
from espo_lightning.policies.reference import make_reference

ORIGINS = ("global", "response")
LENGTHS = (6, 3, 12, 9)  # of prompts, in one batch
EACH = pytest.mark.parametrize("origin", ORIGINS)


def block_policy(block: int = 4, origin: str = "global", dtype=torch.float64, layers: int = 2, **more):
    """Weights so large that everybody's opinion depends on whom it sees."""
    policy = new_policy(32, layers, 4, 64, seed=1, block=block, origin=origin, **more)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return policy.to(dtype).eval()


def some_prompts(lengths=LENGTHS, width: int | None = None, seed: int = 0) -> Prompts:
    """Left-padded prompts of these lengths; a row is the same in every batch."""
    width = width or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + length)
        ids[row, width - length :] = torch.randint(7, 60, (length,), generator=generator)
        mask[row, width - length :] = True
    return Prompts(ids, mask)


def alone(prompts: Prompts, row: int) -> Prompts:
    return Prompts(prompts.ids[row : row + 1, prompts.mask[row]], None)


def keys_of(n: int, seed: int = 7) -> torch.Tensor:
    return fold_in(seed, torch.arange(n))


# ---- layouts --------------------------------------------------------------------------------------------------------


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


# ---- decoding -------------------------------------------------------------------------------------------------------

DECODINGS = [
    BlockDecoding(12, 4, 12, 0.0),
    BlockDecoding(12, 4, 12, 1.0),
    BlockDecoding(12, 4, 6, 0.7, random_order),
    BlockDecoding(12, 4, 12, 1.0, entropy_order, top_p=0.9, order_temperature=0.3),
    BlockDecoding(12, 4, 6, 1.0, margin_order, schedule=dream_schedule),
    BlockDecoding(12, 4, 9, 1.0, random_order, schedule=origin_schedule),
    BlockDecoding(12, 4, 12, 1.0, threshold=0.1),
    BlockDecoding(12, 4, 12, 1.0, early_stop=True),
    BlockDecoding(12, 4, 12, 0.5, threshold=0.2, early_stop=True),
]


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_cached_equals_uncached_and_a_completion_depends_on_key_and_prompt_only(decoding, dtype, origin):
    policy, prompts, keys = block_policy(4, origin, dtype), some_prompts(), keys_of(4)
    cached = decoding.generate(policy, prompts, keys)
    assert not (cached == policy.mask_id).any()
    assert torch.equal(cached, replace(decoding, cache=False).generate(policy, prompts, keys))
    rows = torch.tensor([2, 0])
    assert torch.equal(cached[rows], decoding.generate(policy, prompts.of(rows), keys[rows]))
    assert torch.equal(cached, decoding.generate(policy, some_prompts(width=17), keys))
    for row in range(4):
        assert torch.equal(cached[row], decoding.generate(policy, alone(prompts, row), keys[row : row + 1])[0])


@pytest.mark.parametrize("decoding", DECODINGS)
def test_blocks_of_the_response_are_those_of_the_plain_decoder(decoding):
    """The same canvas, noise and commits as `generate` with full passes under the layout's mask."""
    policy, prompts, keys = block_policy(4, "response"), some_prompts(), keys_of(4)
    assert torch.equal(decoding.generate(policy, prompts, keys), generate(policy, prompts, keys, decoding))


@EACH
@pytest.mark.parametrize("decoding", DECODINGS)
def test_traces_are_those_of_the_steps(decoding, origin):
    """The same completions; states along the trace give the tokens their laws again, uncached."""
    policy, prompts, keys = block_policy(4, origin), some_prompts(), keys_of(4)
    completion, trace = decoding.decode(policy, prompts, keys)
    assert torch.equal(completion, decoding.generate(policy, prompts, keys))
    assert trace.steps.max() < decoding.passes
    blocks = policy.layout.blocks(prompts, 12)
    busy = decoding.passes // 4
    made = trace.steps >= 0
    assert torch.equal((trace.steps // busy)[made], blocks[made])
    if not decoding.early_stop:
        assert made.all()
    for row in range(4):
        single, alone_trace = decoding.decode(policy, alone(prompts, row), keys[row : row + 1])
        assert torch.equal(single[0], completion[row])
        assert torch.equal(alone_trace.steps[0], trace.steps[row])


@EACH
def test_the_likelihood_along_the_trace_is_that_of_the_steps(origin):
    """Trajectory, whose passes are whole canvases, against one forward for every step, by hand."""
    policy, prompts, keys = block_policy(4, origin), some_prompts(), keys_of(4)
    decoding = BlockDecoding(12, 4, 6, order=random_order)
    completion, trace = decoding.decode(policy, prompts, keys)
    seen = Seen.of(policy, prompts, completion, keys, trace=trace, passes=decoding.passes)
    law = Trajectory()
    law.check(policy, 12)
    law.check_decoding(decoding)
    masks = law.masks(keys, seen)
    with torch.no_grad():
        ours = law.terms(policy, prompts, completion, masks).sum(-1).mean(0)
    for row in range(4):
        one, total = alone(prompts, row), 0.0
        width = one.ids.shape[1]
        for step in trace.steps[row].unique():
            shown = completion[row].masked_fill(trace.steps[row] >= step, policy.mask_id)
            ids, sees = torch.cat([one.ids, shown[None]], 1), one.seen_by(policy, 12)
            logits = policy(ids, sees, F.pad((trace.steps[row] == step)[None], (width, 0)), lambda x: x)
            logits[:, policy.mask_id] = -torch.inf
            tokens = completion[row][trace.steps[row] == step]
            total += logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item()
        assert ours[row].item() == pytest.approx(total, abs=1e-3)


@EACH
def test_the_law_of_a_completion_does_not_see_later_blocks(origin):
    """A longer canvas begins with the same tokens, where its noise is the same: greedily."""
    policy, prompts, keys = block_policy(4, origin), some_prompts(), keys_of(4)
    short = BlockDecoding(8, 4, 8, 0.0).generate(policy, prompts, keys)
    long = BlockDecoding(16, 4, 16, 0.0).generate(policy, prompts, keys)
    for row, tail in enumerate(policy.layout.tails(prompts).tolist()):  # the short canvas ends within a block
        complete = 8 - tail
        assert torch.equal(short[row, :complete], long[row, :complete])


class Counted:
    """A policy that notes the shape of every pass: (rows, tokens computed)."""

    def __init__(self, policy):
        self.policy, self.passes = policy, []
        self.mask_id, self.layout, self.prefix, self.selective = policy.mask_id, policy.layout, policy.prefix, True
        self.eos_ids, self.eos_id = policy.eos_ids, policy.eos_id

    def __call__(self, ids, *args, prefix=None, **kwargs):
        self.passes.append((len(ids), ids.shape[1] - (0 if prefix is None else len(prefix))))
        return self.policy(ids, *args, prefix=prefix, **kwargs)


def test_a_step_costs_a_block_and_a_block_one_clean_pass():
    policy = Counted(block_policy(4, "response"))
    prompts = some_prompts((5, 5))._replace(mask=None)
    BlockDecoding(12, 4, 12).generate(policy, prompts, keys_of(2))
    steps = [(2, 4)] * 4
    assert policy.passes == [(2, 5), *steps, (2, 4), *steps, (2, 4), *steps]


def test_nothing_runs_where_no_prompt_needs_a_block():
    """Origin global: prompts that end with a block need L / b blocks, others one more, of fewer positions."""
    policy = Counted(block_policy(4, "global"))
    BlockDecoding(8, 4, 8).generate(policy, some_prompts((8,)), keys_of(1))
    assert policy.passes == [(1, 8), *[(1, 4)] * 4, (1, 4), *[(1, 4)] * 4]
    policy.passes.clear()
    BlockDecoding(8, 4, 8).generate(policy, some_prompts((6,)), keys_of(1))  # 2, 4 and 2 positions
    assert policy.passes == [(1, 6), *[(1, 4)] * 2, (1, 4), *[(1, 4)] * 4, (1, 4), *[(1, 4)] * 2]


@pytest.mark.parametrize(("origin", "decoding"), [("global", DECODINGS[1]), ("response", DECODINGS[6])])
def test_processes_make_equally_many_passes(origin, decoding):
    """A process that has finished runs one row for as long as another one needs a step, and asks as often."""
    policy = block_policy(4, origin)

    barrier, said = threading.Barrier(2, timeout=60), [False, False]
    batches, results = [some_prompts((6, 7)), some_prompts((8,))], [None, None]

    def process(rank: int) -> None:
        counted = Counted(policy)

        def agree(more: bool) -> bool:
            said[rank] = more
            barrier.wait()
            anybody = any(said)
            barrier.wait()
            return anybody

        out = decoding.generate(counted, batches[rank], keys_of(len(batches[rank].ids)), agree)
        results[rank] = out, len(counted.passes)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0][1] == results[1][1]
    for batch, (out, _) in zip(batches, results):
        assert torch.equal(out, decoding.generate(policy, batch, keys_of(len(batch.ids))))


@EACH
def test_references_of_a_block_policy_decode_as_it_does(origin):
    policy, prompts, keys = block_policy(4, origin), some_prompts(), keys_of(4)
    reference = make_reference(policy)
    assert reference.layout == policy.layout
    decoding = BlockDecoding(8, 4, 8)
    expected = decoding.generate(policy, prompts, keys)
    assert torch.equal(decoding.generate(reference.policy, prompts, keys), expected)


def test_a_network_without_a_cache_is_decoded_without_one():
    policy, prompts, keys = block_policy(4, whole_last_layer=True), some_prompts(), keys_of(4)
    with pytest.raises(ValueError, match=r"the cache of BlockDecoding needs .*set decoding.cache to false"):
        BlockDecoding(8, 4, 8).check(policy)
    without = BlockDecoding(8, 4, 8, cache=False)
    without.check(policy)
    expected = BlockDecoding(8, 4, 8).generate(block_policy(4), prompts, keys)
    assert torch.equal(without.generate(policy, prompts, keys), expected)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 10}, "length 10 is not a multiple of block_length 4"),
        ({"prefix_cache": True}, "prefix_cache is superfluous with BlockDecoding"),
        ({"corrector": 1}, "corrector draws tokens of finished blocks anew"),
        ({"threshold": 1.5}, "threshold must be a probability between 0 and 1"),
        ({"threshold": 0.0}, "threshold must be a probability between 0 and 1"),
        ({"threshold": float("nan")}, "threshold must be a probability between 0 and 1"),
        ({"steps": 5}, "steps must be a multiple of the number of blocks, 3"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_nonsense_decodings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockDecoding(**{"length": 12, "block_length": 4, "steps": 12} | settings)


@pytest.mark.parametrize(
    ("policy", "decoding", "message"),
    [
        (lambda: new_policy(), BlockDecoding(8, 4, 8), "full attention, where keys .* inexact: use Decoding"),
        (lambda: new_policy(causal=True), BlockDecoding(8, 4, 8), "the policy is a causal model, which cannot denoise"),
        (lambda: block_policy(4), BlockDecoding(16, 8, 16), "block_length is 8, but the policy has .* set it to 4"),
        (lambda: block_policy(4), Decoding(8, 4, 8, prefix_cache=True), "prefix_cache is superfluous"),
        (lambda: block_policy(8, "response"), Decoding(8, 4, 8, prefix_cache=True), "prefix_cache is superfluous"),
        (lambda: block_policy(4), Decoding(8, 4, 8), "use BlockDecoding with block_length 4"),
        (lambda: block_policy(8, "global"), Decoding(8, 8, 8), "use BlockDecoding with block_length 8"),
    ],
)
def test_decodings_that_do_not_fit_the_policy_are_refused(policy, decoding, message):
    policy = policy()
    with pytest.raises(ValueError, match=message):
        decoding.check(policy)
    with pytest.raises(ValueError, match=message):
        small_module(policy, decoding=decoding)


def test_one_block_is_decoded_either_way():
    policy, prompts, keys = block_policy(8, "response"), some_prompts(), keys_of(4)
    for decoding in (Decoding(8, 8, 8), Decoding(8, 4, 8), Decoding(4, 4, 4)):
        decoding.check(policy)
    plain = Decoding(8, 8, 8).generate(policy, prompts, keys)
    assert torch.equal(plain, BlockDecoding(8, 8, 8).generate(policy, prompts, keys))


@pytest.mark.parametrize("origin", ["global", "response"])
@pytest.mark.parametrize("cache", [True, False])
def test_prompt_and_canvas_may_have_as_many_tokens_as_the_network_has_positions(origin, cache):
    policy, prompts = block_policy(4, origin), some_prompts()
    total = prompts.ids.shape[1] + 8
    decoding, masks = BlockDecoding(8, 4, 8, cache=cache), BlockELBO(2, block=4)
    policy.config.max_position_embeddings = total
    completion = decoding.generate(policy, prompts, keys_of(len(LENGTHS)))
    drawn = masks.draw(keys_of(len(LENGTHS)), 8)
    masks.log_probs(policy, prompts, completion, drawn)
    policy.config.max_position_embeddings = total - 1
    for run in (
        lambda: decoding.generate(policy, prompts, keys_of(len(LENGTHS))),
        lambda: masks.log_probs(policy, prompts, completion, drawn),
    ):
        with pytest.raises(ValueError, match=rf"max_position_embeddings={total - 1}: lower max_prompt_length"):
            run()
    policy.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="a canvas of length 8 leaves no room for a prompt"):
        decoding.check(policy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_are_named(temperature):
    policy = block_policy()
    with torch.no_grad():
        policy.head.weight[9] = float("nan")
    decoding = BlockDecoding(8, 4, 8, temperature=temperature)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        decoding.generate(policy, some_prompts(), keys_of(len(LENGTHS)))
