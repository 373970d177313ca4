"""Decoding by blocks with an exact cache: keys, traces, costs, processes, bad input."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from block_cases import EACH, LENGTHS, Counted, alone, block_policy, keys_of, some_prompts
from conftest import small_module

from espo_lightning import (
    BlockDecoding,
    BlockELBO,
    Decoding,
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
from espo_lightning.policies.reference import make_reference

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
