"""The presets of experiments/methods against numbers of each method's official code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import golden_folder

from espo_lightning import Masks, Prompts, Sandwich, Scores, load_policy, log_probs
from espo_lightning.lab.method_table import page
from espo_lightning.lab.methods import Method, read_method
from espo_lightning.objectives.kl import k1
from espo_lightning.objectives.sandwich import lower_bound, upper_bound

ROOT = Path(__file__).parents[1]
HERE = ("coupled_grpo", "diffu_grpo", "gdpo", "spg", "stabledrl", "unigrpo", "wd1")  # others: test_trace_methods.py
GOLDEN = {name: json.loads((ROOT / f"tests/golden/methods/{name}.json").read_text()) for name in HERE}
PRESETS = {path.stem: read_method(path) for path in sorted((ROOT / "experiments/methods").glob("*.yaml"))}


def tensor(values, dtype=torch.float64) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)


def draws(values) -> torch.Tensor | None:
    """[M, B, L] of what may be [B, L]."""
    x = tensor(values)
    return x if x is None or x.ndim == 3 else x.unsqueeze(0)


def valid_of(case: dict) -> torch.Tensor:
    """bool [B, L]; where a case names none, the whole canvas counts."""
    completion = tensor(case["completion"], torch.int64)
    return tensor(case["valid"], torch.bool) if "valid" in case else torch.ones_like(completion, dtype=torch.bool)


def with_settings(method: Method, case: dict) -> Method:
    """The preset with a case's own numbers."""
    objective = method.objective
    for name in ("clip_range", "beta"):
        if name in case:
            objective = replace(objective, **{name: case[name]})
    if case.get("kl") == "k1":
        objective = replace(objective, kl=k1)
    if "eubo_beta" in case:
        mix = {"mix": case["mix_weight"], "eubo": 1.0, "elbo": 0.0}[case["estimation"]]
        objective = replace(objective, score=Sandwich(case["eubo_beta"], mix))
    if case.get("cap"):
        objective = replace(objective, cap=case["cap"])
    return replace(method, objective=objective)


def weights(name: str, case: dict) -> torch.Tensor:
    """Of the method's mask law, for the masks of a case: [M, B, L]."""
    valid = valid_of(case)
    hidden = draws(case["hidden"]).bool() if "hidden" in case else torch.ones(1, *valid.shape, dtype=torch.bool)
    if name == "coupled_grpo":
        r = tensor(case["mask_ratio"])
        first, second = torch.ones(hidden[0].shape, dtype=torch.float64), hidden[0] / r + ~hidden[0] / (1 - r)
        return torch.stack([first, second]) * valid
    if name == "gdpo":
        scale = tensor(case["node_weights"]) / tensor(case["nodes"]) * len(hidden)
        return hidden * scale.view(-1, 1, 1)
    if "scored" in case:
        return tensor(case["scored"])
    return (hidden & valid).double()


def loss_of(name: str, case: dict, method: Method, new: torch.Tensor, old, ref) -> torch.Tensor:
    length = valid_of(case).sum(-1)
    rewards = tensor(case["rewards"])
    return method.loss(new, new.detach() if old is None else old, ref, weights(name, case), length, rewards)[0]


LEFT_OUT = {  # what a preset does not reproduce, see experiments/methods/README.md
    ("wd1", "positive only, seed 11"),
    ("wd1", "positive only, seed 12"),
    ("spg", "zero, block_random, seed 61"),
    ("unigrpo", "a completion that begins with EOS: its rows are dropped"),
    ("stabledrl", "without self-normalisation: per-group SPG"),
}
CASES = [(name, case) for name, golden in GOLDEN.items() for case in golden["objective"]]
KEPT = [(name, case) for name, case in CASES if (name, case["name"]) not in LEFT_OUT]


@pytest.mark.parametrize(("name", "case"), KEPT, ids=[f"{name}: {case['name']}" for name, case in KEPT])
def test_losses_and_gradients_are_those_of_the_official_code(name, case):
    method = with_settings(PRESETS[name], case)
    new = draws(case["log_probs"]).requires_grad_()
    old = draws(case.get("old_log_probs", case.get("old")))
    ref = draws(case.get("ref_log_probs", case.get("ref")))
    scored = weights(name, case) != 0
    new_scored, old, ref = (None if x is None else torch.where(scored, x, 0.0) for x in (new, old, ref))
    loss = loss_of(name, case, method, new_scored, old, ref)
    (grad,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(case["official"]["loss"], abs=1e-12, rel=1e-12)
    torch.testing.assert_close(grad, draws(case["official"]["grad_log_probs"]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case['name']}" for name, case in CASES])
def test_advantages_are_those_of_the_official_code(name, case):
    ours = PRESETS[name].advantages(tensor(case["rewards"])).flatten()
    official = tensor(case.get("effective_advantages", case["advantages"]))
    if name == "wd1" and case["variant"] == "positive only":
        return  # another method's
    torch.testing.assert_close(ours, official, rtol=1e-12, atol=1e-14)


# ---- the tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint of the authors' golden numbers, in LLaDA's format, with a tokenizer of its size."""
    return golden_folder(tmp_path_factory.mktemp("golden") / "tiny", "tiny.safetensors")


MODELS = [(name, case) for name, golden in GOLDEN.items() for case in golden["model"]]


def masks_of(name: str, case: dict) -> Masks:
    weight = weights(name, case).float()
    prompt = case.get("hidden_prompt")
    prompt = None if prompt is None else draws(prompt).bool()
    if name == "coupled_grpo":
        hidden = draws(case["hidden"]).bool()
        return Masks(torch.cat([torch.ones_like(hidden), hidden]), weight, True)
    valid = valid_of(case)
    hidden = draws(case["hidden"]).bool() if "hidden" in case else torch.ones(1, *valid.shape, dtype=torch.bool)
    return Masks(hidden, weight, False, prompt)


def given(name: str, case: dict, kind: str, weight: torch.Tensor) -> torch.Tensor | None:
    """Old or reference log-probabilities [M, B, L] that have the values of a case."""
    for key in (kind, f"{kind}_log_probs_at_scored"):
        if case.get(key) is not None:
            return draws(case[key]).float()
    if case.get(f"{kind}_score") is not None and name == "coupled_grpo":  # of tokens: half of it is the first draw's
        return (tensor(case[f"{kind}_score"]).unsqueeze(0) / weight.double()).nan_to_num(0, 0, 0).float()
    if case.get(f"{kind}_score") is not None:  # of sequences: spread over what is scored
        total = tensor(case[f"{kind}_score"]).view(1, -1, 1)
        scored = weight != 0
        return torch.where(scored, total / weight / scored.sum(-1, keepdim=True), 0.0).float()
    if case.get(f"{kind}_elbo") is not None:
        return torch.where(weight != 0, tensor(case[f"{kind}_elbo"]).view(1, -1, 1), 0.0).float()
    return None


@pytest.mark.parametrize(("name", "case"), MODELS, ids=[f"{name}: {case['name']}" for name, case in MODELS])
def test_scores_losses_and_gradients_of_a_model(name, case, folder):
    policy = load_policy(folder)
    if "logits" in case:
        policy.shift = 1
    prompt = tensor(case["prompt"], torch.int64)
    prompts = Prompts(prompt, tensor(case["prompt_mask"], torch.bool) if "prompt_mask" in case else None)
    completion, masks = tensor(case["completion"], torch.int64), masks_of(name, case)
    new = log_probs(policy, prompts, completion, masks)
    official = case["official"]
    for key in ("log_probs", "log_probs_at_scored", "log_probs_at_hidden"):
        if key in official:
            scored = masks.scored.any(0)
            torch.testing.assert_close(new[scored], draws(official[key]).float()[scored], rtol=1e-6, atol=1e-5)
    old, ref = (given(name, case, kind, masks.weight) for kind in ("old", "ref"))
    method = with_settings(PRESETS[name], case)
    loss = method.loss(new, old, ref, masks.weight, valid_of(case).sum(-1), tensor(case["rewards"]).float())[0]
    assert loss.item() == pytest.approx(official["loss"], rel=2e-5, abs=1e-5)
    loss.backward()
    grads = {n: p.grad.norm() for n, p in policy.model.named_parameters()}
    total = torch.stack(list(grads.values())).norm()
    assert float(total) == pytest.approx(official["grad_norm_total"], rel=1e-5)
    for parameter, norm in official["grad_norms"].items():
        assert float(grads[parameter]) == pytest.approx(norm, rel=1e-4, abs=1e-6), parameter


# ---- bounds ---------------------------------------------------------------------------------------------------------


def scores_of(log_p: torch.Tensor, scored: torch.Tensor, length: torch.Tensor) -> Scores:
    return Scores(log_p * scored, None, None, scored.to(log_p.dtype), length)


def test_bounds_of_one_draw_differ_by_the_share_of_what_is_scored():
    """upper - lower = ln(|y| / k) / power exactly."""
    log_p = -torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scored = torch.zeros(1, 4, 8, dtype=torch.bool)
    scored[..., :3] = True
    scores = scores_of(log_p, scored, torch.full((4,), 6))
    for power in (1.0, 1.5):
        gap = upper_bound(scores, scores.new, power) - lower_bound(scores, scores.new)
        torch.testing.assert_close(gap, torch.full_like(gap, torch.tensor(2.0).log().item() / power))


def test_the_upper_bound_is_above_the_lower_one_where_everything_is_scored():
    """Jensen; equal if the draws agree."""
    log_p = -3 * torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scored, length = torch.ones(5, 4, 8, dtype=torch.bool), torch.full((4,), 8)
    scores = scores_of(log_p, scored, length)
    assert (upper_bound(scores, scores.new, 1.5) > lower_bound(scores, scores.new)).all()
    same = scores_of(log_p[:1].expand(5, -1, -1), scored, length)
    torch.testing.assert_close(upper_bound(same, same.new, 1.5), lower_bound(same, same.new))


def test_bounds_stay_finite_for_improbable_tokens_and_positions_that_no_draw_scores():
    log_p = torch.full((2, 2, 6), -100.0)
    log_p[:, 0, 1] = -1e4
    scored = torch.zeros(2, 2, 6, dtype=torch.bool)
    scored[0, :, :2], scored[1, :, 1:3] = True, True
    leaf = (log_p * scored).requires_grad_()
    scores = Scores(leaf, None, None, scored.float(), torch.tensor([6, 6]))
    for value in (upper_bound(scores, leaf, 2.0), Sandwich()(scores, leaf, torch.zeros(2))):
        (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[:, :, 3:].any()


# ---- the page and its entry point -----------------------------------------------------------------------------------


def test_the_page_of_methods_is_what_the_presets_say():
    made = page(ROOT / "experiments" / "methods")
    text = (ROOT / "docs" / "methods.md").read_text()
    assert text == made, "python -m espo_lightning.lab.method_table experiments/methods > docs/methods.md"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_where_it_comes_from_and_what_it_departs_from(name):
    path = ROOT / "experiments" / "methods" / f"{name}.yaml"
    head = path.read_text().partition("\nmodel:")[0]
    assert f"--config experiments/methods/{name}.yaml" in head
    assert "https://github.com/" in head
    for mark in ("arXiv:", "Official (", "Departs:"):
        assert mark in head, mark
    assert len(path.read_text().partition("\nmodel:")[2].strip().splitlines()) <= 15


def test_a_preset_takes_changes_as_flags():
    method = read_method(ROOT / "experiments" / "methods" / "spg.yaml", "--objective.score.mix=0.25", "--updates=3")
    assert (method.objective.score.mix, method.updates) == (0.25, 3)
    with pytest.raises(SystemExit):
        read_method(ROOT / "experiments" / "methods" / "spg.yaml", "--objective.beta=1")
