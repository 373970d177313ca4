"""The cost model of approximate caches against what really runs."""

from dataclasses import replace

import pytest
from cache_cases import BASE, CACHED
from decoding_cases import keys_of, peaky_policy, some_prompts
from torch.utils.flop_counter import FlopCounterMode

from espo_lightning import Decoding, Policy
from espo_lightning.cost import cost, passes_of
from espo_lightning.lab.costs import BF16, Hardware, read_bytes
from espo_lightning.lab.flops import decoding_passes, forward
from espo_lightning.lab.flops_blocks import cache_bytes
from espo_lightning.lab.network import read_network
from espo_lightning.lab.studies.compute import ATTENTION
from espo_lightning.scoring.likelihood import ELBO

ROWS, PROMPT = 3, 5
PLAIN = {**CACHED, "prefix cache": BASE, "corrector": replace(BASE, corrector=2)}
PLAIN = {name: replace(decoding, threshold=None, early_stop=False) for name, decoding in PLAIN.items()}


@pytest.fixture(scope="module", params=[0, 1], ids=["LLaDA's heads", "Dream's heads"])
def policy(request) -> Policy:
    base = peaky_policy(3)
    base.model.config.logits_shift = request.param
    return Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=request.param).eval()


@pytest.fixture(scope="module")
def network(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy.save(folder)
    return read_network(str(folder))


@pytest.mark.parametrize("decoding", PLAIN.values(), ids=PLAIN)
def test_flops_of_decoding_are_those_of_the_model(policy, network, decoding):
    passes = decoding_passes(decoding, ROWS, PROMPT + 12, network.shift)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        decoding.generate(policy, some_prompts(ROWS, PROMPT), keys_of(1, ROWS))
    assert network.shift == policy.shift
    assert counter.get_total_flops() == pytest.approx(sum(forward(network, passes)), rel=1e-12)
    full = replace(decoding, prefix_cache=False, refresh=None, dual_cache=False)
    whole = decoding_passes(full, ROWS, PROMPT + 12)
    assert passes.calls == whole.calls
    assert passes.known + passes.rows * passes.width == pytest.approx(whole.rows * whole.width)
    refreshed = decoding_passes(replace(decoding, refresh=1), ROWS, PROMPT + 12, network.shift)
    assert sum(forward(network, refreshed)) == sum(forward(network, whole))


@pytest.mark.parametrize("dual", [False, True])
def test_bytes_of_the_cache_are_counted_bytes(policy, network, dual, monkeypatch):
    """Of all positions: the prefix is a part of what the full pass stored."""
    made, decoding = [], replace(BASE, dual_cache=dual)
    kept = policy.prefix
    monkeypatch.setattr(policy, "prefix", lambda *places, **more: made.append(kept(*places, **more)) or made[-1])
    decoding.generate(policy, some_prompts(ROWS, PROMPT), keys_of(1, ROWS))
    assert len(made) == decoding.blocks
    cached = passes_of(decoding, ELBO(), ROWS, PROMPT, True).cached
    for store in made:
        layers = store.cache.layers
        counted = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
        assert counted == cache_bytes(network, cached, policy.model.dtype.itemsize)
    assert passes_of(replace(decoding, prefix_cache=False, dual_cache=False), ELBO(), ROWS, PROMPT, True).cached == 0


def test_what_is_read_by_hand(network):
    """Weights in each of 12 passes; of 17 tokens, those that a pass does not compute: a prefix of 5, 9 and 13."""
    passes = decoding_passes(BASE, ROWS, 17)
    assert passes.known == ROWS * 3 * (5 + 9 + 13)
    keys = 2 * network.layers * network.kv_heads * network.head_dim * passes.known
    assert read_bytes(network, passes) == BF16 * (12 * network.parameters + keys)


def test_the_command_line_knows_caches():
    settings = {"gpus": (8,), "decoding": Decoding(256, 32, 128)}
    full, prefix, dual = (
        cost(**settings | {"decoding": replace(settings["decoding"], **changes)})["table"]
        for changes in ({}, {"prefix_cache": True}, {"prefix_cache": True, "dual_cache": True})
    )
    rollouts = [table["PFLOP per GPU"]["rollout"][0] for table in (full, prefix, dual)]
    assert rollouts[0] > 1.5 * rollouts[1] > 1.5 * rollouts[2]
    assert "cache in the rollout" not in full["GB of memory per GPU"]
    reading = "reading, rollout"
    assert dual["seconds"][reading][0] > prefix["seconds"][reading][0] > full["seconds"][reading][0]
    halved = cost(**settings, hardware=Hardware(memory=3350 / 2))["table"]["seconds"][reading][0]
    assert halved == pytest.approx(2 * full["seconds"][reading][0])
