"""Every preset of a method on a small policy: invariants, and the effect of every argument."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from conftest import Letters, small_module
from preset_cases import EACH, first_only, train
from two_processes import METHODS

from espo_lightning import (
    Balance,
    PolicyGradient,
    RandomViews,
    Sandwich,
    by_length,
    k1,
    k2_each,
    sequence_kl,
    token_kl,
    token_ratio,
)

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


@pytest.mark.slow
@EACH
@pytest.mark.parametrize(
    "change", [{"micro_batch": 4}, {"view_by_view": True}, {"micro_batch": 4, "view_by_view": True}], ids=str
)
def test_a_rollout_in_parts_gives_the_same_numbers(name, change):
    whole, metrics = train(**METHODS[name])
    parts, others = train(**METHODS[name], **change)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=2e-6)
    for a, b in zip(metrics.rows, others.rows):
        torch.testing.assert_close(a["train/loss"], b["train/loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4, atol=1e-5)
    assert any(row["train/grad_norm"] > 0 for row in metrics.rows)


@EACH
def test_leaving_out_equal_groups_changes_nothing(name):
    settings = METHODS[name]
    kept, metrics = train(4, **settings, skip_equal_groups=False)
    skipped, others = train(4, **settings, skip_equal_groups=True)
    torch.testing.assert_close(kept, skipped, rtol=1e-4, atol=2e-6)
    assert max(row["train/zero_variance_groups"] for row in metrics.rows) > 0
    if settings["objective"].idle:
        assert any(len(r.completion) < len(r.decoded) for r in others.rollouts)


@EACH
def test_the_first_update_compares_the_policy_with_itself(name):
    settings = METHODS[name] | {"updates": 1}
    if getattr(settings["likelihood"], "rising", False):
        settings["updates"] = 2
    _, metrics = train(1, **settings)
    row = metrics.rows[0]
    if settings["objective"].old:
        assert row["train/log_ratio_max"] == row["train/clip_high"] == 0.0
    else:
        assert "train/log_ratio" not in row


def same_for_all(prompt: str, text: str) -> dict[str, float]:
    return {"reward": 0.1, "exact": 0.0}  # whose float32 mean over a group is not 0.1


@EACH
def test_equal_rewards_have_no_gradient_at_all(name):
    """But for a balance against a reference, whose residual they leave; and it has none before the first update."""
    settings = METHODS[name]
    if getattr(settings["objective"], "beta", 0):
        settings = settings | {"objective": replace(settings["objective"], beta=0.0)}
    _, metrics = train(2, task=Letters(same_for_all), **settings, skip_equal_groups=False)
    assert [row["train/grad_norm"] for row in metrics.rows] == [0.0, 0.0]
    assert all(not r.advantages.any() for r in metrics.rollouts)


@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if isinstance(s["objective"], Balance)])
def test_equal_rewards_leave_a_balance_with_a_gradient(name):
    """A policy that has left its reference is drawn back by completions that all have the same reward."""
    settings, rows = METHODS[name], []
    assert not settings["objective"].idle
    for skip in (False, True):
        task = Letters(partial(first_only, seen=[]))  # rewards in the first rollout, none in the second
        _, metrics = train(2, task=task, **settings | {"updates": 2}, skip_equal_groups=skip)
        rows.append([row["train/grad_norm"] for row in metrics.rows])
        assert metrics.rows[1]["train/zero_variance_groups"] == 1.0
        assert len(metrics.rollouts[1].completion) == len(metrics.rollouts[1].decoded)
    torch.testing.assert_close(*rows)
    assert rows[0][1] > 0 or (settings["objective"].to_old and not settings["objective"].beta)


OTHERS = {  # another value of every argument of every objective and law that a preset has
    "ratio": token_ratio,
    "clip_range": 1e-3,
    "clip_nats": 1e-3,
    "kl": k1,
    "beta": 0.01 / 3,
    "count": by_length,
    "score": Sandwich(0.5, 0.9),
    "cap": 0.1,
    "prompt_noise": 0.6,
    "to_end": False,
    "low": 0.45,
    "high": 0.55,
    "draws": 3,
    "nodes": 2,
    "block": 4,
    "noise": 0.6,
}
TRACED = {  # of those that only methods on traces, and balances, have; the rest are tested above
    "temperature": 0.03,
    "centre": False,
    "square": k2_each,
    "clip_high": 1e-3,
    "kl_at": sequence_kl,
    "merge": 2,
    "entropy": False,
    "weighted": True,
    "draws": 3,
}
PENALISED = PolicyGradient(beta=0.5)
NEW = ("rtb", "sepo", "justgrpo", "tracerl", "agrpo", "egspo", "gdsd", "rspo", "trafl")
ARGUMENTS = [
    (name, where, field.name)
    for name, settings in METHODS.items()
    for where in ("objective", "likelihood")
    for field in fields(settings[where])
    if name not in NEW and field.name in OTHERS and OTHERS[field.name] != getattr(settings[where], field.name)
    if (name, field.name) != ("ebpo", "block")  # the policy's
]
NEW_ARGUMENTS = [
    (name, where, field.name)
    for name in NEW
    for where in ("objective", "likelihood")
    for field in fields(METHODS[name][where])
    if field.name in TRACED and TRACED[field.name] != getattr(METHODS[name][where], field.name)
    if not (METHODS[name]["likelihood"].exact and field.name in ("square", "merge", "draws"))  # refused, or another law
    if (where, field.name) != ("likelihood", "temperature")  # the decoder's
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "argument"), ARGUMENTS)
def test_every_argument_has_an_effect(name, where, argument):
    settings = METHODS[name]
    if argument in ("kl", "count", "kl_at") and settings["objective"].idle and name == "gdpo" and argument != "count":
        settings = settings | {"objective": replace(settings["objective"], beta=0.02)}
    changed = settings | {where: replace(settings[where], **{argument: OTHERS[argument]})}
    same = {"micro_batch": None, "max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    assert not torch.equal(train(3, **settings | same)[0], train(3, **changed | same)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "argument"), NEW_ARGUMENTS)
def test_every_argument_of_the_methods_on_traces_has_an_effect(name, where, argument):
    settings, same = METHODS[name], {"max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    settings = settings | {"updates": 1 if argument == "draws" else max(2, settings["updates"])}
    if argument == "kl_at":
        settings = settings | {"objective": replace(settings["objective"], beta=0.02)}
    changed = settings | {where: replace(settings[where], **{argument: TRACED[argument]})}
    assert not torch.equal(train(2, **settings | same)[0], train(2, **changed | same)[0])


def test_where_the_penalty_is_applied_and_to_what_has_an_effect():
    base = {"objective": PENALISED, "updates": 3}
    for change in ({"kl_at": token_kl}, {"to_old": True}):
        assert not torch.equal(train(**base)[0], train(**base | {"objective": replace(PENALISED, **change)})[0])
    rising = {"likelihood": RandomViews(1, rising=True), "updates": 2}
    assert not torch.equal(train(**rising)[0], train(**rising | {"likelihood": RandomViews(1)})[0])


def test_to_old_needs_no_reference():
    module = small_module(objective=PolicyGradient(beta=0.1, to_old=True))
    assert module.reference is None
    assert not module.objective.idle
