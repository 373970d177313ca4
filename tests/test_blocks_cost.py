"""The cost model of block-causal policies against what really runs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from block_cases import Counted, block_policy, keys_of, some_prompts
from conftest import fit
from torch.utils.flop_counter import FlopCounterMode

from espo_lightning import BlockDecoding, BlockELBO, Decoding, PolicyGradient
from espo_lightning.cost import cost, passes_of
from espo_lightning.lab.flops import Passes, decoding_passes, flops, forward, scoring_passes, work
from espo_lightning.lab.flops_blocks import block_decoding_passes, block_scoring_passes, cache_bytes
from espo_lightning.lab.network import read_network
from espo_lightning.lab.studies.compute import ATTENTION, Measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    block_policy(4, "response", torch.float32).save(path)
    return path


def prompts_of(rows: int, length: int = 6):
    return some_prompts((length,) * rows)._replace(mask=None)


def measured(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("steps", [12, 6, 3])
def test_flops_of_decoding_are_those_of_the_model(folder, cache, steps):
    policy, decoding = block_policy(4, "response", torch.float32), BlockDecoding(12, 4, steps, cache=cache)
    passes = block_decoding_passes(decoding, 3, 6 + 12)
    spent = measured(lambda: decoding.generate(policy, prompts_of(3), keys_of(3)))
    assert spent == sum(forward(read_network(str(folder)), passes))
    counted = Counted(policy)
    decoding.generate(counted, prompts_of(3), keys_of(3))
    assert passes.calls == len(counted.passes)
    assert passes.rows * passes.width == pytest.approx(sum(rows * tokens for rows, tokens in counted.passes))


@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("part", [64, 4])
@pytest.mark.parametrize("resumes", [True, False])
def test_flops_of_scoring_are_those_of_the_model(folder, monkeypatch, resumes, part, micro_batch):
    monkeypatch.setattr("espo_lightning.scoring.block.PART", part)
    policy, law = block_policy(4, "response", torch.float32), BlockELBO(2, block=4)
    policy.sharded = not resumes
    masks, completion = law.draw(keys_of(5), 8), torch.full((5, 8), 9)

    def score():
        with torch.no_grad():
            for start in range(0, 5, micro_batch):
                rows = slice(start, start + micro_batch)
                law.log_probs(policy, prompts_of(5).of(rows), completion[rows], masks.of(rows))

    passes = block_scoring_passes(masks, 14, micro_batch, block=4, resumes=resumes)
    assert measured(score) == sum(forward(read_network(str(folder)), passes))


def test_a_real_step(folder, tmp_path):
    """Rollout and scores exactly; of the updates' backward pass, what the last layer skips at clean tokens counts."""
    policy, decoding = block_policy(4, "response", torch.float32), BlockDecoding(8, 4, 8)
    settings = {"decoding": decoding, "likelihood": BlockELBO(2, block=4), "objective": PolicyGradient(beta=0.1)}
    module = Measured(policy, **settings, group_size=4, skip_equal_groups=False)
    fit(module, batches=1, folder=tmp_path)
    rollout = module.last_rollout
    completions, width = len(rollout.completion), rollout.prompts.ids.shape[1] + 8
    expected = work(
        block_decoding_passes(decoding, completions, width),
        rollout.masks,
        updates=module.updates,
        objective=module.objective,
        micro_batch=completions,
        view_by_view=False,
        scoring=partial(block_scoring_passes, block=4),
    )
    spent = flops(read_network(str(folder)), expected)
    for phase in ("rollout", "old scores", "reference"):
        assert spent[phase] == pytest.approx(module.flops[phase], rel=1e-9)
    assert 1 <= spent["updates"] / module.flops["updates"] < 1.1


def test_bytes_of_the_cache_are_counted_bytes(folder):
    policy, stored = block_policy(4, "response", torch.float32), []
    kept = policy.prefix

    def prefix(**options):
        stored.append(kept(**options))
        return stored[-1]

    policy.prefix = prefix
    BlockDecoding(12, 4, 12).generate(policy, prompts_of(3), keys_of(3))
    (store,) = stored
    counted = sum(t.untyped_storage().nbytes() for layer in store.cache.layers for t in (layer.keys, layer.values))
    assert len(store) == 6 + 12 - 4
    assert passes_of(BlockDecoding(12, 4, 12), BlockELBO(block=4), 3, 6, True)[2] == 3 * store.room == 3 * 18
    assert cache_bytes(read_network(str(folder)), 3 * store.room, 4) == counted


def test_the_command_line_knows_blocks(folder):
    settings = {
        "decoding": BlockDecoding(16, 4, 16), "likelihood": BlockELBO(2, block=4), "prompt_length": 6,
        "lora_rank": None, "gpus": (1,), "dtype": "float32",
    }  # fmt: skip
    table = cost(str(folder), **settings)["table"]
    memory = table["GB of memory per GPU"]
    assert memory["cache in the rollout"][0] * 1e9 == cache_bytes(read_network(str(folder)), 12 * 22, 4)
    plain = cost(str(folder), **settings | {"decoding": replace(settings["decoding"], cache=False)})["table"]
    assert plain["PFLOP per GPU"]["rollout"][0] > 1.5 * table["PFLOP per GPU"]["rollout"][0]
    assert "cache in the rollout" not in plain["GB of memory per GPU"]
    sharded = cost(str(folder), **settings | {"gpus": (8,), "shards": None})["table"]
    assert sharded["PFLOP per GPU"]["updates"][0] > table["PFLOP per GPU"]["updates"][0]
    for wrong in ({"decoding": Decoding(16, 4, 16)}, {"likelihood": BlockELBO(2, block=8)}):
        with pytest.raises(ValueError, match="go together, with the same block"):
            cost(str(folder), **settings | wrong)


def test_passes_of_whole_sequences_count_as_they_did():
    some = decoding_passes(Decoding(16, 8, 8), 3, 20)
    assert some.pairs is None
    assert (some + some).attended == 2 * some.attended == 2 * some.rows * 400
    parts = some + Passes(1, 0.5, 20, 1, 7)
    assert parts.pairs == some.attended + 7
    assert (parts * 2).pairs == 2 * parts.pairs
    masks = BlockELBO(block=4).draw(keys_of(4), 8)
    assert scoring_passes(masks, 14, 2).pairs is None
