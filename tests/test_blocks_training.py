"""Block policies in training, and the likelihoods that are refused."""

import warnings
from functools import partial

import pytest
import torch
from block_cases import EACH, block_policy, keys_of
from conftest import fit, parameters, small_module
from lightning.pytorch import Callback

from espo_lightning import (
    ELBO,
    BlockDecoding,
    BlockELBO,
    Decoding,
    MeanField,
    PolicyGradient,
    QuadratureELBO,
    RandomViews,
    TimeELBO,
    TokenViews,
    new_policy,
)
from espo_lightning.training.supervised import SFTModule

# ---- training -------------------------------------------------------------------------------------------------------


PRESET = {
    "decoding": BlockDecoding(4, 2, 4),
    "likelihood": BlockELBO(2, block=2),
    "objective": PolicyGradient(beta=0.01),
    "optimizer": partial(torch.optim.SGD, lr=2.0),
}


def small_block_policy(origin: str = "global"):
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, block=2, origin=origin)


class Metrics(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def train(batches: int = 2, origin: str = "global", task=None, policy=None, **settings):
    module, metrics = small_module(policy or small_block_policy(origin), **PRESET | settings), Metrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the gradient is NaN or infinite")
        fit(module, batches, task=task, callbacks=[metrics])
    return parameters(module), metrics.rows


@pytest.mark.usefixtures("global_generators_untouched")
@EACH
@pytest.mark.parametrize(
    "change", [{"micro_batch": 4}, {"view_by_view": True}, {"micro_batch": 4, "view_by_view": True}], ids=str
)
def test_a_rollout_in_parts_gives_the_same_numbers(change, origin):
    whole, rows = train(origin=origin)
    parts, others = train(origin=origin, **change)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=2e-6)
    for a, b in zip(rows, others):
        torch.testing.assert_close(a["train/loss"], b["train/loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4, atol=1e-5)
    assert any(row["train/grad_norm"] > 0 for row in rows)


def test_the_first_update_compares_the_policy_with_itself():
    _, rows = train(1, updates=1)
    assert rows[0]["train/log_ratio_max"] == rows[0]["train/clip_high"] == 0.0


def test_leaving_out_equal_groups_changes_nothing():
    free = {"objective": PolicyGradient(beta=0.0)}
    kept, rows = train(4, **free, skip_equal_groups=False)
    skipped, _ = train(4, **free, skip_equal_groups=True)
    torch.testing.assert_close(kept, skipped, rtol=1e-4, atol=2e-6)
    assert max(row["train/zero_variance_groups"] for row in rows) > 0


@EACH
def test_a_block_policy_learns(origin):
    adam = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "group_size": 8}
    _, rows = train(40, origin=origin, **adam)
    rewards = [row["train/reward"] for row in rows]
    assert sum(rewards[-5:]) / 5 > 0.8 > 0.3 > sum(rewards[:3]) / 3


@EACH
def test_supervised_training_teaches_a_block_policy(origin):
    policy = small_block_policy(origin)
    module = SFTModule(policy, 4, BlockELBO(block=2), partial(torch.optim.Adam, lr=1e-2))
    fit(module, 60)
    prompts = policy.encode(["a", "abc"])
    completion = BlockDecoding(4, 2, 4, 0.0).generate(policy.eval(), prompts, keys_of(2))
    assert policy.decode(completion) == ["aaaa", "aaaa"]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "likelihood", "length", "message"),
    [
        (lambda: new_policy(), BlockELBO(block=4), 8, "BlockELBO needs a block-causal policy, but .* full attention"),
        (lambda: new_policy(causal=True), BlockELBO(block=4), 8, "the policy is a causal model, which cannot denoise"),
        (lambda: block_policy(4), BlockELBO(block=8), 8, "likelihood.block is 8, but the policy has .* set it to 4"),
        (lambda: block_policy(4), BlockELBO(block=4), 10, "block 4 does not divide the canvas of 10 tokens"),
        *(
            (lambda: block_policy(4), likelihood, 8, "hides positions of all blocks at once.*BlockELBO with block 4")
            for likelihood in (ELBO(), TimeELBO(), QuadratureELBO(), MeanField(), TokenViews(), RandomViews())
        ),
    ],
)
def test_likelihoods_that_do_not_fit_the_policy_are_refused(policy, likelihood, length, message):
    policy = policy()
    with pytest.raises(ValueError, match=message):
        likelihood.check(policy, length)
    with pytest.raises(ValueError, match=message):
        SFTModule(policy, length, likelihood)


def test_nonsense_is_refused_by_the_constructor():
    for settings, message in (
        ({"block": 0}, "block must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"smallest_count": 1}, "coupled masks need counts uniform on 0..L"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockELBO(**settings)


def test_a_module_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match="use BlockDecoding"):
        small_module(small_block_policy(), **PRESET | {"decoding": Decoding(4, 2, 4)})
    with pytest.raises(ValueError, match="use likelihood=BlockELBO with block 2"):
        small_module(small_block_policy(), **PRESET | {"likelihood": ELBO()})
