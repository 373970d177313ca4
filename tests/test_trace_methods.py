"""RTB, GDSD, RSPO, TraFL and SEPO against their official codes and formulas."""

from dataclasses import replace

import pytest
import torch
from trace_method_cases import CLOSE, GOLDEN, cases, gdsd, gradient, loss, one_masked, preset, sepo, tensor

from espo_lightning import (
    Scores,
    k2,
    k2_u,
)

# ---- relative trajectory balance ------------------------------------------------------------------------------------


@cases("objective", "rtb")
@pytest.mark.parametrize("kind", ["variance_per_group", "variance_whole_batch", "fwd_rtb"])
def test_rtb(name, case, kind):
    """Official = ours L / kappa; without the G / (G - 1) of a variance."""
    kappa, group, steps = 1 / case["beta"], case["group"], case["T"]
    new, ref = tensor(case["log_p_theta"])[None].requires_grad_(), tensor(case["log_p_ref"])[None]
    rewards, objective, factor = (
        tensor(case["reward"]),
        replace(preset(name).objective, temperature=kappa),
        steps / kappa,
    )
    if kind == "fwd_rtb":  # with log Z given
        rewards, objective = rewards - kappa * case["log_Z"], replace(objective, centre=False)
    else:
        group = group if kind == "variance_per_group" else len(rewards)
        factor *= (group - 1) / group
    advantages = preset(name).advantage(rewards.view(-1, group)).flatten() if objective.centre else rewards
    ours = factor * loss(objective, new, advantages, group, ref=ref)
    assert ours.item() == pytest.approx(case[kind]["loss"], rel=1e-12)
    expected = tensor(case[kind]["grad_log_p_theta"])
    torch.testing.assert_close(gradient(ours, new)[0], expected.unsqueeze(-1).expand(-1, steps), **CLOSE)


def test_rtb_is_not_what_was_released():
    """Whose sign in front of the mean is another: no variance."""
    for case in GOLDEN["rtb"]["objective"]:
        assert case["released_vargrad_cutoff_0.0"]["loss"] > 2 * case["variance_whole_batch"]["loss"]


# ---- GDSD, RSPO, TraFL ----------------------------------------------------------------------------------------------


@cases("objective", "gdsd", "gdsd_tlc")
def test_gdsd(name, case):
    """Sequence scores, put at one position of the canvas."""
    length, method = case["L"], preset(name)
    objective, factor = gdsd(name, case, length)
    place = torch.zeros(length, dtype=torch.float64)
    place[0] = 1
    new = tensor(case["D_theta"]).requires_grad_()
    old, ref = tensor(case["D_old"]), tensor(case["D_ref"])
    advantages = method.advantages(tensor(case["rewards"]).view(-1, case["group"])).flatten()
    torch.testing.assert_close(advantages, tensor(case["advantages"]), **CLOSE)
    old, ref = (x.unsqueeze(-1) * place for x in (old, ref))
    weight = place.expand_as(old)
    ours = factor * loss(objective, new.unsqueeze(-1) * place, advantages, 1, old, ref, weight)
    assert ours.item() == pytest.approx(case["loss"], rel=1e-12)
    torch.testing.assert_close(gradient(ours, new), tensor(case["grad_D_theta"]), **CLOSE)


@pytest.mark.parametrize("case", GOLDEN["rspo"]["objective"], ids=range(4))
@pytest.mark.parametrize("independent", [False, True])
def test_rspo_has_the_gradient_of_the_formula(case, independent):
    """Centred over the batch here, as there; each draw's coefficient from the others is the product of draws."""
    if independent and "independent_draws" not in case:
        return
    batch, lam, method = case["B"], case["lambda"], preset("rspo")
    square = k2_u if independent else k2
    objective = replace(method.objective, temperature=lam / case["L"], square=square)
    advantages = method.advantages(tensor(case["rewards"]).view(-1, case["group"])).flatten()
    torch.testing.assert_close(advantages, tensor(case["advantages"]), **CLOSE)
    new, ref = tensor(case["score_theta"]).requires_grad_(), tensor(case["score_ref"])
    spread = torch.full((len(new), batch, case["L"]), 1 / case["L"], dtype=torch.float64)
    ours = loss(objective, new.unsqueeze(-1) * spread, advantages, batch, ref=ref.unsqueeze(-1) * spread)
    expected = case["independent_draws"] if independent else case
    ours = gradient(ours * (batch - 1) / batch, new)
    torch.testing.assert_close(ours, tensor(expected["grad_score_theta"]), **CLOSE)


@pytest.mark.parametrize("case", GOLDEN["trafl"]["objective"], ids=range(4))
@pytest.mark.parametrize("kind", ["learnt", "profiled", "pairwise"])
def test_trafl_is_the_formula(case, kind):
    """Official = ours 2 beta / L; with log Z learnt, or profiled out, and squared with or without the mask noise."""
    if kind != "learnt" and kind not in case:
        return
    beta, length, group, method = case["beta"], case["L"], case["group"], preset("trafl")
    assert method.objective.square is k2_u
    objective = replace(method.objective, temperature=1 / beta, square=k2_u if kind == "pairwise" else k2)
    advantages = method.advantages(tensor(case["rewards"]).view(-1, group)).flatten()
    torch.testing.assert_close(advantages, tensor(case["centred_rewards"]), **CLOSE)
    factor, expected = 2 * beta / length, case if kind == "learnt" else case[kind]
    if kind == "profiled":
        factor *= (group - 1) / group
    else:
        objective = replace(objective, centre=False)
        advantages = advantages - length / beta * tensor(case["z"]).repeat_interleave(group)
    new, ref = tensor(case["score_theta"]).requires_grad_(), tensor(case["score_ref"])
    spread = torch.full((*new.shape, length), 1 / length, dtype=torch.float64)
    ours = factor * loss(objective, new.unsqueeze(-1) * spread, advantages, group, ref=ref.unsqueeze(-1) * spread)
    assert ours.item() == pytest.approx(expected["loss"], rel=1e-12, abs=1e-15)
    torch.testing.assert_close(gradient(ours, new), tensor(expected["grad_score_theta"]), **CLOSE)


# ---- SEPO -----------------------------------------------------------------------------------------------------------


@cases("preset", "sepo")
def test_sepo(name, case):
    """Gradients are equal; the loss shows A w where theirs shows A w S."""
    objective, leaf = sepo(case), tensor(case["log_prob_one_masked"]).requires_grad_()
    new, old, ref = (one_masked(case, case[k]) for k in ("log_prob_one_masked", "log_prob_old", "log_prob_ref"))
    weight = case["L"] * one_masked(case, torch.ones_like(leaf))
    advantages = tensor(case["advantages"])  # theirs have no 1e-4 beside the deviation
    torch.testing.assert_close(preset(name).advantages(tensor(case["rewards"])[None])[0], advantages, rtol=5e-4, atol=0)
    scores = Scores(new, old, ref, weight, torch.full((len(advantages),), case["L"]))
    for log_p, key in ((new, "S"), (old, "S_old"), (ref, "S_ref")):
        torch.testing.assert_close(objective.ratio.score(scores, log_p, None), tensor(case[key]), **CLOSE)
    clipped = tensor(case["weight"]).clamp(1 - case["epsilon"], 1 + case["epsilon"])
    torch.testing.assert_close(objective.ratio(scores)[0].squeeze(-1).exp(), clipped, **CLOSE)
    ours = loss(objective, one_masked(case, leaf), advantages, 1, old, ref, weight)
    assert (ours + (advantages * clipped * (1 - tensor(case["S"]))).mean()).item() == pytest.approx(
        case["loss"], rel=1e-12
    )
    torch.testing.assert_close(gradient(ours, leaf), tensor(case["grad_log_prob"]), **CLOSE)
