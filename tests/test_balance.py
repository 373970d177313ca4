"""Trajectory balance on tables: its target, its gradient, what training reaches, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from balance_cases import CLOSE, GOLDEN, completion_law, path_law, path_scores, policy_of, tensor, total_variation
from decoding_cases import PROMPT
from trajectory_cases import DECODERS, ORDERS

from espo_lightning import (
    ELBO,
    Balance,
    Decoding,
    PolicyGradient,
    Scores,
    Seen,
    Trajectory,
    TruncatedRatio,
    k2_each,
    k2_u,
    mean_centred,
    random_order,
)
from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import all_symbols, elbos, lattice_edges, log_likelihoods
from espo_lightning.lab.methods import read_method
from espo_lightning.lab.tabular import TabularPolicy
from tests.conftest import small_module

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
RTB = json.loads((GOLDEN / "rtb.json").read_text())["enumeration"]
KAPPA = RTB["kappa"]


REWARD = tensor(RTB["reward"])


def balance_losses(policy, reference, name: str, advantages: torch.Tensor, group: int = 1, **settings) -> torch.Tensor:
    """Half the squared residuals of all paths, which are L / kappa times the losses: [27 orders]."""
    scores = replace(path_scores(policy, name), ref=path_scores(reference, name).new.detach())
    objective = Balance(KAPPA, **settings)
    repeated = advantages.repeat_interleave(len(ORDERS[name]))
    return objective(scores, repeated, group)[0] * 3 / KAPPA


def target(reference: torch.Tensor) -> torch.Tensor:
    """pi*, proportional to reference exp(r / kappa)."""
    return (reference.log() + REWARD / KAPPA).softmax(0)


# ---- the target and the gradient ------------------------------------------------------------------------------------


def test_the_recorded_target():
    recorded = RTB["consistent"]
    reference = tensor(recorded["joint_ref"]).softmax(0)
    ours = target(reference)
    torch.testing.assert_close(ours, tensor(recorded["pi_star"]), **CLOSE)
    assert float((reference * (REWARD / KAPPA).exp()).sum().log()) == pytest.approx(recorded["log_Z"], abs=1e-12)
    assert float((ours * REWARD).sum()) == pytest.approx(recorded["E_star_R"], abs=1e-12)
    assert float((ours * (ours / reference).log()).sum()) == pytest.approx(recorded["KL_star_ref"], abs=1e-12)


@pytest.mark.parametrize("name", ORDERS)
def test_loss_and_gradient_vanish_at_the_target(name):
    reference = policy_of(RTB["consistent"]["joint_ref"])
    policy = policy_of(reference.table.detach() + REWARD / KAPPA)
    losses = balance_losses(policy, reference, name, REWARD, group=27 * len(ORDERS[name]))
    if "two tokens" in name or name == "one step":  # such decoders reach other laws only
        assert losses.max() > 1e-3
        return
    assert losses.max() < 1e-26
    (grad,) = torch.autograd.grad(losses.sum(), policy.table)
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["random order", "left to right"])
def test_on_policy_it_descends_the_kl_less_the_reward_whatever_log_z_is(name):
    recorded = RTB["consistent"]
    reference, policy = policy_of(recorded["joint_ref"]), policy_of(recorded["joint_theta"])
    law = path_law(policy, name).exp()
    grads = []
    for log_z in (recorded["log_Z"], recorded["log_Z"] + 3):
        losses = balance_losses(policy, reference, name, REWARD - KAPPA * log_z, centre=False)
        value = (law.detach() * losses).sum()
        grads.append(torch.autograd.grad(value, policy.table, retain_graph=True)[0])
        if log_z == recorded["log_Z"]:
            assert value.item() == pytest.approx(recorded["loss_on_policy"], abs=1e-12)
    torch.testing.assert_close(grads[0], tensor(recorded["grad_on_policy"]), **CLOSE)
    torch.testing.assert_close(*grads, **CLOSE)
    p, ref = policy.table.softmax(0), reference.table.detach().softmax(0)
    objective = (p * (p / ref).log()).sum() - (p * REWARD).sum() / KAPPA
    torch.testing.assert_close(grads[0], torch.autograd.grad(objective, policy.table)[0], **CLOSE)


def test_the_mean_of_a_group_in_the_place_of_log_z_is_unbiased():
    """All pairs of completions, weighed by their chances: G / (G - 1) makes up for what the mean takes away."""
    recorded = RTB["consistent"]
    reference, policy = policy_of(recorded["joint_ref"]), policy_of(recorded["joint_theta"])
    single = replace(path_scores(policy, "left to right"), ref=path_scores(reference, "left to right").new.detach())
    first, second = torch.cartesian_prod(torch.arange(27), torch.arange(27)).unbind(1)
    rows = torch.stack([first, second], 1).flatten()  # 729 groups of two
    of = {key: getattr(single, key)[:, rows] for key in ("new", "ref", "weight")}
    scores = Scores(of["new"], None, of["ref"], of["weight"], single.length[rows])
    p = policy.table.detach().softmax(0)
    chance = (p[first] * p[second]).repeat_interleave(2) / 2
    for advantages in (REWARD[rows], mean_centred(REWARD[rows].view(-1, 2)).flatten()):
        losses, _ = Balance(KAPPA)(scores, advantages, 2)
        (grad,) = torch.autograd.grad((chance * losses).sum() * 3 / KAPPA, policy.table, retain_graph=True)
        torch.testing.assert_close(grad, tensor(recorded["grad_on_policy"]), **CLOSE)
    assert recorded["variance_G2_over_full"] == pytest.approx(0.5)  # without G / (G - 1)


def test_an_inconsistent_reference():
    """Recorded: residuals of all paths, loss and gradient at log Z of the paths."""
    recorded = RTB["inconsistent"]
    reference, policy = policy_of(recorded["table_ref"]), policy_of(recorded["table_theta"])
    for p, key in ((reference, "log_p_ref"), (policy, "log_p_theta")):
        torch.testing.assert_close(completion_law(p).log(), tensor(recorded[key]), **CLOSE)
    losses = balance_losses(policy, reference, "random order", REWARD - KAPPA * recorded["log_Z_path"], centre=False)
    value = (path_law(policy, "random order").exp().detach() * losses).sum()
    assert value.item() == pytest.approx(recorded["loss_on_policy"], abs=1e-12)
    (grad,) = torch.autograd.grad(value, policy.table)
    assert float(grad.norm()) == pytest.approx(recorded["grad_norm"], abs=1e-12)
    torch.testing.assert_close(grad[-1], tensor(recorded["grad_on_policy_first_state"]), **CLOSE)
    torch.testing.assert_close(target(completion_law(reference)), tensor(recorded["pi_star_completions"]), **CLOSE)


# ---- what can be reached --------------------------------------------------------------------------------------------


def minimise(policy, closure, steps: int = 60) -> float:
    optimizer = torch.optim.LBFGS(
        [policy.table], max_iter=steps * 10, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def evaluate():
        optimizer.zero_grad()
        value = closure()
        value.backward()
        return value

    optimizer.step(evaluate)
    return closure().item()


def least_loss(reference, name: str) -> tuple[float, TabularPolicy]:
    """The smallest mean over all paths of half the squared residual, log Z profiled out, and who has it."""
    policy, paths_ = policy_of(reference.logits().detach()), 27 * len(ORDERS[name])

    def closure():
        return balance_losses(policy, reference, name, REWARD, paths_).mean() * (paths_ - 1) / paths_

    return minimise(policy, closure), policy


def test_a_consistent_reference_can_be_tilted_in_random_order():
    reference = policy_of(RTB["consistent"]["joint_ref"])
    loss, policy = least_loss(reference, "random order")
    assert loss < 1e-10
    assert total_variation(completion_law(policy), tensor(RTB["consistent"]["pi_star"])) < 1e-4


def test_an_inconsistent_one_cannot_but_from_the_left_it_can():
    """A uniform law of positions cannot become the tilted law of paths, where the orders disagree."""
    recorded = RTB["inconsistent"]
    reference = policy_of(recorded["table_ref"])
    loss, policy = least_loss(reference, "random order")
    assert loss == pytest.approx(recorded["reach_random_order"]["loss"], rel=1e-4)
    pi_star = target(completion_law(reference))
    distance = total_variation(completion_law(policy), pi_star)
    assert distance == pytest.approx(recorded["reach_random_order"]["tv_to_pi_star"], abs=1e-3)
    assert distance > 0.05
    loss, policy = least_loss(reference, "left to right")
    assert loss < 1e-10
    own = target(completion_law(reference, "left to right"))
    assert total_variation(completion_law(policy, "left to right"), own) < 1e-4


def train_rtb(reference, decoding: Decoding, rollouts: int, seed: int, group: int = 32) -> TabularPolicy:
    """As the trainer does it: decode, note the trace, score policy and reference on it, balance, Adam; on-policy."""
    policy, law, objective = policy_of(reference.logits().detach()), Trajectory(), Balance(KAPPA)
    optimizer = torch.optim.Adam([policy.table], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 - n / rollouts) ** 2)
    prompts, place = PROMPT.repeat_each(group), 3 ** torch.arange(3)
    for rollout in range(rollouts):
        keys = fold_in(fold_in(seed, rollout), torch.arange(group))
        ids, trace = decoding.decode(policy, prompts, keys)
        masks = law.masks(keys, Seen.whole(keys, 3)._replace(trace=trace, passes=decoding.passes))
        with torch.no_grad():
            ref = law.log_probs(reference, prompts, ids, masks)
        new = law.log_probs(policy, prompts, ids, masks)
        scores = Scores(new, None, ref, masks.weight.double(), torch.full((group,), 3))
        advantages = mean_centred(REWARD[(ids * place).sum(1)][None])[0]
        optimizer.zero_grad()
        objective(scores, advantages, group)[0].mean().backward()
        optimizer.step()
        schedule.step()
    return policy


@pytest.mark.parametrize("name", ["random order", "left to right"])
def test_training_ends_at_the_target_of_a_consistent_reference(name):
    """From the reference, with sampled groups of 32: within a total variation of .01 of pi*."""
    reference = policy_of(RTB["consistent"]["joint_ref"])
    pi_star = tensor(RTB["consistent"]["pi_star"])
    assert total_variation(completion_law(reference, name), pi_star) > 0.2
    policy = train_rtb(reference, DECODERS[name], 400, seed=1)
    assert total_variation(completion_law(policy, name), pi_star) < 0.01


@pytest.mark.slow
def test_training_does_not_on_an_inconsistent_reference_in_random_order():
    """It ends where KL(paths) - E r / kappa is least, which is not pi*."""
    reference = policy_of(RTB["inconsistent"]["table_ref"])
    best, prior = policy_of(reference.table.detach()), path_law(reference, "random order").detach()

    def objective():
        log_law = path_law(best, "random order")
        return (log_law.exp() * (log_law - prior - REWARD.repeat_interleave(6) / KAPPA)).sum()

    minimise(best, objective)
    pi_star = target(completion_law(reference))
    assert total_variation(completion_law(best), pi_star) > 0.03
    policy = train_rtb(reference, DECODERS["random order"], 400, seed=1)
    assert total_variation(completion_law(policy), pi_star) > 0.03
    assert total_variation(completion_law(policy), completion_law(best)) < 0.015


def test_balancing_elbos_pins_the_elbos_and_not_the_law():
    """TraFL's target on an inconsistent reference: loss 0, and yet another law than pi*."""
    reference = policy_of(RTB["inconsistent"]["table_ref"])
    policy = policy_of(reference.table.detach())
    ref = elbos(lattice_edges(reference, PROMPT, all_symbols(3, 3))).detach()

    def closure():
        new = elbos(lattice_edges(policy, PROMPT, all_symbols(3, 3)))
        place = torch.zeros(1, 27, 3, dtype=torch.float64)
        place[..., 0] = 1
        weight = torch.ones_like(place)
        scores = Scores(new.view(1, 27, 1) * place, None, ref.view(1, 27, 1) * place, weight, torch.full((27,), 3))
        return Balance(KAPPA)(scores, REWARD, 27)[0].mean()

    assert minimise(policy, closure) < 1e-10
    law = log_likelihoods(lattice_edges(policy, PROMPT, all_symbols(3, 3))).exp().detach()
    assert total_variation(law, target(completion_law(reference))) > 0.05


# ---- refusals -------------------------------------------------------------------------------------------------------


FREE = Decoding(4, 4, 4, order=random_order)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": Decoding(4, 4, 4)}, "the order of this decoding depends on the policy"),
        ({"decoding": replace(FREE, block_length=2, order=Decoding().order)}, "order of this decoding depends"),
        ({"likelihood": Trajectory(2)}, "sampled or merged steps"),
        ({"likelihood": Trajectory(2, entropy=True)}, "sampled or merged steps"),
        ({"likelihood": Trajectory(merge=2)}, "sampled or merged steps"),
        ({"objective": Balance(square=k2_each)}, "the square of each"),
        ({"objective": Balance(square=k2_u)}, "square=k2_u needs independent mask draws"),
        ({"decoding": replace(FREE, temperature=0.0)}, "decoding.temperature is 0"),
        ({"decoding": replace(FREE, temperature=0.5)}, "make them equal"),
        ({"decoding": replace(FREE, top_p=0.9)}, "needs decoding.top_p=1"),
        ({"decoding": replace(FREE, prefix_cache=True)}, "prefix_cache"),
        ({"decoding": replace(FREE, corrector=2)}, "corrector"),
        ({"micro_batch": 6}, "micro_batch must be a multiple of group_size 4, as Balance weighs"),
        ({"objective": Balance(square=k2_u), "likelihood": ELBO(1)}, "square=k2_u needs independent mask draws"),
        ({"objective": Balance(kl=k2_u, beta=1.0), "likelihood": ELBO(1)}, "kl=k2_u needs independent mask draws"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_module(**{"decoding": FREE, "likelihood": Trajectory(), "objective": Balance(0.1)} | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoding": replace(FREE, steps=2)},
        {"decoding": Decoding(4, 1, 4)},
        {"decoding": Decoding(4, 4, 1)},
        {"decoding": replace(FREE, temperature=0.5), "likelihood": Trajectory(temperature=0.5)},
        {"objective": Balance(0.1, centre=False), "micro_batch": 6},
        {"objective": Balance(0.1, square=k2_u), "likelihood": ELBO(2), "decoding": Decoding(4, 4, 4, top_p=0.9)},
    ],
)
def test_what_goes_together_is_not(settings):
    small_module(**{"decoding": FREE, "likelihood": Trajectory(), "objective": Balance(0.1)} | settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balance(0.0), "Balance.temperature must be positive"),
        (lambda: Balance(math.nan), "Balance.temperature must be positive"),
        (lambda: Balance(clip_range=-1.0), "clip_range must be 0 or positive"),
        (lambda: Balance(beta=-1.0), "beta must be 0"),
        (lambda: TruncatedRatio(0.0), "TruncatedRatio.clip must lie between 0 and 1"),
        (lambda: TruncatedRatio(1.0), "TruncatedRatio.clip must lie between 0 and 1"),
        (lambda: PolicyGradient(clip_high=-0.1), "clip_high must be 0 or positive"),
    ],
)
def test_nonsense_is_refused_by_constructors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_balance_has_a_reference_where_it_needs_one_and_never_leaves_out_groups():
    assert small_module(decoding=FREE, likelihood=Trajectory(), objective=Balance()).reference is not None
    old = Balance(to_old=True)
    assert (old.reference, old.old, Balance().old, replace(old, beta=0.1).reference) == (False, True, False, True)
    assert not any(objective.idle for objective in (Balance(), old))
    assert (Balance().groups, Balance(centre=False).groups) == (True, False)
    assert read_method(Path(__file__).parents[1] / "experiments/methods/rtb.yaml").objective == Balance(0.1)
