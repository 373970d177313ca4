"""What the training module refuses, and gradients that are not finite."""

import math
from pathlib import Path

import pytest
import torch
from conftest import Letters, fit, parameters, small_module
from lightning.pytorch import Callback
from module_cases import Record, run

from espo_lightning import (
    ELBO,
    Decoding,
    PolicyGradient,
    k2_u,
    own_length_ratio,
    sequence_ratio,
    undivided_ratio,
)

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"updates": 0}, "updates and micro_batch must be at least 1"),
        ({"micro_batch": 0}, "updates and micro_batch must be at least 1"),
        ({"clip_range": None}, "give clip_range or clip_nats"),
        ({"clip_range": -0.1}, "clip_range must be 0 or positive"),
        ({"clip_nats": math.nan}, "clip_nats must be 0 or positive"),
        ({"clip_nats": 1.0, "ratio": own_length_ratio}, "by which ratio=own_length_ratio does not divide"),
        ({"clip_nats": 1.0, "ratio": undivided_ratio}, "by which ratio=undivided_ratio does not divide"),
        ({"beta": -1.0}, "beta must be 0"),
        ({"compile": "nothing"}, "compile must be one of"),
        ({"kl": k2_u}, "independent mask draws"),
        ({"kl": k2_u, "likelihood": ELBO(draws=4, stratified=True)}, "independent mask draws"),
        ({"beta": 0, "reference_sync": 2}, "no effect with beta=0"),
        ({"decoding": Decoding(4, 4, 4, temperature=0.0)}, "temperature is 0"),
    ],
)
def test_contradictions_raise_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        small_module(**settings)


def test_a_prompt_that_is_too_long_raises_and_names_it():
    with pytest.raises(ValueError, match=r"a prompt has 5 tokens, more than max_prompt_length=4.*'abc'"):
        fit(small_module(max_prompt_length=4))


def raises_on_a(prompt, text):
    if "a" in text:
        raise KeyError("broken")
    return {"reward": 0.5, "exact": 0.0}


def nan_on_a(prompt, text):
    return {"reward": math.nan if "a" in text else 0.5, "exact": 0.0}


@pytest.mark.parametrize("verify", [raises_on_a, nan_on_a])
def test_a_failing_verifier_costs_one_completion_its_reward_and_nothing_else(verify):
    with pytest.warns(UserWarning, match="the completion gets reward 0"):
        record = run(small_module(group_size=16), task=Letters(verify))
    rollout = record.rollouts[0]
    failed = torch.tensor([v["failed"] for v in rollout.verdicts])
    assert 0 < failed.sum() < len(failed)
    assert torch.equal(rollout.rewards.flatten(), 0.5 * (1 - failed))
    assert record.metrics[0]["reward/failed"] == pytest.approx(float(failed.mean()))


class Poison(Callback):
    """Makes the gradient NaN in some rollouts."""

    def __init__(self, rollouts):
        self.rollouts = rollouts

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        poisoned = batch_idx in self.rollouts
        module.objective = PolicyGradient(ratio=_nan_ratio if poisoned else sequence_ratio)


def _nan_ratio(scores):
    log_ratio, weight = sequence_ratio(scores)
    return log_ratio * math.nan, weight


def test_a_nan_gradient_skips_the_update_and_is_counted(tmp_path):
    module, record = small_module(), Record()
    with pytest.warns(UserWarning, match="the gradient is NaN or infinite"):
        trainer = fit(module, 3, folder=tmp_path, callbacks=[Poison({1}), record])
    assert [m["train/skipped_updates"] for m in record.metrics] == [0, 1, 0]
    assert torch.equal(record.before[1], record.before[2])  # nothing was applied
    assert not torch.equal(record.before[2], parameters(module))
    assert trainer.global_step == 6  # skipped updates count: checkpoints and schedules stay in step
    saved = torch.load(tmp_path / "nonfinite_rollout_1_rank0.pt")
    assert torch.equal(saved["completion"], record.rollouts[1].completion)


def test_too_many_nan_gradients_stop_the_run_with_advice(tmp_path):
    module = small_module(max_skipped=3)
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(FloatingPointError, match=r"4 updates in a row .* lower the learning rate"),
    ):
        fit(module, 4, folder=tmp_path, callbacks=[Poison(range(9))])
    assert len(list(Path(tmp_path).glob("nonfinite_rollout_*"))) == 2
