"""JustGRPO, TraceRL, AGRPO and EGSPO against their official codes."""

from dataclasses import replace

import pytest
import torch
from trace_method_cases import CLOSE, GOLDEN, bits, cases, drawn, gradient, loss, preset, tensor

from espo_lightning import (
    Seen,
    Trace,
    Trajectory,
    k1,
    z_score,
)


@cases("objective", "justgrpo")
def test_justgrpo(name, case):
    """Official = ours B / (number of completions with an advantage); every token is a draw of its own."""
    group, batch, length, method = case["group"], case["B"], case["L"], preset(name)
    order = torch.arange(batch).view(group, -1).T.flatten()  # theirs: completion g of prompt q is row g Q + q
    rewards = tensor(case["rewards"])[order].view(-1, group)
    torch.testing.assert_close(method.advantages(rewards).flatten(), tensor(case["advantages"])[order], **CLOSE)
    leaf = tensor(case["log_prob"])[order].requires_grad_()
    each = torch.eye(length, dtype=torch.float64).unsqueeze(1)  # [M, 1, L]
    new, weight = leaf * each, length * each.expand(-1, batch, -1)
    value, _ = method.loss(new, new.detach(), None, weight, torch.full((batch,), length), rewards)
    ours = gradient(value * batch / (case["valid"] + 1e-5), leaf)
    torch.testing.assert_close(ours, tensor(case["grad_log_prob"])[order], **CLOSE)


@cases("objective", "tracerl")
def test_tracerl(name, case):
    """A row of theirs as a completion of one draw."""
    objective = replace(preset(name).objective, clip_range=case["epsilon"], beta=case["beta"])
    objective = objective if case["k3"] else replace(objective, kl=k1)
    new, old = tensor(case["log_prob"])[None].requires_grad_(), tensor(case["log_prob_old"])[None]
    ours = loss(objective, new, tensor(case["advantages"]), 1, old, weight=bits(case["scored"])[None])
    assert ours.item() == pytest.approx(case["loss"], rel=1e-12)
    torch.testing.assert_close(gradient(ours, new)[0], tensor(case["grad_log_prob"]), **CLOSE)


def test_advantages_of_tracerl():
    for case in GOLDEN["tracerl"]["advantage"]:
        ours = z_score(tensor(case["rewards"])[None])[0]
        torch.testing.assert_close(ours, tensor(case["advantages"]), rtol=1e-12, atol=1e-12)


@cases("objective", "agrpo")
def test_agrpo(name, case):
    """Official = ours B / G, with weights of L times theirs, in the place of theirs times the number of steps."""
    objective = replace(preset(name).objective, clip_range=case["epsilon"], beta=case["beta"])
    masks, group = drawn(case, case["C"]), case["group"]
    leaf = tensor(case["log_prob"]).requires_grad_()
    old, ref = (tensor(case[f"log_prob_{kind}"]).expand_as(masks.weight) for kind in ("old", "ref"))
    advantages = preset(name).advantages(tensor(case["rewards"]).view(-1, group)).flatten()
    torch.testing.assert_close(advantages, tensor(case["advantages"]), **CLOSE)
    ours = loss(objective, leaf.expand_as(masks.weight), advantages, 1, old, ref, masks.weight) * case["B"] / group
    assert ours.item() == pytest.approx(case["loss"], rel=1e-12)
    torch.testing.assert_close(gradient(ours, leaf), tensor(case["grad_log_prob"]), **CLOSE)


@cases("objective", "agrpo")
def test_agrpos_importance_weights_are_ours_over_the_number_of_steps(name, case):
    """Where theirs ends with the canvas."""
    last = tensor(case["last_step"], torch.int64)
    steps, nats = tensor(case["steps"], torch.int64), tensor(case["entropy"])
    rows = (last == steps.amax(1)).nonzero().squeeze(1)
    assert len(rows)
    entropy = case["importance"] == "entropy"
    law = Trajectory(draws=64, entropy=entropy)
    seen = Seen.whole(rows, steps.shape[1])._replace(trace=Trace(steps[rows], nats[rows]))
    weight = law.masks(rows, seen).weight.amax(-1)  # of each draw's step
    step = torch.where(law.masks(rows, seen).weight != 0, steps[rows], -1).amax(-1)
    official = tensor(case["importance_weights"])[rows] * (last[rows] + 1).unsqueeze(-1)
    compared = 0
    for row, i in enumerate(rows.tolist()):
        for draw, s in enumerate(case["drawn_steps"][i]):
            mine = weight[:, row][step[:, row] == s]
            if len(mine):
                torch.testing.assert_close(mine[0].double(), official[row, draw], rtol=1e-6, atol=1e-6)
                compared += 1
    assert compared


@cases("objective", "egspo")
def test_egspo(name, case):
    """Every selected step is an update; its score is put on its tokens in equal parts. Exact KLs are left out."""
    if case["exact_kl"]:
        assert len(GOLDEN["egspo"]["objective"]) == 6
        return
    tokens = case["tokens_per_step"] if case["aggregation"] == "sum" else 1
    changes = {"clip_range": case["epsilon_low"], "clip_high": case["epsilon_high"], "beta": case["beta"]}
    objective = replace(preset(name).objective, **changes)
    for k in range(case["K"]):
        leaf = tensor(case["step_log_prob"][k]).requires_grad_()
        new, old, ref = (
            (x.unsqueeze(-1) / tokens).expand(-1, tokens)[None]
            for x in (leaf, tensor(case["step_log_prob_old"][k]), tensor(case["step_log_prob_ref"][k]))
        )
        ours = loss(objective, new, tensor(case["advantages"])[:, k], 1, old, ref)
        assert ours.item() == pytest.approx(case["loss_per_step"][k], rel=1e-12)
        torch.testing.assert_close(gradient(ours, leaf), tensor(case["grad_step_log_prob"][k]), **CLOSE)
