"""The presets of methods on traces, and of balances, against numbers of official code; RSPO's and TraFL's are formulas.

Losses in official units are translated here: the factors are those of the docstrings and presets.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import golden_folder

from espo_lightning import (
    ELBO,
    Balance,
    Masks,
    OneMasked,
    Prompts,
    Scores,
    Seen,
    Trace,
    Trajectory,
    TruncatedRatio,
    ball_kl,
    hamming_ball,
    k1,
    k2,
    k2_u,
    load_policy,
    log_probs,
    z_score,
)
from espo_lightning.lab.methods import read_method
from espo_lightning.scoring.score import token_log_probs
from espo_lightning.scoring.trajectory import trace_masks

ROOT = Path(__file__).parents[1]
NAMES = ("rtb", "sepo", "justgrpo", "tracerl", "agrpo", "egspo", "gdsd", "gdsd_tlc", "rspo", "trafl")
GOLDEN = {name: json.loads((ROOT / f"tests/golden/methods/{name}.json").read_text()) for name in NAMES}
CLOSE, NEAR = {"rtol": 1e-12, "atol": 1e-13}, {"rtol": 1e-5, "atol": 1e-5}
PARTS = {"gdsd_tlc": ("gdsd", "--likelihood.weighted=true")}


def preset(name: str):
    file, *changes = PARTS.get(name, (name,))
    return read_method(ROOT / "experiments" / "methods" / f"{file}.yaml", *changes)


def tensor(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def bits(strings) -> torch.Tensor:
    """Strings of 0 and 1, nested in lists: bool [..., characters]."""
    if isinstance(strings, str):
        return torch.tensor([c == "1" for c in strings])
    return torch.stack([bits(s) for s in strings])


def cases(kind: str, *names: str):
    found = [(name, case) for name in names for case in GOLDEN[name][kind]]
    return pytest.mark.parametrize(("name", "case"), found, ids=[f"{n}-{i}" for i, (n, _) in enumerate(found)])


def loss(objective, new, advantages, group=1, old=None, ref=None, weight=None) -> torch.Tensor:
    """The mean loss of completions with log-probabilities [M, B, L]."""
    weight = torch.ones_like(new) if weight is None else weight.to(new.dtype)
    old, ref = (None if x is None else torch.where(weight != 0, x, 0.0) for x in (old, ref))
    length = torch.full((new.shape[1],), new.shape[2])
    losses, _ = objective(Scores(torch.where(weight != 0, new, 0.0), old, ref, weight, length), advantages, group)
    return losses.mean()


def gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, leaf)[0]


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


def gdsd(name: str, case: dict, length: int):
    """The objective with the numbers of a case, and official / ours."""
    psi, draws = case["psi"], case["M"]
    settings = {"temperature": 1 / (psi * length), "clip_range": case["epsilon"]}
    objective = replace(preset(name).objective, beta=case["beta"] / (2 * draws * psi), **settings)
    return objective, 2 * draws * psi


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


def over_positions(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [M, B, L] whose weighted sums are [M, B]."""
    scored = weight != 0
    return torch.where(scored, total.unsqueeze(-1) / weight / scored.sum(-1, keepdim=True), 0.0)


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


def one_masked(case: dict, values) -> torch.Tensor:
    """[B, m] of given positions as [M, B, L]."""
    positions, values = tensor(case["positions"], torch.int64), values if torch.is_tensor(values) else tensor(values)
    canvas = torch.zeros(*positions.T.shape, case["L"], dtype=values.dtype)
    return canvas.scatter(-1, positions.T.unsqueeze(-1), values.T.unsqueeze(-1))


def sepo(case: dict):
    objective = replace(preset("sepo").objective, beta=case["kappa"])
    score = objective.ratio.score
    if case["kind"] == "hamming":
        score = hamming_ball
        objective = replace(objective, kl_at=ball_kl)
    return replace(objective, ratio=TruncatedRatio(case["epsilon"], score))


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


# ---- JustGRPO, TraceRL, AGRPO, EGSPO --------------------------------------------------------------------------------


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


def drawn(case: dict, factor: float) -> Masks:
    """The states that AGRPO drew, with its importance weights."""
    steps, chosen = (tensor(case[key], torch.int64) for key in ("steps", "drawn_steps"))
    masks = trace_masks(steps, chosen.T, tensor(case["importance_weights"]).T * factor)
    weight = torch.where(masks.weight != 0, tensor(case["importance_weights"]).T.unsqueeze(-1) * factor, 0.0)
    return masks._replace(weight=weight)  # in float64


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
