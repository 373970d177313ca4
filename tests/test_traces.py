"""Traces: which step committed which position and from which entropy, at no pass more; orders; the corrector."""

import itertools
import math

import pytest
import torch
from conftest import small_policy
from decoding_cases import PROMPT, Recorder, keys_of, peaky_policy, rng, some_prompts

from espo_lightning import (
    AutoregressiveDecoding,
    Decoding,
    Policy,
    dream_schedule,
    entropy_order,
    generate,
    left_to_right,
    load_policy,
    low_confidence,
    margin_order,
    new_policy,
    origin_schedule,
    random_order,
)
from espo_lightning.decoding.decoder import Trace
from espo_lightning.lab.exact import enumerate_completions
from espo_lightning.lab.tabular import TabularPolicy

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

DECODINGS = {
    "low confidence": Decoding(12, 4, 12),
    "two tokens a step": Decoding(12, 6, 6, 0.7, random_order),
    "left to right": Decoding(12, 12, 12, order=left_to_right),
    "left to right by blocks": Decoding(12, 1, 12),
    "Dream": Decoding(12, 12, 12, 0.8, entropy_order, 0.9, 0.2, dream_schedule),
    "origin": Decoding(12, 12, 6, order=random_order, schedule=origin_schedule),
    "threshold": Decoding(12, 6, 12, 0.7, threshold=0.3),
    "greedy": Decoding(12, 4, 6, 0.0, margin_order),
    "one step": Decoding(12, 12, 1),
    "prefix cache": Decoding(12, 4, 12, prefix_cache=True),
    "corrector": Decoding(12, 4, 12, corrector=3),
}
EACH = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)


@pytest.fixture(scope="module")
def policy():
    return peaky_policy()


@EACH
def test_a_trace_costs_no_pass_and_changes_no_token(policy, decoding):
    prompts, keys = some_prompts(5), keys_of(1, 5)
    plain, traced = Recorder(policy), Recorder(policy)
    expected, (ids, trace) = decoding.generate(plain, prompts, keys), decoding.decode(traced, prompts, keys)
    assert torch.equal(ids, expected)
    assert torch.equal(ids, generate(policy, prompts, keys, decoding))
    assert len(plain.canvases) == len(traced.canvases) <= decoding.passes
    assert all(torch.equal(a, b) for a, b in zip(plain.canvases, traced.canvases))
    if not (decoding.data_dependent or decoding.schedule is dream_schedule):
        assert len(plain.canvases) == decoding.passes == decoding.steps + decoding.corrector
    assert trace.steps.shape == trace.entropy.shape == (5, 12)
    assert (trace.steps.dtype, trace.entropy.dtype) == (torch.int64, torch.float32)
    assert trace.steps.min() >= 0
    assert trace.steps.max() < decoding.passes


@pytest.mark.parametrize("name", sorted(DECODINGS.keys() - {"corrector", "threshold"}))
def test_steps_are_those_in_which_the_canvas_changed(policy, name):
    decoding, prompts = DECODINGS[name], some_prompts(5)
    recorder = Recorder(policy)
    ids, trace = decoding.decode(recorder, prompts, keys_of(2, 5))
    seen = [canvas[:, 5:] for canvas in recorder.canvases] + [ids]
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        assert torch.equal(trace.steps == step, before != after)


@EACH
def test_a_trace_depends_on_its_own_key_only(policy, decoding):
    """A completion that needs fewer passes has the trace that it has alone."""
    prompts, keys, rows = some_prompts(6), keys_of(3, 6), torch.tensor([4, 1])
    _, whole = decoding.decode(policy, prompts, keys)
    _, part = decoding.decode(policy, prompts.of(rows), keys[rows])
    assert torch.equal(whole.of_rows(rows).steps, part.steps)
    torch.testing.assert_close(whole.of_rows(rows).entropy, part.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["low confidence", "two tokens a step", "Dream", "greedy"])
def test_entropies_are_those_of_the_laws_that_tokens_were_drawn_from(policy, name):
    """Recomputed from the states: without the mask token, after temperature and top-p."""
    decoding, prompts = DECODINGS[name], some_prompts(4)
    recorder = Recorder(policy)
    _, trace = decoding.decode(recorder, prompts, keys_of(4, 4))
    for step, canvas in enumerate(recorder.canvases):
        with torch.no_grad():
            logits = policy.model(canvas).logits.double()[:, 5:]
        logits[..., policy.mask_id] = -math.inf
        law = (logits / (decoding.temperature or 1)).softmax(-1)
        if decoding.top_p < 1:
            ranked, index = law.sort(-1, descending=True)
            kept = (ranked.cumsum(-1) - ranked <= decoding.top_p).gather(-1, index.argsort(-1))
            law = law * kept / (law * kept).sum(-1, keepdim=True)
        expected = -torch.special.xlogy(law, law).sum(-1)
        here = trace.steps == step
        torch.testing.assert_close(trace.entropy[here].double(), expected[here], rtol=1e-3, atol=1e-3)


def test_what_early_stop_fills_has_no_step():
    policy = load_policy("bundled:countdown")
    prompts = policy.encode(["1, 2, 3 -> 6"] * 8)
    decoding = Decoding(12, 12, 12, order=left_to_right, early_stop=True)
    ids, trace = decoding.decode(policy, prompts, keys_of(5, 8))
    assert torch.equal(ids, decoding.generate(policy, prompts, keys_of(5, 8)))
    filled = torch.arange(12) > policy.lengths(ids).unsqueeze(-1)
    assert filled.any()
    assert torch.equal(trace.steps < 0, filled)
    assert torch.equal(trace.steps[~filled], torch.arange(12).expand(8, -1)[~filled])
    assert not trace.entropy[filled].any()


def test_causal_traces_are_left_to_right():
    policy = new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True)
    decoding, prompts, keys = AutoregressiveDecoding(6), policy.encode(["ab", "c"]), keys_of(6, 2)
    ids, trace = decoding.decode(policy, prompts, keys)
    assert torch.equal(ids, decoding.generate(policy, prompts, keys))
    assert torch.equal(trace.steps, torch.arange(6).expand(2, -1))
    row = torch.cat([prompts.ids[:1], ids[:1]], 1)
    with torch.no_grad():
        logits = policy.model(row).logits[0, -7:-1].double()
    law = torch.distributions.Categorical(logits=logits)
    ended = policy.lengths(ids)[0]
    torch.testing.assert_close(trace.entropy[0, : ended + 1].double(), law.entropy()[: ended + 1], rtol=1e-4, atol=1e-4)
    assert decoding.order_free
    assert decoding.passes == 6


@pytest.mark.parametrize(
    ("decoding", "free"),
    [
        (Decoding(order=random_order), True),
        (Decoding(order=random_order, steps=8), True),
        (Decoding(order=random_order, schedule=origin_schedule, block_length=16), True),
        (Decoding(order=left_to_right), True),
        (Decoding(block_length=1), True),
        (Decoding(block_length=4, steps=4), True),
        (Decoding(), False),
        (Decoding(order=entropy_order), False),
        (Decoding(order=margin_order, order_temperature=0.5), False),
        (Decoding(order=left_to_right, order_temperature=0.5), True),
        (Decoding(threshold=0.5), False),
        (Decoding(block_length=4, steps=8), False),
    ],
)
def test_an_order_is_free_where_two_policies_give_it_the_same_law(decoding, free):
    """The law of the steps under two very different policies: equal, or not."""
    steps = [decoding.decode(peaky_policy(seed), some_prompts(64), keys_of(7, 64))[1].steps for seed in (1, 2)]
    assert torch.equal(*steps) == free
    assert decoding.order_free == free


def test_early_stop_leaves_an_order_free():
    """When it stops depends on the tokens, but which position comes next does not."""
    assert Decoding(order=random_order, early_stop=True).order_free


def test_left_to_right_is_blocks_of_one_token(policy):
    prompts, keys = some_prompts(6), keys_of(8, 6)
    ids, trace = Decoding(12, 12, 12, order=left_to_right).decode(policy, prompts, keys)
    again, blocks = Decoding(12, 1, 12, order=low_confidence).decode(policy, prompts, keys)
    assert torch.equal(ids, again)
    assert torch.equal(trace.steps, blocks.steps)
    two = Decoding(12, 12, 6, order=left_to_right).decode(policy, prompts, keys)[1]
    assert torch.equal(two.steps, torch.arange(12).expand(6, -1) // 2)


def test_dreams_logits_are_traced_too():
    base = peaky_policy()
    shifted = Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=1).eval()
    ids, trace = DECODINGS["two tokens a step"].decode(shifted, some_prompts(3), keys_of(9, 3))
    assert torch.equal(trace.steps.sort(1).values, torch.arange(12).expand(3, -1) // 2)
    assert (trace.entropy > 0).all()
    assert isinstance(trace, Trace)
    assert ids.shape == trace.steps.shape


# ---- the corrector --------------------------------------------------------------------------------------------------


def law(policy: TabularPolicy, completions: torch.Tensor) -> torch.Tensor:
    """Frequencies [27] of completions [n, 3]."""
    return torch.bincount((completions * 3 ** torch.arange(3)).sum(1), minlength=27) / len(completions)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_corrector_leaves_a_consistent_law_unchanged(steps):
    """Five standard deviations, of every completion and of their total variation."""
    policy, n = TabularPolicy(3, 3, generator=rng(0), consistent=True), 60_000
    expected = policy.table.detach().softmax(0)
    decoding = Decoding(3, 3, 3, order=random_order, corrector=steps)
    observed = law(policy, decoding.generate(policy, PROMPT.repeat_each(n), keys_of(10, n)))
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_the_corrector_drags_an_inconsistent_law_as_gibbs_steps_do():
    policy, n = TabularPolicy(3, 3, generator=rng(1)), 60_000
    start = Decoding(3, 3, 3, order=random_order)
    completions, logits = enumerate_completions(3, 3), policy.logits().detach()
    kernel = torch.zeros(27, 27, dtype=torch.float64)
    for a, tokens in enumerate(completions.tolist()):
        for i in range(3):
            state = sum((3 if j == i else t) * 4**j for j, t in enumerate(tokens))
            for v, chance in enumerate(logits[state, i].softmax(0)):
                kernel[a, a + (v - tokens[i]) * 3**i] += chance / 3
    before = law(policy, start.generate(policy, PROMPT.repeat_each(n), keys_of(11, n))).double()
    for count in (1, 4):
        decoding = Decoding(3, 3, 3, order=random_order, corrector=count)
        after = law(policy, decoding.generate(policy, PROMPT.repeat_each(n), keys_of(11, n))).double()
        expected = before @ torch.linalg.matrix_power(kernel, count)
        assert float((after - expected).abs().sum()) / 2 < 0.015
        assert float((after - before).abs().sum()) / 2 > 0.03


def test_the_corrector_draws_anew_one_position_at_a_time(policy):
    recorder, prompts = Recorder(policy), some_prompts(7)
    decoding = Decoding(12, 12, 12, corrector=5)
    ids, trace = decoding.decode(recorder, prompts, keys_of(12, 7))
    plain = Decoding(12, 12, 12).generate(policy, prompts, keys_of(12, 7))
    assert len(recorder.canvases) == decoding.passes == 17
    for canvas, select in zip(recorder.canvases[12:], recorder.selections[12:]):
        assert (select.sum(1) == 1).all()
        assert torch.equal(canvas == policy.mask_id, select)
    touched = trace.steps >= 12
    assert torch.equal(ids[~touched], plain[~touched])
    assert (recorder.selections[12] != recorder.selections[13]).any()  # positions are drawn for every pass
    assert len({tuple(row.nonzero()[0].tolist()) for row in recorder.selections[12]}) > 1  # and for every row


def test_a_corrector_cannot_be_negative():
    with pytest.raises(ValueError, match=r"corrector must be 0 \(none\) or a number of passes, got -1"):
        Decoding(corrector=-1)


def test_a_policy_with_padded_prompts_is_corrected_alike():
    policy = small_policy()
    prompts, decoding = policy.encode(["abc", "a"]), Decoding(4, 4, 4, corrector=4)
    both = decoding.generate(policy, prompts, keys_of(13, 2))
    alone = decoding.generate(policy, policy.encode(["a"]), keys_of(13, 2)[1:])
    assert torch.equal(both[1:], alone)
