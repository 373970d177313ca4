"""The studies of the notebooks: training runs, costs, the jump, noise."""

import math

import pytest
import torch
from conftest import parameters
from study_cases import TASK, policy_fixture, state_fixture  # noqa: F401
from torch.nn.utils import parameters_to_vector

from espo_lightning import (
    ELBO,
    Decoding,
    MeanField,
    PolicyGradient,
    Sudoku,
    load_policy,
    score,
    sequence_ratio,
)
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import (
    all_symbols,
    elbos,
    enumerate_completions,
    lattice_edges,
    log_likelihoods,
)
from espo_lightning.lab.flops import decoding_passes, forward
from espo_lightning.lab.gradients import EdgeGradients, cosine, mask_completions
from espo_lightning.lab.network import LLADA_8B
from espo_lightning.lab.studies import states, training
from espo_lightning.lab.studies.arms import Arm, equal_rollouts, expected_flops
from espo_lightning.lab.studies.compute import paper_costs, step_costs
from espo_lightning.lab.studies.jump import Curriculum, contested_problems, covered, growth, jump, probe, rare_mode
from espo_lightning.lab.studies.noise import Point, noise
from espo_lightning.lab.studies.states import (
    SUDOKU,
    Diverged,
    Snapshots,
    held_out,
    new_module,
    sudoku_state,
    teach,
    train,
)


def test_snapshots_and_divergence(policy):
    module = new_module(load_policy(SUDOKU), 0, lr=3e-4, group_size=2)
    snapshots = train(module, TASK, 0, 2, at=[0, 2], batch=2)
    assert module.optimizers().param_groups[0]["lr"] == 3e-4
    start, end = (parameters_to_vector(snapshots.policies[i].parameters()) for i in (0, 2))
    assert torch.equal(start, parameters_to_vector(policy.parameters()))
    assert torch.equal(end, parameters(module))
    assert len(snapshots.means("exact")) == 2
    rewards = module.last_rollout.rewards
    assert snapshots.means("reward")[-1] == pytest.approx(float(rewards.mean()))
    assert snapshots.means("idle")[-1] == float((rewards[:, 0] == rewards[:, 1]).float().mean())

    def nonsense(delta):
        return delta.mean(0) * math.nan

    objective = PolicyGradient(kl=nonsense, beta=1.0)
    hopeless = new_module(load_policy(SUDOKU), 0, group_size=2, updates=12, objective=objective)
    with pytest.warns(UserWarning, match="NaN or infinite"), pytest.raises(Diverged, match="after 0 rollouts"):
        train(hopeless, TASK, 0, 1, batch=2)


def test_an_arm_is_its_module():
    module = Arm(ratio="token", likelihood="mean field", kl="k3", beta=0.1, updates=5, clip_range=0.2, steps=8).module(
        7
    )
    objective = module.objective
    assert (objective.ratio.__name__, objective.kl.__name__, module.likelihood) == ("token_ratio", "k3", MeanField())
    assert (objective.beta, module.updates, objective.clip_range, module.decoding.steps) == (0.1, 5, 0.2, 8)
    assert (module.seed, module.fresh_masks) == (7, False)  # nothing is random in a mean field
    assert Arm(draws=2, coupled=False).module(0).likelihood == ELBO(draws=2, coupled=False)
    assert Arm(fresh_masks=False).module(0).fresh_masks is False
    with pytest.raises(TypeError, match="drawz"):
        Arm(drawz=2)
    with pytest.raises(ValueError, match="got 'elbo'"):
        Arm(likelihood="elbo")


@pytest.mark.slow
def test_costs_of_a_step():
    arms = {"default": {"beta": 0.003, "updates": 1, "steps": 2}, "once": {"fresh_masks": False, "steps": 1}}
    for name, costs in step_costs(0, arms=arms, repeats=1)["arms"].items():
        predicted = {phase: n for phase, n in costs["predicted"].items() if n}
        assert predicted == pytest.approx(costs["counted"], rel=0.05), name  # the masks of one rollout
        assert costs["seconds"].keys() == predicted.keys()
        assert min(costs["seconds"].values()) > 0
    # equal compute, by hand
    one, other = (sum(expected_flops(Arm(**x)).values()) for x in ({}, {"updates": 16}))
    assert equal_rollouts({"updates": 16}, {}, 40) == round(40 * one / other)
    assert equal_rollouts({}, {}, 40) == 40
    assert equal_rollouts({"updates": 1000}, {}, 2) == 1


@pytest.mark.slow
def test_costs_of_the_paper():
    """Its 608, 704 and 896 N D; and exact counts, which are lower: the head and the last MLP run where they must."""
    rows = paper_costs([1, 4], updates=8, steps=256, length=256, prompt_length=100)
    assert [row["paper"] for row in rows] == [608, 896]
    assert [row["all passes"] for row in rows] == [672, 1152]
    passes = decoding_passes(Decoding(256, 32, 256), 1, 356)
    decoding = sum(forward(LLADA_8B, passes)) / LLADA_8B.parameters / 356
    for row in rows:
        assert decoding < row["single"] < row["coupled"]
        assert row["single"] < row["all passes"]
        # a coupled draw is two forwards where a single one is one, but for halves with nothing hidden
        assert (row["coupled"] - decoding) / (row["single"] - decoding) == pytest.approx(2, rel=0.02)
    assert (rows[1]["single"] - decoding) / (rows[0]["single"] - decoding) == pytest.approx(4, rel=0.02)


def test_a_training_run(monkeypatch, policy):
    settings = {"arm": {"likelihood": "mean field", "updates": 1, "lr": 1e-3}, "states": 1, "free": 2, "problems": 8}
    run = training.training_run(0, rollouts=2, points=1, **settings)
    first, last = run["curve"]
    assert [point["rollout"] for point in run["curve"]] == [0, 2]
    assert set(first) == {"rollout", "exact", "cell", "reward", "kl", "gap", "entropy"}
    assert first["kl"] == 0
    assert last["kl"] > 0
    assert first["cell"] == round(held_out(policy, Sudoku(), 8)["cell"], 4)
    assert len(run["reward"]) == len(run["exact"]) == 2
    assert run["diverged"] is False
    assert training.final_reward(run) == last["reward"] != first["reward"]

    def diverge(*_):
        raise Diverged(Snapshots([]))

    monkeypatch.setattr(states, "train", diverge)
    run = training.training_run(0, rollouts=2, points=1, **settings)
    assert run["diverged"] is True
    assert run["curve"] == [first]
    assert training.final_reward(run) == 0


def test_a_curriculum_gets_harder_and_its_test_does_not():
    task = Curriculum(levels=(2, 5), per_level=3)
    empty = [task.problem("train", 0, i).prompt.count("0") for i in range(8)]
    assert empty == [2, 2, 2, 5, 5, 5, 5, 5]
    assert task.problem("test", 0, 0).prompt.count("0") == 5
    problem = task.problem("train", 0, 0)
    assert problem.verify(problem.answer)["reward"] == 1
    wrong = problem.answer[:-1] + ("1" if problem.answer[-1] != "1" else "2")
    assert problem.verify(wrong)["reward"] == 0  # nothing for 15 right cells


def test_a_probe_is_the_exact_probability(policy):
    problems = [TASK.problem("train", 0, i) for i in range(2)]
    expected = []
    for problem in problems:
        state = sudoku_state(policy, problem)
        expected.append(log_likelihoods(state.edges()).exp()[state.rewards.argmax()])
    found = probe(policy, problems)
    assert found["probability"] == pytest.approx(float(sum(expected) / 2), rel=1e-3)
    assert found["log_odds"] == pytest.approx(float(sum(p.logit() for p in expected) / 2), abs=1e-3)


def test_contested_problems_are_those_that_the_habit_gets_wrong():
    problems = contested_problems(0, 6)
    candidates = [Sudoku().problem("train", 0, i) for i in range(40)]
    habits = [Sudoku(right=0.0).problem("train", 0, i).answer for i in range(40)]
    wrong = [p for p, habit in zip(candidates, habits) if habit != p.answer]
    assert [p.prompt for p in problems] == [p.prompt for p in wrong[:6]]
    assert all(p.verify(p.answer)["exact"] for p in problems)
    assert len(wrong) < 40  # now and then it is right


def test_lessons_make_the_right_answer_rarer(policy):
    rarer = load_policy(SUDOKU)
    teach(rarer, Sudoku(right=0.0), seed=0, batches=8, lr=5e-4, batch=32)
    problems = [Sudoku().problem("train", 3000, i) for i in range(2)]
    assert probe(rarer, problems)["log_odds"] < probe(policy, problems)["log_odds"] - 0.5


@pytest.mark.slow
def test_a_jump_starts_every_reward_from_the_same_base():
    settings = {"lessons": 1, "rollouts": 1, "every": 1, "puzzles": 1, "problems": 4, "levels": [2, 8], "per_level": 1}
    result = jump(0, right=0.05, rewards=["cell", "curriculum"], **settings)
    cell, curriculum = result["arms"].values()
    assert cell["probes"][0] == curriculum["probes"][0]
    assert [p["rollout"] for p in cell["probes"]] == [0, 1]
    assert cell["probes"][1] != cell["probes"][0]
    assert len(cell["reward"]) == len(curriculum["cell"]) == len(cell["idle"]) == 1
    assert curriculum["exact"] == curriculum["reward"]  # all or nothing


@pytest.mark.slow
def test_arms_start_from_the_same_rare_base():
    arms = {"token": {"ratio": "token"}, "sequence": {}, "huge": {"beta": 1e30, "updates": 12}}
    settings = {"lessons": 1, "rollouts": 3, "every": 2, "puzzles": 1, "problems": 4}
    with pytest.warns(UserWarning, match="NaN or infinite"):
        result = rare_mode(0, arms=arms, right=0.05, **settings)["arms"]
    assert result["token"]["curve"][0] == result["sequence"]["curve"][0] == result["huge"]["curve"][0]
    assert [p["rollout"] for p in result["sequence"]["curve"]] == [0, 2, 3]
    assert result["token"]["curve"][-1] != result["sequence"]["curve"][-1]
    assert len(result["token"]["reward"]) == len(result["token"]["idle"]) == 3
    assert [arm["diverged"] for arm in result.values()] == [False, False, True]


def test_growth_of_log_odds():
    def probes(log_odds):
        return [
            {"rollout": 5 * i, "log_odds": x, "probability": 1 / (1 + math.exp(-x))} for i, x in enumerate(log_odds)
        ]

    logistic = probes([-6, -4, -2, 0, 2, 4, 4, 4.1])  # the tail after 90 % of the way does not count
    fit = growth(logistic)
    assert (fit["slope"], fit["r2"]) == pytest.approx((0.4, 1))
    assert covered(logistic) == pytest.approx(4 / 10.1)  # at -2: 0.12
    jump_ = growth(probes([-6, -6, -6, -6, 0, 6]))
    assert jump_["r2"] < 0.8
    assert jump_["after"] > 10 * jump_["before"]
    assert growth(probes([-6, -6, 4])) is None
    assert growth(probes([-6] * 8)) is None
    assert covered(probes([-6, -5])) is None
    assert covered(probes([0, 1])) is None


def test_compact_gradients_have_the_same_geometry(policy, state):
    gradients = EdgeGradients(state.cells, state.prompts, *state.size)
    small = gradients.compact()
    assert small.jacobian.shape == (len(gradients.jacobian),) * 2
    functions = [lambda e: log_likelihoods(e)[3], lambda e: elbos(e).square().sum()]
    (a, b), (c, d) = ([g.of(f).double() for f in functions] for g in (gradients, small))
    assert a.norm() > 1e-3
    assert abs(cosine(a, b)) < 0.999
    for whole, compact in ((a @ a, c @ c), (a @ b, c @ d), (b @ b, d @ d)):
        assert compact == pytest.approx(float(whole), rel=1e-4)
    torch.testing.assert_close(small.products(), gradients.products(), rtol=1e-3, atol=1e-3)
    assert len(a) == len(parameters_to_vector(policy.parameters()))  # and what it is made from is as it was


def test_noise_is_that_of_gradients_taken_one_by_one(policy, state):
    """Mean, variance and the masks' part of it, from autograd on sampled masks, completion by completion."""
    point = Point.of(state, policy)
    symbols, length = state.size
    moments, direction = point.moments(ELBO(), sequence_ratio, math.inf, samples=3, key=5)
    masked = mask_completions(ELBO(), symbols, length, 3, key=5)
    completions = enumerate_completions(symbols, length)
    masks = ELBO().draw(fold_in(5, torch.arange(len(masked.completion))), length)
    parameters = list(policy.parameters())
    gradients = []
    for row, y in enumerate(masked.completion.tolist()):
        one = masks.of(slice(row, row + 1))
        terms = score(state.cells, state.prompts, completions[y : y + 1], one)
        loss = -(terms - terms.detach()).mean((0, 2)).exp().sum() * point.advantage[y].float()
        gradients.append(parameters_to_vector(torch.autograd.grad(loss, parameters)).double())
    by_completion = torch.stack(gradients).view(len(completions), 3, -1)
    mean = point.probability @ by_completion.mean(1)
    total = point.probability @ (by_completion - mean).square().sum(-1).mean(1)
    masks_part = point.probability @ by_completion.var(1).sum(-1)
    assert moments.variance == pytest.approx(float(total), rel=1e-3)
    assert moments.mask_variance == pytest.approx(float(masks_part), rel=1e-3)
    assert float(moments.mean.norm()) == pytest.approx(float(mean.norm()), rel=1e-3)
    weight = point.probability * point.advantage
    edges = lattice_edges(state.cells, state.prompts, all_symbols(symbols, length))
    target = parameters_to_vector(torch.autograd.grad(weight @ log_likelihoods(edges), parameters))
    assert direction == pytest.approx(cosine(-mean, target), abs=1e-4)
    assert moments.mask_variance > 0.01 * moments.variance
    twice = point.moments(ELBO(draws=4), sequence_ratio, math.inf, samples=64, key=5)[0]
    once = point.moments(ELBO(), sequence_ratio, math.inf, samples=64, key=5)[0]
    assert twice.mask_variance == pytest.approx(once.mask_variance / 4, rel=0.3)


@pytest.mark.slow
def test_noise_at_points_of_a_rollout():
    settings = {"warm": 1, "updates": [0, 1], "puzzles": 1, "free": 2}
    rows = noise(0, **settings, draws=[1], samples=4)["rows"]
    assert len(rows) == 2 * 2 * 3
    coupled = [row for row in rows if row["law"] == "coupled"]
    before, after = ({row["level"]: row for row in coupled if row["updates"] == u} for u in (0, 1))
    assert before["token"]["variance"] == pytest.approx(before["sequence"]["variance"], rel=1e-5)
    assert after["token"]["variance"] != pytest.approx(after["sequence"]["variance"], rel=1e-5)
