"""Early stop keeps every text, and sharded processes stop together."""

import math
import threading

import pytest
import torch
from conftest import fit, small_module
from decoder_cases import policy_fixture  # noqa: F401
from decoding_cases import PROMPT, Recorder, keys_of, peaky_policy, rng, some_prompts

from espo_lightning import (
    Countdown,
    Decoding,
    dream_schedule,
    entropy_order,
    generate,
    load_policy,
    origin_schedule,
    random_order,
)
from espo_lightning.decoding.masked import end
from espo_lightning.lab.tabular import TabularPolicy


@pytest.fixture(scope="module")
def countdown():
    """The bundled policy and sixteen padded prompts, four completions each."""
    policy = load_policy("bundled:countdown")
    prompts = policy.encode([Countdown(largest=10, largest_target=50).problem("train", 0, i).prompt for i in range(16)])
    return policy, prompts.repeat_each(4)


# ---- early stop -----------------------------------------------------------------------------------------------------


def test_end_by_hand():
    class Ends:
        mask_id, eos_ids, eos_id = 9, {7, 8}, 7

    before = [
        [1, 2, 8, 9, 9, 9],  # the text is complete
        [1, 9, 8, 9, 9, 9],  # a token before the end is missing
        [7, 9, 3, 9, 8, 9],  # what is committed stays
        [1, 2, 3, 9, 9, 9],
        [1, 2, 3, 4, 5, 6],
        [9, 7, 7, 7, 7, 7],
    ]
    after = [[1, 2, 8, 7, 7, 7], before[1], [7, 7, 3, 7, 8, 7], *before[3:]]
    assert end(torch.tensor(before), Ends).tolist() == after


EARLY = [
    Decoding(16, 16, 16),
    Decoding(16, 4, 16),
    Decoding(16, 4, 8, 0.7, random_order),
    Decoding(16, 8, 8, 1.0, entropy_order, 0.9, 0.1, dream_schedule),
    Decoding(16, 16, 8, 1.0, random_order, schedule=origin_schedule),
    Decoding(16, 8, 16, 0.7, threshold=0.6),
    Decoding(16, 8, 8, prefix_cache=True),
]


def early(decoding: Decoding) -> Decoding:
    return Decoding(**{**vars(decoding), "early_stop": True})


@pytest.mark.parametrize("decoding", EARLY, ids=range(len(EARLY)))
def test_early_stop_keeps_every_text_and_saves_passes(countdown, decoding):
    """Texts end after some six of sixteen tokens. The canvas behind them may differ, and only there."""
    policy, prompts = countdown
    keys = keys_of(4, len(prompts.ids))
    full, short = Recorder(policy), Recorder(policy)
    whole, stopped = generate(full, prompts, keys, decoding), generate(short, prompts, keys, early(decoding))
    assert policy.decode(stopped) == policy.decode(whole)
    lengths = policy.lengths(whole)
    assert torch.equal(policy.lengths(stopped), lengths)
    assert (stopped != policy.mask_id).all()
    text = torch.arange(16) <= lengths.unsqueeze(1)  # with the first end-of-text token
    assert torch.equal(stopped[text], whole[text])
    rows = [sum(len(canvas) for canvas in recorder.canvases) for recorder in (full, short)]
    # in one block this policy is surest of the end-of-text tail and commits it first: then there is nothing to save
    assert rows[1] == rows[0] if decoding is EARLY[0] else rows[1] < rows[0]


def test_early_stop_changes_canvases_behind_the_text():
    """Where the policy goes on behind the end, the canvas is not the same, as documented."""
    policy = peaky_policy(5)
    policy.config.eos_token_id = list(range(10, 22))  # some tokens that it does write
    prompts, keys = some_prompts(64), keys_of(5, 64)
    decoding = Decoding(12, 4, 12)
    whole, stopped = generate(policy, prompts, keys, decoding), generate(policy, prompts, keys, early(decoding))
    ended = policy.lengths(whole) < 12
    assert 8 < ended.sum() < 64
    assert policy.decode(whole) == policy.decode(stopped)
    assert torch.equal(whole[~ended], stopped[~ended])
    assert (whole != stopped).any(1).sum() > 4


class EndsForGood(TabularPolicy):
    """Behind an end-of-text token (symbol 0), nothing but end-of-text tokens."""

    eos_ids, eos_id = frozenset({0}), 0

    def logits(self):
        digits = torch.arange(len(self.table)).unsqueeze(1) // self._place % (self.symbols + 1)
        behind = (digits == 0).cumsum(1) > 0
        return self.table.masked_fill(behind.unsqueeze(-1) & (torch.arange(self.symbols) > 0), -math.inf)


@pytest.mark.parametrize("decoding", [Decoding(4, 1, 4), Decoding(4, 2, 4, 1.0, random_order), Decoding(4, 2, 2)])
def test_early_stop_is_exact_where_only_end_of_text_follows(decoding):
    policy, n = EndsForGood(3, 4, generator=rng(12)), 500
    full, short = Recorder(policy), Recorder(policy)
    whole = generate(full, PROMPT.repeat_each(n), keys_of(6, n), decoding)
    stopped = generate(short, PROMPT.repeat_each(n), keys_of(6, n), early(decoding))
    assert torch.equal(whole, stopped)
    assert sum(map(len, short.canvases)) < sum(map(len, full.canvases))


# ---- sharded processes ----------------------------------------------------------------------------------------------


def test_agree_is_asked_once_a_step_of_data_dependent_decodings_only(policy):
    prompts, keys, asked = some_prompts(3), keys_of(7, 3), []

    def agree(needs: bool) -> bool:
        asked.append(needs)
        return needs

    generate(policy, prompts, keys, Decoding(8, 4, 8), agree)
    generate(policy, prompts, keys, Decoding(8, 8, 4, 1.0, random_order, schedule=origin_schedule), agree)
    assert asked == []
    recorder = Recorder(policy)
    generate(recorder, prompts, keys, Decoding(8, 4, 8, threshold=0.05), agree)
    assert sum(asked) == len(recorder.canvases)
    assert 2 <= len(recorder.canvases) < 8
    assert len(asked) - sum(asked) == 2  # both blocks were complete before their last step


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_process_that_has_finished_runs_one_row_a_pass(policy, prefix_cache, extra):
    """The others need ``extra`` more steps in every block, or all of them."""
    prompts, keys, asked = some_prompts(4), keys_of(8, 4), []
    decoding = Decoding(8, 4, 8, threshold=1e-30, prefix_cache=prefix_cache)  # alone, one pass a block
    alone = generate(policy, prompts, keys, decoding)

    def agree(needs: bool) -> bool:
        asked.append(needs)
        return needs or len(asked) % (extra + 2) != 0

    recorder = Recorder(policy)
    assert torch.equal(generate(recorder, prompts, keys, decoding, agree), alone)
    assert [len(canvas) for canvas in recorder.canvases] == ([4] + [1] * extra) * 2
    assert [int(select.sum()) for select in recorder.selections] == ([16] + [0] * extra) * 2


@pytest.mark.parametrize("decoding", [EARLY[5], EARLY[1], EARLY[6]], ids=["threshold", "early", "prefix"])
def test_two_processes_make_the_same_number_of_passes(countdown, decoding):
    """Two threads with a logical or between them, as two ranks; neither changes the other's completions."""
    policy, prompts = countdown
    decoding, keys = early(decoding), keys_of(9, 12)
    parts = [slice(0, 3), slice(3, 12)]
    alone = [generate(policy, prompts.of(part), keys[part], decoding) for part in parts]
    barrier, needs, results, recorders = threading.Barrier(2, timeout=60), [False] * 2, [None] * 2, []

    def run(rank: int, recorder: Recorder) -> None:
        def agree(mine: bool) -> bool:
            needs[rank] = mine
            barrier.wait()
            together = any(needs)
            barrier.wait()
            return together

        results[rank] = generate(recorder, prompts.of(parts[rank]), keys[parts[rank]], decoding, agree)

    recorders = [Recorder(policy) for _ in parts]
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(recorders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, alone))
    assert len(recorders[0].canvases) == len(recorders[1].canvases)


@pytest.mark.parametrize("decoding", [Decoding(4, 4, 4, threshold=0.3), Decoding(4, 2, 4, early_stop=True)])
def test_training_asks_the_strategy(decoding, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    asked = []

    def reduce(self, decision: bool, all: bool = True) -> bool:
        asked.append((all, self.lightning_module.trainer.training))
        return decision

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", reduce)
    module = small_module(decoding=decoding)
    fit(module, batches=1, limit_val_batches=1)
    assert module.rollouts == 1
    assert set(asked) == {(False, True), (False, False)}  # whether *any* process needs it, in training and validation
