"""The runs of notebooks 14 and 15: what they cost, what they watch, how they are measured."""

import json
import math
from itertools import product
from pathlib import Path

import nbformat
import pytest
import torch

from espo_lightning.lab.studies import canvas
from espo_lightning.lab.studies.arms import module_flops
from espo_lightning.lab.studies.horizon import LIKELIHOODS, chains
from espo_lightning.lab.studies.states import Snapshots, as_text, untaught
from espo_lightning.objectives.objective import Scores
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.objectives.ratios import sequence_ratio, token_ratio

ARM = {"ratio": "sequence", "likelihood": "ELBO", "updates": 2, "lr": 1e-3, "clip_range": None}


def scores(change) -> Scores:
    """Of completions whose log-probabilities changed so much: [M, B, L], with weights 1."""
    new = torch.as_tensor(change, dtype=torch.float64)
    return Scores(new.requires_grad_(), torch.zeros_like(new), None, torch.ones_like(new), torch.tensor([4, 4]))


@pytest.mark.parametrize("ratio", [sequence_ratio, token_ratio])
def test_watching_changes_no_loss(ratio):
    given, advantages = scores([[[0.1, 0.2, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]]), torch.tensor([1.0, -1.0]).double()
    plain, _ = PolicyGradient(ratio=ratio, beta=0.0)(given, advantages, 2)
    watched, statistics = canvas.Watched(ratio=ratio, beta=0.0)(given, advantages, 2)
    torch.testing.assert_close(plain, watched)
    (gradient,) = torch.autograd.grad(watched.sum(), given.new)  # the graph is still there
    assert gradient.abs().sum() > 0
    assert statistics["terms"].shape == (2,)


def test_how_many_terms_make_a_gradient():
    """By hand: token ratios e^3 and three of 1 in one completion, four of 1 in the other."""
    given, advantages = scores([[[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]), torch.tensor([1.0, 1.0]).double()
    objective = {"clip_range": math.inf, "beta": 0.0}
    _, token = canvas.Watched(ratio=token_ratio, **objective)(given, advantages, 2)
    big = math.exp(3)
    assert token["terms"][0] == pytest.approx((big + 3) ** 2 / (big**2 + 3) / 4)
    assert token["terms"][1] == pytest.approx(1)
    _, sequence = canvas.Watched(ratio=sequence_ratio, **objective)(given, advantages, 2)
    assert sequence["terms"].tolist() == pytest.approx([1, 1])
    _, clipped = canvas.Watched(ratio=token_ratio, clip_range=0.1, beta=0.0)(given, advantages, 2)
    assert clipped["terms"].tolist() == pytest.approx([3 / 4, 1])  # the first ratio is beyond the clip


@pytest.mark.parametrize(("likelihood", "beta", "updates"), [*product(LIKELIHOODS, (0.0, 0.1), (1, 8))])
def test_costs_are_proportional_to_flops(likelihood, beta, updates):
    """Against what the library counts for a whole training step, up to what the backward pass leaves out."""
    length = 32
    arm = ARM | {"likelihood": likelihood, "updates": updates, "beta": beta}
    found = {}
    for name, settings in (("arm", arm), ("plain", ARM)):
        module = canvas.module_of(untaught(0), 0, length, **settings)
        exact = sum(module_flops(module, chains(length), "bundled:chain", 1).values())
        costs = {key: settings.get(key, 0.0) for key in ("likelihood", "updates", "beta")}
        found[name] = exact, canvas.passes(length, **costs)
    exact, ours = ([found[name][i] for name in ("arm", "plain")] for i in (0, 1))
    assert ours[0] / ours[1] == pytest.approx(exact[0] / exact[1], rel=0.12)


def test_the_arms_of_notebook_15_have_the_flops_that_it_says(tmp_path):
    untaught(0).save(tmp_path)

    def count(length, likelihood):
        module = canvas.module_of(untaught(0), 0, length, **ARM | {"likelihood": likelihood, "updates": 8})
        return sum(module_flops(module, chains(length), str(tmp_path), 4).values())

    folder = Path(__file__).parents[1] / "notebooks"
    rollouts = json.loads((folder / "results" / "15_arms" / "result.json").read_text())["summary"]["rollouts"]
    shares = []
    for n in (16, 64, 128):
        ours, theirs = (rollouts[f"token, {law}, {n} tokens"] * count(n, law) / 1e6 for law in ("mean field", "ELBO"))
        shares.append(f"{ours / theirs:.2f}")
    text = " ".join(cell.source for cell in nbformat.read(folder / "15_arms.ipynb", as_version=4).cells)
    assert "has {}, {} and {} times the FLOPs".format(*shares) in " ".join(text.split())


def test_a_run_is_the_same_twice_and_says_what_it_saw():
    bases = {"3": as_text(untaught(3))}
    common = {"bases": bases, "length": 8, "rollouts": 2, "prompts": 1, "answers": 2}
    first, again, pilot = (canvas.trained(3, **common, pilot=p, **ARM) for p in (False, False, True))
    assert first == again
    assert set(first["watched"]) == set(canvas.WATCHED)
    assert all(len(values) == 2 for values in first["watched"].values())
    assert pilot["watched"] == {}
    assert not first["diverged"]


def test_pilots_are_measured_on_other_problems(monkeypatch):
    asked = []
    monkeypatch.setattr(canvas, "measured", lambda policy, length, answers, where: asked.append(where) or {})
    common = {"bases": {"3": as_text(untaught(3))}, "length": 8, "rollouts": 1, "prompts": 1, "answers": 2}
    for pilot in (True, False):
        canvas.trained(3, **common, pilot=pilot, **ARM)
    assert asked == [("train", 1_000_000), ("test", 0)]


def test_a_run_begins_at_its_own_base():
    policies = {seed: untaught(seed) for seed in (3, 4)}
    bases = {str(seed): as_text(policy) for seed, policy in policies.items()}
    common = {"bases": bases, "length": 8, "rollouts": 1, "prompts": 1, "answers": 8, "pilot": False}
    arm = ARM | {"lr": 0.0}
    for seed, policy in policies.items():
        found = canvas.trained(seed, **common, **arm)
        expected = canvas.measured(policy, 8, 8, canvas.TEST)
        assert {key: found[key] for key in expected} == expected


def test_a_run_that_diverged_has_no_reward(monkeypatch):
    monkeypatch.setattr(canvas, "train_or_diverge", lambda *_: (Snapshots([]), True))
    bases = {"3": as_text(untaught(3))}
    common = {"bases": bases, "length": 8, "rollouts": 1, "prompts": 1, "answers": 2, "pilot": False}
    found = canvas.trained(3, **common, **ARM)
    assert found["diverged"]
    assert found["reward"] == found["exact"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_stored_number_is_finite_or_none(value):
    assert canvas.finite(value) is None
    assert canvas.finite(0.123456) == 0.1235
