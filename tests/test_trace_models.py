"""Methods on traces on a tiny model against the official codes."""

import math
from dataclasses import replace

import pytest
import torch
from checkpoints import golden_folder
from trace_method_cases import NAMES, NEAR, PARTS, bits, cases, drawn, gdsd, loss, one_masked, preset, sepo, tensor

from espo_lightning import (
    ELBO,
    Balance,
    Masks,
    OneMasked,
    Prompts,
    Seen,
    Trace,
    Trajectory,
    load_policy,
    log_probs,
)
from espo_lightning.scoring.score import token_log_probs
from espo_lightning.scoring.trajectory import trace_masks

# ---- GDSD, RSPO, TraFL ----------------------------------------------------------------------------------------------


def over_positions(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [M, B, L] whose weighted sums are [M, B]."""
    scored = weight != 0
    return torch.where(scored, total.unsqueeze(-1) / weight / scored.sum(-1, keepdim=True), 0.0)


# ---- the tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden_folder(tmp_path_factory.mktemp("golden") / "tiny", "tiny.safetensors")


TO_LLADA = {
    "model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out", "model.layers": "model.transformer.blocks", "self_attn.o_proj": "attn_out",
    "self_attn.": "", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "mlp.gate_proj": "ff_proj",
    "mlp.down_proj": "ff_out", "mlp.up_proj": "up_proj",
}  # fmt: skip


def assert_norms(policy, value: torch.Tensor, expected: dict) -> None:
    policy.zero_grad()
    value.backward()
    for name, parameter in policy.model.named_parameters():
        for ours, theirs in TO_LLADA.items():
            name = name.replace(ours, theirs)
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert norm == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def prompts_of(case: dict, rows: int) -> Prompts:
    ids = tensor(case["prompts"] if "prompts" in case else [case["prompt"]], torch.int64)
    return Prompts(ids.expand(rows, -1), None)


@cases("model", "rtb")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rtb_of_a_model(name, case, temperature, folder):
    """The law of the sampler, from the masks that the trace gives."""
    policy, law = load_policy(folder), replace(preset(name).likelihood, temperature=temperature)
    completion, steps = (tensor(case[key], torch.int64) for key in ("completion", "steps"))
    seen = Seen.whole(torch.arange(6), 8)._replace(trace=Trace(steps, torch.ones(6, 8)))
    masks = law.masks(seen.keys, seen)
    new = law.log_probs(policy, prompts_of(case, 6), completion, masks)
    expected = case["mask_forbidden" if temperature == 1 else "mask_forbidden_temperature_0.7"]
    each = new.sum(0)  # every position is scored in one state
    torch.testing.assert_close(each.double(), tensor(expected["log_prob"]), **NEAR)
    ref = torch.where(masks.weight != 0, tensor(expected["log_prob_ref"]).float(), 0.0)
    objective, group = replace(preset(name).objective, temperature=case["kappa"]), case["group"]
    rewards = tensor(case["reward"]).float()
    residual = (each.detach() - tensor(expected["log_prob_ref"]).float()).sum(-1) - rewards / case["kappa"]
    torch.testing.assert_close(residual.double(), tensor(expected["residual_without_log_Z"]), rtol=1e-5, atol=1e-4)
    advantages = preset(name).advantages(rewards.view(-1, group)).flatten()
    factor = 8 / case["kappa"] * (group - 1) / group
    value = factor * loss(objective, new, advantages, group, ref=ref, weight=masks.weight)
    assert value.item() == pytest.approx(expected["variance_loss"], rel=1e-4)
    assert_norms(policy, value, expected["grad_norms"])


@cases("model", "gdsd", "gdsd_tlc")
def test_gdsd_of_a_model(name, case, folder):
    policy, batch = load_policy(folder), len(case["completion"])
    hidden = bits(case["hidden"])
    k = hidden.sum(-1, keepdim=True)
    weight = 0.5 * torch.where(hidden, 9 / k.clamp(min=1), 9 / (8 - k).clamp(min=1)) if name == "gdsd_tlc" else 0.5
    masks = Masks(hidden, torch.as_tensor(weight).expand(hidden.shape).float(), True)
    like = ELBO(case["M"], weighted=name == "gdsd_tlc").draw(torch.arange(50), 8)  # weights are those of the preset
    if name == "gdsd":
        assert (like.weight == 0.5).all()
    new = log_probs(policy, prompts_of(case, batch), tensor(case["completion"], torch.int64), masks)
    torch.testing.assert_close((new * masks.weight).sum(-1).double(), tensor(case["D_theta"]), **NEAR)
    objective, factor = gdsd(name, case, 8)
    # the ratio is of the order of 1e-5 nats in a case: the recorded old scores go with recorded new ones
    drift = ((new * masks.weight).sum(-1).detach() - tensor(case["D_theta"]).float()).double()
    old, ref = (over_positions((tensor(case[key]) + drift).float(), masks.weight) for key in ("D_old", "D_ref"))
    advantages = preset(name).advantages(tensor(case["rewards"])[None])[0].float()
    value = factor * loss(objective, new, advantages, 1, old, ref, masks.weight)
    assert value.item() == pytest.approx(case["loss"], rel=1e-4)
    assert_norms(policy, value, case["grad_norms"])


@cases("preset", "sepo")
def test_sepo_of_a_model(name, case, folder):
    policy, batch = load_policy(folder), len(case["completion"])
    hidden = one_masked(case, torch.ones(batch, len(case["positions"][0]))).bool()
    masks = Masks(hidden, case["L"] * hidden.float(), False)
    every = OneMasked(None).draw(torch.arange(batch), case["L"])
    assert torch.equal(masks.weight.amax(-1).unique(), every.weight.amax(-1).unique())
    law = preset(name).likelihood
    new = law.log_probs(policy, prompts_of(case, batch), tensor(case["completion"], torch.int64), masks)
    expected = one_masked(case, case["log_prob_one_masked"])
    torch.testing.assert_close(new.double(), expected, **NEAR)
    old, ref = (one_masked(case, case[f"log_prob_{kind}"]).float() for kind in ("old", "ref"))
    advantages = tensor(case["advantages"]).float()
    value = loss(sepo(case), new, advantages, 1, old, ref, masks.weight)
    assert_norms(policy, value, case["grad_norms"])


@cases("model", "justgrpo")
def test_justgrpo_of_a_model(name, case, folder):
    """States from the left; their law has the mask token."""
    policy, batch = load_policy(folder), len(case["completion"])
    trace = Trace(torch.arange(8).expand(batch, -1), torch.ones(batch, 8))
    masks = preset(name).likelihood.masks(torch.arange(batch), Seen.whole(torch.arange(batch), 8)._replace(trace=trace))
    new = log_probs(policy, prompts_of(case, batch), tensor(case["completion"], torch.int64), masks)
    torch.testing.assert_close(new.sum(0).double(), tensor(case["log_prob"]), **NEAR)
    rewards = tensor(case["rewards"])[None].float()
    advantages = preset(name).advantages(rewards)[0]
    torch.testing.assert_close(advantages.double(), tensor(case["advantages"]), rtol=1e-6, atol=1e-6)
    if not case["valid"]:
        assert not advantages.any()
        return
    value = loss(preset(name).objective, new, advantages, 1, new.detach(), weight=masks.weight)
    assert_norms(policy, value * batch / (case["valid"] + 1e-5), case["grad_norms"])


@cases("model", "tracerl")
def test_tracerl_of_a_model(name, case, folder):
    """Rows are the states of merged steps; those after the end may be left out there."""
    policy, owner = load_policy(folder), tensor(case["row_owner"], torch.int64)
    completion, steps = (tensor(case[key], torch.int64) for key in ("completion", "steps"))
    trace, law = Trace(steps, torch.ones(steps.shape)), Trajectory(merge=case["shrink"], temperature=0.8)
    masks = law.masks(torch.arange(4), Seen.whole(torch.arange(4), 8)._replace(trace=trace))
    hidden, scored = bits(case["row_hidden"]), bits(case["row_scored"])
    states = [(m, b) for b in range(4) for m in range(len(masks.hidden)) if (masks.weight[m, b] != 0).any()]
    found = {(b, *masks.hidden[m, b].tolist()): masks.weight[m, b] != 0 for m, b in states}
    for row, (b, shown) in enumerate(zip(owner.tolist(), hidden)):
        own = found.pop((b, *shown.tolist()))
        assert torch.equal(own, scored[row]) if case["post_num"] is None else (scored[row] & ~own).sum() == 0
    assert not found if case["post_num"] is None else all(completion[key[0], -1] == 1 for key in found)
    rows = Masks(hidden[None], scored[None].float(), False)
    new = log_probs(policy, prompts_of(case, len(owner)), completion[owner], rows)
    torch.testing.assert_close(new[0].double(), tensor(case["log_prob"]), **NEAR)
    objective = replace(preset(name).objective, clip_range=case["epsilon"], beta=case["beta"])
    old, advantages = tensor(case["log_prob_old"]).float()[None], tensor(case["row_advantage"]).float()
    value = loss(objective, new, advantages, 1, old, weight=rows.weight)
    assert value.item() == pytest.approx(case["loss"], rel=1e-4, abs=1e-6)
    assert_norms(policy, value, case["grad_norms"])


def truncated(case: dict, masks: Masks):
    """log_probs' reduce with the kept sets that AGRPO records, and its temperature."""
    kept = None
    if "tokens_kept_by_truncation" in case:
        kept = bits(case["tokens_kept_by_truncation"]).expand(len(masks.weight), -1, -1, -1)[masks.weight != 0]

    def reduce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits if kept is None else logits.masked_fill(~kept, -math.inf)
        return token_log_probs(logits / case["temperature"], targets)

    return reduce


@cases("model", "agrpo")
def test_agrpo_of_a_model(name, case, folder):
    policy, batch, length = load_policy(folder), len(case["completion"]), case["C"]
    masks = drawn(case, length)
    masks = masks._replace(weight=masks.weight.float())
    completion = tensor(case["completion"], torch.int64)
    new = log_probs(policy, prompts_of(case, batch), completion, masks, truncated(case, masks))
    scored = masks.weight != 0
    expected = tensor(case["log_prob"]).expand_as(new)[scored]
    torch.testing.assert_close(new[scored].double(), expected, **NEAR)
    old = tensor(case["log_prob_old"]).float().expand_as(new)
    ref = tensor(case["log_prob_ref"]).float().expand_as(new) if "log_prob_ref" in case else None
    objective = replace(preset(name).objective, clip_range=case["epsilon"], beta=case["beta"])
    value = loss(objective, new, tensor(case["advantages"]).float(), 1, old, ref, masks.weight) * batch / case["group"]
    assert value.item() == pytest.approx(case["loss"], rel=1e-4, abs=1e-5)
    assert_norms(policy, value, case["grad_norms"])


@cases("model", "egspo")
def test_egspo_of_a_model(name, case, folder):
    policy, batch = load_policy(folder), len(case["completion"])
    completion, steps, chosen = (tensor(case[k], torch.int64) for k in ("completion", "steps", "selected_steps"))
    objective = replace(preset(name).objective, beta=case["beta"])
    for k in range(case["K"]):
        masks = trace_masks(steps, chosen[:, k][None], torch.ones(1, batch))
        new = log_probs(policy, prompts_of(case, batch), completion, masks)
        torch.testing.assert_close(new.sum((0, 2)).double(), tensor(case["step_log_prob_new"][k]), **NEAR)
        old, ref = (
            over_positions(tensor(case[f"step_log_prob_{kind}"][k]).float()[None], masks.weight)
            for kind in ("old", "ref")
        )
        value = loss(objective, new, tensor(case["advantages"])[:, k].float(), 1, old, ref, masks.weight)
        assert value.item() == pytest.approx(case["loss_per_selected_step"][k], rel=1e-4, abs=1e-5)
        if k == 0:
            assert_norms(policy, value, case["grad_norms_first_selected_step"])


def test_every_recorded_number_has_a_preset():
    assert {PARTS.get(name, (name,))[0] for name in NAMES} == set(NAMES) - {"gdsd_tlc"}
    assert isinstance(preset("rtb").objective, Balance)
