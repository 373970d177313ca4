"""Where the host waits for the device: a table of what is allowed and why, counted on a device that is pretended.

A GPU computes what it was sent while the host sends more; every question of the host ends that. Counted are copies in
either direction, answers (`.item()`, `bool(tensor)`) and shapes that depend on data (`nonzero`, boolean indexing). What
a rollout asks once, after its last step, costs nothing: nobody would have anything to send.
"""

from typing import NamedTuple

import pytest
import torch
from conftest import fit, parameters, small_module
from pretend_device import DEVICE, Away, Pretended, move
from pretend_runs import most, strategy, watch

from espo_lightning import (
    ELBO,
    AutoregressiveDecoding,
    BlockDecoding,
    Decoding,
    MeanField,
    PolicyGradient,
    Trajectory,
    new_policy,
)
from espo_lightning import keys as keys_module
from espo_lightning.decoding.orders import entropy_order, left_to_right, margin_order, random_order
from espo_lightning.decoding.schedules import dream_schedule, origin_schedule
from espo_lightning.decoding.steps import step_noise, steps_noise
from espo_lightning.keys import fold_in
from espo_lightning.scoring.block import BlockELBO
from espo_lightning.scoring.likelihood import Autoregressive, QuadratureELBO

FINITE = "once: are all logits finite?"
RAGGED = "the number of hidden positions depends on the data: one question a step says what is left in every row"
CACHE = "transformers makes a cache of two tensors a layer out of lists, once per block"


class Allowed(NamedTuple):
    """Waits of a rollout: once, for every block, for every step; and why."""

    once: int
    block: int
    step: int
    why: str


def decoding(cls=Decoding, block_length: int = 4, **settings):
    return cls(8, block_length, 8, **settings)


LAYERS, PROMPTS = 2, ["abc", "defg", "h", "ij"]
DECODING = {  # name: decoder, what it decodes, what is allowed
    "confidence": (decoding(), {}, Allowed(1, 0, 0, FINITE)),
    "greedy": (decoding(temperature=0.0), {}, Allowed(1, 0, 0, FINITE)),
    "random order": (decoding(order=random_order), {}, Allowed(1, 0, 0, FINITE)),
    "from the left": (decoding(order=left_to_right), {}, Allowed(1, 0, 0, FINITE)),
    "entropy, top-p": (decoding(order=entropy_order, top_p=0.9), {}, Allowed(1, 0, 0, FINITE)),
    "margin, drawn": (decoding(order=margin_order, order_temperature=0.5), {}, Allowed(1, 0, 0, FINITE)),
    "Dream's schedule": (decoding(block_length=8, schedule=dream_schedule), {}, Allowed(1, 0, 0, FINITE)),
    "corrector": (decoding(corrector=3), {}, Allowed(1, 0, 0, FINITE)),
    "prefix cache": (decoding(prefix_cache=True), {}, Allowed(1, 2 * LAYERS, 0, CACHE)),
    "dual cache": (decoding(prefix_cache=True, dual_cache=True), {}, Allowed(1, 2 * LAYERS, 0, CACHE)),
    "prefix cache, anew every two steps": (
        decoding(prefix_cache=True, refresh=2),
        {},
        Allowed(1, 4 * LAYERS, 0, f"{CACHE}, here twice a block"),
    ),
    "origin": (decoding(block_length=8, order=random_order, schedule=origin_schedule), {}, Allowed(1, 0, 1, RAGGED)),
    "threshold": (decoding(threshold=0.5), {}, Allowed(1, 0, 1, RAGGED)),
    "early stop": (decoding(early_stop=True), {}, Allowed(1, 0, 1, RAGGED)),
    "blocks": (
        decoding(BlockDecoding),
        {"block": 4, "origin": "response"},
        Allowed(1 + 2 * LAYERS, 1, 0, f"{CACHE}, here once; and for every block, whether all of it is seen"),
    ),
    "blocks, threshold": (
        decoding(BlockDecoding, threshold=0.5),
        {"block": 4, "origin": "response"},
        Allowed(1 + 2 * LAYERS, 3 + 2 * LAYERS, 2, f"{RAGGED}; fewer rows are another cache, and another view of it"),
    ),
    "blocks from the prompt's first token": (
        decoding(BlockDecoding),
        {"block": 4, "origin": "global"},
        Allowed(1 + 2 * LAYERS, 3 + 2 * LAYERS, 2, "as with a threshold: blocks lie differently in every row"),
    ),
    "causal": (
        AutoregressiveDecoding(8),
        {"causal": True},
        Allowed(2 + 2 * LAYERS, 0, 0, f"{CACHE}, here once; and every 8 tokens, whether a text is still going on"),
    ),
}


def small(**settings):
    """A policy with attention that is written in torch, as fused kernels know no pretended device."""
    policy = new_policy(hidden_size=16, layers=LAYERS, heads=2, intermediate_size=24, **settings)
    policy.model.set_attn_implementation("eager")
    return policy


@pytest.mark.parametrize("name", DECODING)
def test_a_rollout_waits_where_the_table_says(name):
    decoder, made, allowed = DECODING[name]
    policy, passes = small(**made), []
    keys = fold_in(3, torch.arange(len(PROMPTS)))
    policy.register_forward_hook(lambda *_: passes.append(1))
    expected = decoder.generate(policy, policy.encode(PROMPTS), keys)
    with Pretended() as device:
        policy = move(small(**made))
        prompts, keys = policy.encode(PROMPTS), Away(keys)
        device.record.waits.clear()
        completion = decoder.generate(policy, prompts, keys)
    blocks = getattr(decoder, "blocks", 1) + (made.get("origin") == "global")
    assert device.record.waited <= allowed.once + allowed.block * blocks + allowed.step * len(passes), (
        f"{dict(device.record.waits)} in {len(passes)} passes; allowed: {allowed}"
    )
    assert completion.device == DEVICE
    assert torch.equal(completion.held, expected)


class Phases(NamedTuple):
    """Waits of one call of each phase of a training step, at most; and why."""

    complete: int
    judge_and_score: int
    score: int
    update: int
    why: str


# complete: prompts and their padding go to the device, and FINITE. judge_and_score, where the host judges what it was
# sent: completions, rewards, whether they are finite and which groups count, and the shape of every set of masks.
# update: whether the gradient is finite, before the step, and the weights, after it.
ESPO = Phases(3, 8, 0, 2, "whether the gradient is finite, before the step; whether the weights are, after it")
TRAINING = {
    "ESPO": ({}, {}, ESPO),
    "two draws in micro-batches": ({"likelihood": ELBO(draws=2), "micro_batch": 3}, {}, ESPO),
    "view by view": ({"view_by_view": True, "likelihood": ELBO(draws=2)}, {}, ESPO),
    "masks once": ({"fresh_masks": False, "objective": PolicyGradient(beta=0.0)}, {}, ESPO),
    "mean field, prompts noisy": ({"likelihood": MeanField(prompt_noise=0.2, to_end=True)}, {}, ESPO),
    "quadrature": ({"likelihood": QuadratureELBO()}, {}, ESPO._replace(judge_and_score=12)),
    "trajectory": ({"likelihood": Trajectory(), "decoding": Decoding(4, 4, 4)}, {}, ESPO),
    "blocks": (
        {"decoding": BlockDecoding(4, 4, 4), "likelihood": BlockELBO(block=4)},
        {"block": 4, "origin": "response"},
        Phases(12, 8, 12, 16, "parts of a canvas have rows that are counted where they are scored"),
    ),
    "GRPO, causal": (
        {"decoding": AutoregressiveDecoding(4), "likelihood": Autoregressive()},
        {"causal": True},
        Phases(10, 9, 1, 3, "as ESPO, and how many tokens the completions have, in every pass"),
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_waits_where_the_table_says(name):
    settings, made, allowed = TRAINING[name]
    on_cpu = small_module(small(**made), **settings)
    fit(on_cpu, batches=1)
    with Pretended() as device:
        module = small_module(move(small(**made)), **settings)
        noted = watch(module, device)
        fit(module, batches=1, **strategy())
    counted = {phase: most(noted, phase) for phase in Phases._fields[:-1]}
    over = {phase: n for phase, n in counted.items() if n > getattr(allowed, phase)}
    assert not over, f"{over}; allowed: {allowed}; {noted}"
    assert {phase for phase, _ in noted} >= {"complete", "judge_and_score", "update"}
    assert most(noted, "log_step") <= 40  # when all is done: the sums at once, then one copy for each of Lightning's
    assert module.last_rollout.completion.device == DEVICE
    assert torch.equal(parameters(module), parameters(on_cpu))  # Lightning has brought them to the host


@pytest.mark.parametrize("name", ["ESPO", "mean field, prompts noisy", "quadrature", "trajectory", "GRPO, causal"])
def test_training_needs_no_float64(monkeypatch, name):
    """As on Apple's GPUs, which know none."""
    settings, made, _ = TRAINING[name]
    monkeypatch.setattr(keys_module, "NO_FLOAT64", (DEVICE.type,))
    with Pretended(float64=False):
        module = small_module(move(small(**made)), **settings)
        fit(module, batches=1, **strategy())
    assert module.last_rollout.completion.device == DEVICE
    assert parameters(module).isfinite().all()


@pytest.mark.parametrize("steps", [1, 16, 37])
def test_noise_of_many_steps_is_that_of_each(steps):
    keys, places = fold_in(5, torch.arange(3)), torch.arange(4, 8).unsqueeze(0)
    noise = steps_noise(keys, range(10, 10 + steps), places, 8)
    for number in range(10, 10 + steps, 3):  # some are left out
        assert torch.equal(noise(number), step_noise(keys, number, places, 8))


def test_most_noise_is_sent_once_for_many_steps():
    policy, keys = small(), torch.arange(2)
    with Pretended() as device:
        steps_noise(Away(keys), range(16), torch.arange(4, device=DEVICE).unsqueeze(0), 8)(0)
        together, device.record.sent = device.record.sent, 0
        for number in range(16):
            step_noise(Away(keys), number, torch.arange(4, device=DEVICE).unsqueeze(0), 8)
    assert 8 * together < device.record.sent
    assert policy.device.type == "cpu"


# ---- the device itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.index_put((x > 0,), x[:1].expand(2)), 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
        (lambda x: torch.zeros(3).to(x.device), 1),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 0),
        (lambda x: x.new_full((), 3.0) + torch.arange(3, device=x.device), 0),
        (lambda x: torch.where(x > 0, x, 0.0).masked_scatter(x > 0, x), 0),
        (lambda x: x[torch.nonzero_static(x > 0, size=2).squeeze(1)], 0),
        (lambda x: x.sum() * torch.tensor(2.0), 0),  # a number of the host goes along with what is sent
    ],
)
def test_the_device_notes_what_is_waited_for(ask, waits):
    with Pretended() as device:
        ask(Away(torch.tensor([1.0, -1.0, 2.0])))
    assert device.record.waited == waits


def test_the_device_refuses_tensors_of_the_host():
    with Pretended(), pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        Away(torch.ones(3)) + torch.ones(3)
    with Pretended(float64=False), pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64, device=DEVICE)
