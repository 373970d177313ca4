"""What two processes hold and exchange, against the formulas of the cost model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_module
from sharded_bytes import RUNS, policy
from two_processes import ENVIRONMENT

from espo_lightning import ELBO, PolicyGradient
from espo_lightning.cost import cost
from espo_lightning.lab.costs import FP32, Hardware, collectives, memory
from espo_lightning.lab.flops import decoding_passes, work
from espo_lightning.lab.network import LLADA_8B, read_network


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    """Bytes of real runs."""
    folder = tmp_path_factory.mktemp("bytes")
    command = [sys.executable, Path(__file__).with_name("sharded_bytes.py"), folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "bytes.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_bytes_of_two_processes(counted, tmp_path, name):
    """To the byte: what either holds, and what it receives of weights and, but for DDP's buckets, of gradients."""
    found, settings = counted[name], RUNS[name][1]
    made, rank = settings.get("policy", policy)(), 2 if "LoRA" in name else 0
    base = made.model.merge_and_unload() if rank else made.model
    base.save_pretrained(tmp_path)
    network = read_network(str(tmp_path))
    w = work(
        decoding_passes(small_module().decoding, 2 * found["group"], found["width"]),
        found["masks"],
        updates=2,
        objective=PolicyGradient(),
        micro_batch=3,
        view_by_view=False,
    )
    shared = {"shards": 1 if name.startswith("ddp") else 2, "rank": rank}
    shared["gather_rollouts"] = settings.get("gather_rollouts", True)
    held = memory(network, w, stored=4, checkpointing=False, **shared)
    if rank and shared["shards"] > 1:
        held["gradients"] /= 2  # looked at after they were reduced
    assert found["held"] == {key: held[key] for key in found["held"]}
    size, _ = collectives(network, w, Hardware(), gpus=2, updates=2, **shared)
    if shared["shards"] > 1:
        assert found["received"]["gathered"] + found["received"]["reduced"] == sum(size.values())
    else:
        assert found["received"] == {"gathered": 0, "reduced": 0}


def small_work(**changes):
    masks = [ELBO().draw(torch.arange(8), 16)] * 2
    options = {"updates": 2, "objective": PolicyGradient(), "micro_batch": 2, "view_by_view": False} | changes
    return work(decoding_passes(small_module().decoding, 8, 20), masks, **options)


def test_stages_of_zero_by_hand():
    """In bytes per trained weight, of float32 weights shared by two: what a stage does not share is whole."""
    network, w = replace(LLADA_8B, layers=2), small_work()
    n = network.parameters
    options = {"stored": FP32, "shards": 2, "checkpointing": False, "gather_rollouts": False}
    for rank, trained in ((0, n), (8, network.adapters(8))):
        of = {zero: memory(network, w, rank=rank, zero=zero, **options) for zero in (1, 2, 3)}
        whole = FP32 * (n + network.adapters(rank))
        assert [of[zero]["weights"] / whole for zero in (1, 2, 3)] == [1, 1, 0.5]
        assert [of[zero]["gradients"] / trained for zero in (1, 2, 3)] == [4, 2, 4 if rank else 2]
        assert [of[zero]["optimizer"] / trained for zero in (1, 2, 3)] == [6, 6, 4]  # with the engine's copy
        assert [of[zero]["reference"] / n for zero in (1, 2, 3)] == ([0, 0, 0] if rank else [4, 4, 2])
        assert of[1]["gathered weights"] == of[2]["gathered weights"] == 0 < of[3]["gathered weights"]
        for zero, reductions in ((1, 2), (2, 8)):  # updates, and backward passes; updated weights once per update
            exchanged, _ = collectives(
                network, w, Hardware(), gpus=2, shards=2, updates=2, rank=rank, gather_rollouts=False, zero=zero
            )
            assert exchanged == {
                "rollout": 0,
                "old scores": 0,
                "reference": 0,
                "updates": 2 * trained * (reductions + 2),
            }


def test_zero_has_an_effect_and_needs_shards():
    settings = {"gpus": (8,), "shards": 8, "lora_rank": None, "dtype": "float32", "micro_batch": 6}
    totals = [cost(**settings, zero=zero)["table"]["GB of memory per GPU"]["total"][0] for zero in (1, 2, 3)]
    assert totals[0] > totals[1] > totals[2]
    with pytest.raises(ValueError, match="zero=2 has no effect with shards=1"):
        cost(zero=2)
