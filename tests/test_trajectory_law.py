"""Which law a trace is scored under, one hidden position, and what is refused."""

import math

import pytest
import torch
from conftest import small_policy
from decoding_cases import PROMPT, keys_of, rng, some_prompts
from trajectory_cases import (
    ALL,
    L,
    V,
    policy_fixture,  # noqa: F401
    seen_of,
)

from espo_lightning import (
    Decoding,
    HighestEntropy,
    OneMasked,
    Prompts,
    Seen,
    Trajectory,
    log_probs,
    random_order,
)
from espo_lightning.lab.exact import (
    subset_log_probs,
)
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.scoring.score import DRAWS, token_log_probs
from espo_lightning.training.gradient import loss_parts
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- the law that is scored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mask_token_has_no_part_in_the_law(temperature):
    policy, prompts = small_policy(), some_prompts(4)
    with torch.no_grad():
        policy.model.lm_head.weight[policy.mask_id] = policy.model.lm_head.weight[9] * 1.1  # a likely mask token
    decoding = Decoding(6, 6, 3, temperature, random_order)
    ids, trace = decoding.decode(policy, prompts, keys_of(8, 4))
    law = Trajectory(temperature=temperature)
    masks = law.masks(torch.arange(4), Seen.of(policy, prompts, ids, torch.arange(4), 1, trace, decoding.passes))
    ours = law.log_probs(policy, prompts, ids, masks)
    for step in range(3):
        canvas = torch.cat([prompts.ids, ids.masked_fill(trace.steps >= step, policy.mask_id)], 1)
        logits = policy.model(canvas).logits[:, 5:]
        logits[..., policy.mask_id] = -math.inf
        expected = (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        here = trace.steps == step
        torch.testing.assert_close(ours[step][here], expected[here], rtol=1e-4, atol=1e-5)
        assert not ours[step][~here].any()
    plain = log_probs(policy, prompts, ids, masks)
    assert (ours - plain).abs().max() > 1e-3
    grads = torch.autograd.grad(ours.sum(), list(policy.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_many_draws_take_turns_without_a_graph():
    policy, prompts, ids = small_policy(), some_prompts(3), torch.randint(7, 30, (3, 20), generator=rng(9))
    steps = torch.arange(20).expand(3, -1)
    law = Trajectory()
    masks = law.masks(torch.arange(3), seen_of(steps))
    rows = []
    policy.model.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        turns = law.log_probs(policy, prompts, ids, masks)
    assert rows == [3 * DRAWS, 3 * DRAWS, 3 * (20 - 2 * DRAWS)]
    whole = law.log_probs(policy, prompts, ids, masks)
    assert rows[3:] == [60]
    torch.testing.assert_close(turns, whole.detach(), rtol=1e-5, atol=1e-6)


def kept_bytes(policy, steps: int, view_by_view: bool) -> int:
    """The most that one part of an update keeps for its backward pass."""
    prompts, ids = some_prompts(2), torch.randint(7, 30, (2, 24), generator=rng(9))
    seen = seen_of(torch.arange(24).expand(2, -1) * steps // 24, passes=steps)
    law, sizes, storages = Trajectory(), [], {}
    masks = law.masks(seen.keys, seen)
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that no address recurs
        return tensor

    def log_probs_of(drawn):
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            values = law.log_probs(policy, prompts, ids, drawn)
        if values.requires_grad:
            sizes.append(sum(storage.nbytes() for storage in storages.values()))
        return values

    _, parts = loss_parts(log_probs_of, masks, lambda new: ((new * masks.weight).sum(), {}), view_by_view)
    for part, _ in parts:
        part.backward()
    assert len(sizes) == (steps if view_by_view else 1)
    return max(sizes)


def test_view_by_view_an_update_keeps_no_more_for_more_steps():
    """Its activations are those of one step, which scores fewer tokens where there are more steps."""
    few, many = (kept_bytes(small_policy(), steps, view_by_view=True) for steps in (4, 24))
    assert many <= few
    whole = [kept_bytes(small_policy(), steps, view_by_view=False) for steps in (4, 24)]
    assert whole[1] > 4 * whole[0]


# ---- one hidden position --------------------------------------------------------------------------------------------


def test_one_masked_is_the_pseudo_likelihood(policy):
    tokens = ALL[5]
    table = subset_log_probs(policy, PROMPT, tokens)
    expected = sum(table[1 << i, i] for i in range(3))
    masks = OneMasked(None).draw(torch.arange(1), 3)
    terms = OneMasked(None).terms(policy, PROMPT, tokens[None], masks)
    torch.testing.assert_close(terms.sum(-1).mean(0)[0], expected, rtol=0, atol=1e-12)
    assert not OneMasked(None).random
    assert (masks.hidden.sum(-1) == 1).all()


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_sampled_positions_estimate_it_without_bias_and_without_replacement(policy, draws):
    n, tokens = 12_000, ALL[5:6]
    masks = OneMasked(draws).draw(keys_of(10, n), 3)
    assert (masks.hidden.sum(0) <= 1).all()
    assert torch.equal(masks.weight, 3.0 * masks.hidden)
    with torch.no_grad():
        s = OneMasked(draws).terms(policy, PROMPT.repeat_each(n), tokens.expand(n, -1), masks).sum(-1).mean(0).double()
        whole = OneMasked(None).terms(policy, PROMPT, tokens, OneMasked(None).draw(torch.arange(1), 3)).sum(-1).mean()
    assert abs(s.mean() - whole) <= 4.5 * s.std() / math.sqrt(n) + 1e-9
    assert (s.std() < 1e-9) == (draws == 3)


def test_the_pseudo_likelihood_has_no_mean_gradient_under_a_consistent_law():
    policy = TabularPolicy(V, L, generator=rng(2), consistent=True)
    masks = OneMasked(None).draw(torch.arange(27), 3)
    s = OneMasked(None).terms(policy, PROMPT.repeat_each(27), ALL, masks).sum(-1).mean(0)
    (grad,) = torch.autograd.grad((policy.table.detach().softmax(0) * s).sum(), policy.table)
    assert grad.abs().max() < 1e-14


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trajectory(0), "draws must be at least 1, got 0"),
        (lambda: Trajectory(merge=0), "merge must be at least 1, got 0"),
        (lambda: Trajectory(entropy=True), "no effect with draws=null"),
        (lambda: Trajectory(temperature=0.0), "temperature must be positive"),
        (lambda: Trajectory(temperature=math.nan), "temperature must be positive"),
        (lambda: HighestEntropy(0), "draws must be at least 1, got 0"),
        (lambda: HighestEntropy(temperature=-1.0), "temperature must be positive"),
        (lambda: OneMasked(0), "draws must be at least 1, got 0"),
        (lambda: OneMasked(5).check(small_policy(), 4), "likelihood.draws is 5, but decoding.length"),
        (lambda: Trajectory().draw(torch.arange(2), 4), "need its trace"),
        (lambda: Trajectory().check_decoding(Decoding(temperature=0.9)), "make them equal"),
        (lambda: Trajectory().check_decoding(Decoding(top_p=0.9)), "needs decoding.top_p=1, got 0.9"),
        (lambda: Trajectory().check_decoding(Decoding(16, 8, 16, prefix_cache=True)), "prefix_cache"),
        (lambda: Trajectory().check_decoding(Decoding(corrector=1)), "corrector"),
        (lambda: HighestEntropy().check_decoding(Decoding(steps=4), 5), "5 updates, but decoding has 4"),
        (lambda: SFTModule(small_policy(), 4, Trajectory()), "examples were not decoded"),
    ],
)
def test_what_cannot_be_scored_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trace_is_asked_for_by_those_who_read_it_only():
    assert Trajectory.traced
    assert HighestEntropy.traced
    assert not OneMasked.traced
    assert Trajectory().exact
    assert not any(t.exact for t in (Trajectory(2), Trajectory(merge=2), HighestEntropy(), OneMasked(None)))
    Trajectory().check_decoding(Decoding())
    assert token_log_probs(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(-math.log(2))
    assert Prompts(PROMPT.ids, None).attention(3) is None
