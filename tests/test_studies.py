"""The studies of the notebooks: exact measures of states, ratios and gradients."""

import math

import pytest
import torch
from conftest import parameters
from study_cases import TASK, policy_fixture, state_fixture  # noqa: F401
from torch.nn.utils import parameters_to_vector

from espo_lightning import (
    ELBO,
    MeanField,
    QuadratureELBO,
    Sudoku,
    load_policy,
    score,
)
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import (
    all_symbols,
    enumerate_completions,
    exact_elbo,
    lattice_edges,
    log_likelihoods,
    low_confidence_log_likelihoods,
    subset_log_probs,
)
from espo_lightning.lab.gradients import cosine
from espo_lightning.lab.studies.causal import CAUSAL, causal_off_policy, causal_terms, contested_fillings
from espo_lightning.lab.studies.kl import value_moments
from espo_lightning.lab.studies.ratios import Recorded, off_policy, real_batch, whole_canvas
from espo_lightning.lab.studies.states import (
    SUDOKU,
    empty_cells,
    new_module,
    sudoku_state,
    train,
    true_measures,
)
from espo_lightning.lab.studies.statistics import broken_line, first_above, rank_correlation
from espo_lightning.lab.studies.tightness import estimator_errors, gradient_bias, mean_field, one_step


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [5, 5, 5], 0.0),
        ([1, 2, 2, 4], [1, 3, 2, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1 2.5 2.5 4 and 1 3 2 4
    ],
)
def test_rank_correlation(x, y, expected):
    assert rank_correlation(x, y) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_needs_pairs():
    with pytest.raises(ValueError, match="got 2 and 3"):
        rank_correlation([1, 2], [1, 2, 3])


def test_broken_line():
    x = [0, 1, 2, 3, 4, 5]
    straight = broken_line(x, [1 + 2 * v for v in x])
    assert straight[:2] == pytest.approx((2, 1))
    assert straight.before == pytest.approx(2)
    bent = broken_line(x, [0, 0.1, 0.2, 0.3, 3.3, 6.3])
    assert (bent.knot, bent.before, bent.after, bent.r2_broken) == pytest.approx((3, 0.1, 3, 1))
    assert bent.r2 < 0.9
    noisy = broken_line(x, [0, 1.1, 1.9, 3.2, 3.8, 5.1])
    assert noisy.r2 < noisy.r2_broken < 1  # two lines never fit worse
    with pytest.raises(ValueError, match="got 3 x and 3 y"):
        broken_line([1, 2, 3], [1, 2, 4])


def test_first_above():
    assert first_above([0.1, 0.5, 0.2, 0.6], 0.5) == 1
    assert first_above([0.1, 0.2], 0.5) is None


def test_a_state_is_the_puzzle(policy):
    problem = TASK.problem("train", 0, 0)
    state = sudoku_state(policy, problem)
    best = state.cells.expand(enumerate_completions(4, 2))[state.rewards.argmax()]
    assert policy.decode(best[None]) == [problem.answer]
    assert state.rewards.max() == 1
    assert (state.rewards == 1).sum() == 1  # one solution
    assert state.size == (4, 2)


def test_contested_states_have_a_spread_of_rewards(policy, state):
    assert state.rewards.std() > 0
    p = log_likelihoods(state.edges()).exp()
    assert float((p @ state.rewards.square() - (p @ state.rewards).square()).sqrt()) >= 0.05
    tame = [sudoku_state(policy, TASK.problem("train", 0, i)) for i in range(20)]
    spreads = [float((log_likelihoods(s.edges()).exp() @ (s.rewards - s.rewards.mean()).square()).sqrt()) for s in tame]
    assert min(spreads) >= 0  # and the first contested puzzle is not simply the first puzzle
    assert not torch.equal(tame[0].cells.free, state.cells.free)


def test_a_completion_must_hold_digits(policy):
    problem = TASK.problem("train", 0, 0)
    with pytest.raises(ValueError, match="something else than digits"):
        empty_cells(policy, problem, torch.full((16,), policy.tokenizer.eos_token_id))


def test_true_measures(policy, state):
    same = true_measures([state, state], policy)
    law = log_likelihoods(state.edges())
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["entropy"] == pytest.approx(float(-law.exp() @ law))
    assert 0 <= same["gap"] < 1
    other = true_measures([state], load_policy("bundled:sudoku_hard"))
    # the reference of the divergence is the state's own policy
    q = log_likelihoods(state.of(load_policy("bundled:sudoku_hard")).edges())
    assert other["kl"] == pytest.approx(float(q.exp() @ (q - law)))


def test_mean_field_is_the_library_s(policy, state):
    completions = enumerate_completions(4, 2)
    masks = MeanField().draw(torch.zeros(16, dtype=torch.int64), 2)
    with torch.no_grad():
        expected = score(state.cells, state.prompts.repeat_each(16), completions, masks).sum((0, 2))
    torch.testing.assert_close(mean_field(state.edges()), expected.double(), rtol=0, atol=1e-5)


def test_gradient_bias_and_a_step_along_the_exact_gradient(policy, state):
    before = parameters_to_vector(policy.parameters()).detach().clone()
    step = 1e-3
    result = gradient_bias([state], step)
    assert torch.equal(parameters_to_vector(policy.parameters()), before)  # a step is taken back
    (row,) = result["states"]
    assert row["cosine_decoder"]["decoder: true"] == pytest.approx(1)
    assert row["cosine_decoder"] == pytest.approx(result["batch"]["cosine_decoder"])
    assert row["improvement"]["decoder: true"] == pytest.approx(step * row["norm"]["decoder: true"], rel=0.1)
    # the gradient of the decoder's mean reward by autograd through the whole lattice

    edges = lattice_edges(state.cells, state.prompts, all_symbols(4, 2))
    (low_confidence_log_likelihoods(edges).exp() @ state.rewards).backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    policy.zero_grad()
    assert row["norm"]["decoder: true"] == pytest.approx(norm, rel=1e-3)
    vectors = torch.zeros(7, len(before))
    assert one_step(state, vectors, step) == {}  # nowhere to go


@pytest.mark.slow
def test_estimator_errors_are_those_of_the_library_s_draws(policy):
    problem = Sudoku(empty=3).problem("train", 0, 0)
    state = sudoku_state(policy, problem)
    with torch.no_grad():
        table = subset_log_probs(state.cells, state.prompts, torch.tensor([3, 3, 3]))
    errors = estimator_errors([table], [1, 2, 4])
    assert errors["coupled"]["forwards"] == [2, 4]
    n, keys = 4000, fold_in(1, torch.arange(4000))
    for name, forwards, likelihood in (
        ("single", 4, ELBO(draws=4, coupled=False)),
        ("single, counts 1..L", 2, ELBO(draws=2, coupled=False, smallest_count=1)),
        ("coupled", 4, ELBO(draws=2)),
        ("coupled, stratified", 4, ELBO(draws=2, stratified=True)),
        ("single, stratified", 2, ELBO(draws=2, coupled=False, stratified=True)),
        ("quadrature", 2, QuadratureELBO(nodes=2)),
    ):
        masks = likelihood.draw(keys, 3)
        completion = torch.tensor([3, 3, 3]).expand(n, -1)
        with torch.no_grad():
            scores = score(state.cells, state.prompts.repeat_each(n), completion, masks).sum(-1).mean(0)
        rmse = (scores - exact_elbo(table)).square().mean().sqrt().item()
        ours = errors[name]["rmse"][errors[name]["forwards"].index(forwards)]
        assert ours == pytest.approx(rmse, rel=0.06), name
    assert errors["single"]["bias"] == pytest.approx([0, 0, 0], abs=1e-9)


def test_value_moments():
    values = torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64)
    moments = value_moments(values, torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert moments["mean"] == pytest.approx(0.75 * 2 + 0.25 * 20)
    second = 0.75 * (1 + 9) / 2 + 0.25 * (100 + 900) / 2
    assert moments["sd"] == pytest.approx(math.sqrt(second - 6.5**2))
    assert moments["q999"] == 30


@pytest.mark.slow
def test_ratios_agree_before_the_first_update_and_part_after_it(policy, state):
    torch.set_num_threads(1)
    module = new_module(load_policy(SUDOKU), 0, Recorded, updates=3, group_size=8)
    train(module, Sudoku(), 0, 1, batch=8)  # of fewer problems all rewards may be equal: the habit
    old, new = module.iterates[0], module.iterates[-1]
    assert torch.equal(parameters_to_vector(old.parameters()), parameters_to_vector(policy.parameters()))
    assert len(module.iterates) == 4
    assert torch.equal(parameters_to_vector(new.parameters()), parameters(module))
    problems = [Sudoku().problem("train", 0, i) for i in range(8)]
    same = real_batch(module.last_rollout, problems, old, old, 1, 4, key=0)
    for likelihood in ("ELBO", "mean field"):
        token, sequence = (same[f"{level}, {likelihood}, inf"] for level in ("token", "sequence"))
        assert token == pytest.approx(sequence, abs=1e-6)
    canvas = whole_canvas(module.last_rollout, old, 0, 2)
    assert canvas["sd"]["token"] < 1e-5  # the masks of the first update
    assert canvas["cosine"] == pytest.approx(1, abs=1e-5)
    assert whole_canvas(module.last_rollout, new, 1, 2)["sd"]["token"] > 1e-3
    start, end = (off_policy([state.of(old)], p, [1], [0.1], 8, key=0) for p in (old, new))
    assert start["states"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert start["states"][0]["cosine"]["sequence, exact likelihood"] == pytest.approx(1, abs=1e-5)
    for measure in ("cosine", "noise"):
        token, sequence = (start["batch"][measure][f"{level}, ELBO M=1, inf"] for level in ("token", "sequence"))
        assert token == pytest.approx(sequence, rel=1e-4)
    assert end["states"][0]["kl"] > 1e-7
    assert end["batch"]["cosine"]["token, ELBO M=1, inf"] != end["batch"]["cosine"]["sequence, ELBO M=1, inf"]


def test_causal_gradients(policy):
    old, new = load_policy(CAUSAL), load_policy(CAUSAL)
    (puzzle,) = contested_fillings(old, seed=0, count=1, free=2)
    assert puzzle.completions.shape == (16, 16)
    assert (puzzle.rewards == 1).sum() == 1
    same = causal_off_policy([puzzle], old, old, [1.0])
    assert 0.98 < same["covered"] <= 1 + 1e-6  # it copies the givens
    for measure, of_target in (("cosine", 1), ("scale", 1 / 16)):  # the ratios' mean over the canvas
        assert same["batch"][measure] == pytest.approx(dict.fromkeys(same["batch"][measure], of_target), rel=1e-4)
    assert len(set(same["batch"]["cosine"])) == 4

    with torch.no_grad():
        for p, q in zip(new.parameters(), load_policy(SUDOKU).parameters()):
            if p.shape == q.shape:
                p.add_(0.1 * q)  # somewhere else
    moved = causal_off_policy([puzzle], old, new, [])
    assert moved["kl"] > 0.01
    # every gradient by autograd through all completions at once
    with torch.no_grad():
        before = causal_terms(old, puzzle)[0]
    law = before.sum(1).exp() / before.sum(1).exp().sum()
    weight = law * (puzzle.rewards - law @ puzzle.rewards)
    change = causal_terms(new, puzzle)[0] - before
    objectives = {
        "target": weight @ change.sum(1).exp(),
        "token, inf": weight @ change.exp().mean(1),
        "sequence, inf": weight @ change.mean(1).exp(),
    }
    target, *others = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(new.parameters()), retain_graph=True)])
        for x in objectives.values()
    )
    for name, gradient in zip(list(objectives)[1:], others):
        assert moved["batch"]["cosine"][name] == pytest.approx(cosine(gradient, target), abs=1e-4)
        assert moved["batch"]["scale"][name] == pytest.approx(float(gradient.norm() / target.norm()), rel=1e-3)
    assert abs(moved["batch"]["scale"]["token, inf"] / moved["batch"]["scale"]["sequence, inf"] - 1) > 0.01
