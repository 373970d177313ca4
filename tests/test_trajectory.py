"""Scores along traces against enumeration: the sampler's own law, exact gradients, samples of steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from decoding_cases import PROMPT, assert_law, keys_of, rng
from trajectory_cases import (
    ALL,
    DECODERS,
    ORDERS,
    L,
    V,
    paths,
    policy_fixture,  # noqa: F401
    seen_of,
)

from espo_lightning import (
    Decoding,
    HighestEntropy,
    Likelihood,
    Trajectory,
    log_probs,
)
from espo_lightning.lab.exact import (
    all_symbols,
    lattice_edges,
    log_likelihoods,
    low_confidence_log_likelihoods,
)
from espo_lightning.lab.tabular import TabularPolicy

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "methods" / "trajectory.json").read_text())["enumeration"]
EACH = pytest.mark.parametrize("name", ORDERS)


def scores(policy, likelihood: Likelihood, completion, steps, keys=None, entropy=None) -> torch.Tensor:
    """S of completions with given steps: [N]."""
    seen = seen_of(steps, entropy)
    masks = likelihood.masks(seen.keys if keys is None else keys, seen)
    return likelihood.terms(policy, PROMPT.repeat_each(len(completion)), completion, masks).sum(-1).mean(0)


def path_log_prob(logits: torch.Tensor, tokens: list[int], steps: list[int], temperature: float = 1.0) -> torch.Tensor:
    """From the table, step by step: the sum of the tokens' log-probabilities, each in the state of its step."""
    total = torch.zeros((), dtype=torch.float64)
    for i, token in enumerate(tokens):
        state = sum((V if steps[j] >= steps[i] else tokens[j]) * (V + 1) ** j for j in range(L))
        total = total + (logits[state, i] / temperature).log_softmax(-1)[token]
    return total


@EACH
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sum_along_a_trace_is_the_samplers_log_law(policy, name, temperature):
    completion, steps = paths(ORDERS[name])
    ours = scores(policy, Trajectory(temperature=temperature), completion, steps)
    logits = policy.logits()
    expected = [path_log_prob(logits, y, s, temperature) for y, s in zip(completion.tolist(), steps.tolist())]
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=0, atol=1e-12)
    law = ours.exp() / len(ORDERS[name])
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    n = 40_000
    decoding = DECODERS[name]
    decoding = Decoding(**{**vars(decoding), "temperature": temperature})
    ids, trace = decoding.decode(policy, PROMPT.repeat_each(n), keys_of(1, n))
    cell = {tuple(y) + tuple(s): i for i, (y, s) in enumerate(zip(completion.tolist(), steps.tolist()))}
    drawn = torch.tensor([cell[tuple(row)] for row in torch.cat([ids, trace.steps], 1).tolist()])
    merged = law.detach() * n >= 5  # cells for the chi-square law; the others are one
    observed, law = torch.bincount(drawn, minlength=len(cell)), law.detach()
    both = [torch.cat([x[merged], x[~merged].sum(0, keepdim=True)]) for x in (observed, law)]
    kept = both[1] * n >= 5
    assert_law(both[0][kept], both[1][kept] / both[1][kept].sum())


def test_likelihoods_of_completions_are_those_of_the_lattice(policy):
    completion, steps = paths(ORDERS["random order"])
    ours = (scores(policy, Trajectory(), completion, steps).view(27, 6).logsumexp(1) - math.log(6)).double()
    edges = lattice_edges(policy, PROMPT, all_symbols(V, L))
    torch.testing.assert_close(ours, log_likelihoods(edges), rtol=0, atol=1e-12)


def test_recorded_paths():
    """golden/methods/trajectory.json: other code, another policy."""
    policy = TabularPolicy(V, L, generator=rng(0))
    policy.table.data = torch.tensor(GOLDEN["table"], dtype=torch.float64)
    steps = torch.tensor(GOLDEN["orders"]).argsort(-1)  # an order names the position of each step
    completion, steps = paths(steps, ALL[GOLDEN["completions_checked"]])
    for likelihood, key in ((Trajectory(), "token_part"), (Trajectory(merge=2), "token_part_two_steps_merged")):
        ours = scores(policy, likelihood, completion, steps).view(6, 6).double()
        torch.testing.assert_close(ours, torch.tensor(GOLDEN[key], dtype=torch.float64), rtol=0, atol=1e-12)


# ---- gradients ------------------------------------------------------------------------------------------------------


def surrogate_gradient(policy, likelihood, name: str, advantages: torch.Tensor, law: torch.Tensor) -> torch.Tensor:
    """sum over all paths of P(path) A(y) grad S(path)."""
    completion, steps = paths(ORDERS[name])
    s = scores(policy, likelihood, completion, steps)
    weight = law * advantages.repeat_interleave(len(ORDERS[name]))
    return torch.autograd.grad((weight * s).sum(), policy.table)[0]


@EACH
@pytest.mark.parametrize("centred", [True, False])
def test_the_policy_gradient_is_exact_where_the_order_is_free(policy, name, centred):
    rewards = torch.rand(27, generator=rng(1), dtype=torch.float64)
    completion, steps = paths(ORDERS[name])
    logits = policy.logits()
    log_law = torch.stack([path_log_prob(logits, y, s) for y, s in zip(completion.tolist(), steps.tolist())])
    law = log_law.exp() / len(ORDERS[name])
    mean = (law.view(27, -1).sum(1) * rewards).sum()
    (exact,) = torch.autograd.grad(mean, policy.table)
    advantages = rewards - mean.detach() if centred else rewards
    ours = surrogate_gradient(policy, Trajectory(), name, advantages, law.detach())
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    if name == "random order":
        merged = surrogate_gradient(policy, Trajectory(merge=2), name, advantages, law.detach())
        assert (merged - exact).abs().max() > 1e-3  # merging is another likelihood


def low_confidence_paths(policy) -> torch.Tensor:
    """P(path) of LLaDA's decoder for every completion and order: [27 x 6]."""
    completion, steps = paths(ORDERS["random order"])
    probability = policy.logits().softmax(-1)
    chances = []
    for tokens, order in zip(completion.tolist(), steps.tolist()):
        chance = torch.ones((), dtype=torch.float64)
        for step in range(3):
            hidden = [i for i in range(3) if order[i] >= step]
            state = sum((V if i in hidden else tokens[i]) * (V + 1) ** i for i in range(3))
            (i,) = (i for i in hidden if order[i] == step)
            mine = probability[state, i, tokens[i]]
            rivals = (probability[state, j] for j in hidden if j != i)
            chance = chance * mine * math.prod((p * (p < mine)).sum() for p in rivals)
        chances.append(chance)
    return torch.stack(chances)


def test_under_low_confidence_the_token_part_is_not_exact(policy):
    """The decoder's choice of positions depends on the policy as well, and this part of the gradient is left out."""
    rewards = torch.rand(27, generator=rng(1), dtype=torch.float64)
    law = low_confidence_paths(policy)
    edges = lattice_edges(policy, PROMPT, all_symbols(V, L))
    own = low_confidence_log_likelihoods(edges).exp()
    torch.testing.assert_close(law.view(27, 6).sum(1), own, rtol=0, atol=1e-12)
    mean = (own * rewards).sum()
    (exact,) = torch.autograd.grad(mean, policy.table)
    advantages = rewards - mean.detach()
    ours = surrogate_gradient(policy, Trajectory(), "random order", advantages, law.detach())
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), 0)
    assert 0.5 < cosine < 0.99
    assert (ours - exact).abs().max() > 1e-3
    assert (law == 0).double().mean() > 0.2  # and many paths are impossible, other ones for other policies


# ---- samples of steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random order", "random order, two tokens a step"])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("entropy", [False, True])
def test_sampled_steps_estimate_score_and_gradient_without_bias(policy, name, draws, entropy):
    """Within 4.5 standard errors for 20,000 keys; the entropies are far from even."""
    n, tokens, order = 20_000, ALL[14:15], ORDERS[name][1:2]
    nats = torch.tensor([[0.05, 1.0, 0.3]]).expand(n, -1)
    law = Trajectory(draws=draws, entropy=entropy)
    steps = order.expand(n, -1)
    masks = law.masks(keys_of(3, n), seen_of(steps, nats))
    lp = log_probs(policy, PROMPT.repeat_each(n), tokens.expand(n, -1), masks)
    s = (lp * masks.weight).sum(-1).mean(0).double()
    (exact,) = scores(policy, Trajectory(), tokens, order)
    assert abs(s.mean() - exact) < 4.5 * s.std() / math.sqrt(n) + 1e-9
    assert (s.std() > 0.1) == (entropy or draws < len(order.unique()))  # two of two steps leave nothing to chance
    (ours,) = torch.autograd.grad(s.mean(), policy.table)
    (expected,) = torch.autograd.grad(exact, policy.table)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.03)
    scored = masks.weight != 0  # [M, B, L]: one step a draw
    chance = 1 / masks.weight[scored].unique()
    assert len(chance) == (len(order.unique()) if entropy else 1)


def test_steps_are_spread_evenly_over_their_law():
    """As many uniform draws as steps take every step once: nothing is left to chance."""
    steps = torch.stack([torch.randperm(8, generator=rng(i)) for i in range(50)])
    masks = Trajectory(draws=8).masks(keys_of(4, 50), seen_of(steps))
    everything = Trajectory().masks(keys_of(4, 50), seen_of(steps))
    for mine, whole in zip((masks.hidden, masks.weight), (everything.hidden, everything.weight)):
        torch.testing.assert_close(mine.float(), whole.float())
    by_entropy = Trajectory(draws=4, entropy=True).masks(keys_of(4, 50), seen_of(steps, (steps < 2).float()))
    chosen = (by_entropy.weight != 0).float().argmax(-1)
    found = steps.gather(1, chosen.T)
    assert torch.equal(found, torch.tensor([0, 0, 1, 1]).expand(50, -1))
    assert Trajectory(draws=3).random
    assert not Trajectory().random


def test_steps_are_counted_within_each_completion():
    """Numbers with gaps, as a threshold leaves them; what early_stop filled is always hidden, and never scored."""
    steps = torch.tensor([[0, 3, 3, 7, 9, -1], [0, 1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 5]])
    masks = Trajectory().masks(torch.arange(3), seen_of(steps, passes=10))
    assert masks.hidden.shape == (10, 3, 6)
    expected = {0: "111111", 1: "011111", 2: "000111", 3: "000011"}
    for step, row in expected.items():
        assert masks.hidden[step, 0].tolist() == [c == "1" for c in row]
    scored = masks.weight != 0
    assert [row.nonzero().flatten().tolist() for row in scored[:, 0]] == [[0], [1, 2], [3], [4], *[[]] * 6]
    assert [int(n) for n in scored.any(-1).sum(0)] == [4, 6, 1]
    assert (masks.weight[scored] == 10).all()  # the mean over ten draws is the sum over the steps
    merged = Trajectory(merge=3).masks(torch.arange(3), seen_of(steps, passes=10))
    assert merged.hidden.shape == (4, 3, 6)
    assert [row.nonzero().flatten().tolist() for row in (merged.weight != 0)[:, 0]] == [[0, 1, 2, 3], [4], [], []]
    own = Trajectory(draws=3).masks(torch.arange(3), seen_of(steps, passes=10))
    assert (own.weight != 0).any(-1).all()  # a completion draws from the steps that it has
    assert [w.unique().tolist() for w in own.weight.unbind(1)] == [[0.0, 4.0], [0.0, 6.0], [1.0]]


def test_masks_along_a_trace_depend_on_their_own_key_and_trace():
    steps = torch.stack([torch.randperm(6, generator=rng(i)) for i in range(20)])
    nats, rows = torch.rand(20, 6, generator=rng(5)), torch.tensor([3, 11])
    for law in (Trajectory(), Trajectory(2), Trajectory(2, entropy=True), Trajectory(merge=2), HighestEntropy(2)):
        seen = seen_of(steps, nats, passes=6)
        whole, part = law.masks(keys_of(6, 20), seen), law.masks(keys_of(6, 20)[rows], seen.of_rows(rows))
        assert torch.equal(whole.of(rows).hidden, part.hidden)
        assert torch.equal(whole.of(rows).weight, part.weight)
        other = law.masks(keys_of(7, 20), seen)
        assert torch.equal(whole.weight, other.weight) != (law.random and isinstance(law, Trajectory))


def test_highest_entropy_takes_the_next_steps_in_every_update():
    steps = torch.tensor([[0, 1, 2, 3, 3], [3, 3, 0, 1, 2]])
    nats = torch.tensor([[0.1, 0.9, 0.5, 0.6, 0.2], [1.0, 0.0, 0.2, 0.1, 0.7]])  # a step's mean counts, not its sum
    for update, expected in enumerate([[[1], [4]], [[2], [0, 1]], [[3, 4], [2]], [[0], [3]], [[], []]]):
        masks = HighestEntropy().masks(torch.arange(2), seen_of(steps, nats, update=update, passes=5))
        found = [] if not len(masks.weight) else [row.nonzero().flatten().tolist() for row in masks.weight[0]]
        assert found == expected
    both = HighestEntropy(2).masks(torch.arange(2), seen_of(steps, nats, update=1, passes=5))
    assert [row.nonzero().flatten().tolist() for row in both.weight[:, 1]] == [[2], [3]]
    assert (both.weight[both.weight != 0] == 1).all()
