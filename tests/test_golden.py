"""Agreement with the authors' trainer: its numbers on random weights and given masks (tests/golden/README.md)."""

import pytest
import torch
from checkpoints import golden_folder
from golden_cases import (
    AS_THEIRS,
    COMPLETION,
    GOLDEN,
    IDS,
    LENGTH,
    MASK,
    PAD,
    loss_of,
    masks_of,
    their_name,
)

from espo_lightning import (
    Decoding,
    Masks,
    Policy,
    Prompts,
    even_schedule,
    generate,
    k1_score,
    k2,
    k3,
    leave_one_out,
    load_policy,
    score,
)

TOLERANCE = 1e-5  # nats; the authors' own float32 and float64 ELBOs differ by 5e-6
ITERATIONS, DRAWS = 4, 2
PADDED = (IDS == PAD).any(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Policy:
    return load_policy(golden_folder(tmp_path_factory.mktemp("golden") / "tiny", "tiny.safetensors"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Policy:
    return load_policy(golden_folder(tmp_path_factory.mktemp("golden") / "gen", "gen.safetensors"))


@pytest.fixture(params=["elbo", "elbo_shifted"])
def model(request, tiny) -> tuple[Policy, dict]:
    """A policy and the authors' ELBOs for it."""
    shift = int(request.param == "elbo_shifted")
    return Policy(tiny.model, tiny.tokenizer, mask_id=tiny.mask_id, shift=shift), GOLDEN[request.param]


def elbo(policy, prompts: Prompts, completion: torch.Tensor, masks: Masks) -> torch.Tensor:
    with torch.no_grad():
        return score(policy, prompts, completion, masks).sum(-1).mean(0)


def assert_equal(ours: torch.Tensor, theirs, tolerance: float = TOLERANCE) -> None:
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    # and two units in the last place, as kernels of different processors differ
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.float32).eps, atol=tolerance)


def test_the_fixture_holds_what_it_is_for(tiny):
    assert tiny.mask_id == MASK
    assert PADDED.tolist() == [False, True, False, False, False, False]
    assert (COMPLETION != MASK).all()
    counts = {int(k) for row in GOLDEN["noised"] for m in row for k in masks_of([m]).hidden.sum(-1).flatten()}
    assert counts == set(range(LENGTH + 1))  # empty and full masks are among them
    assert {c["clip_low"] for c in GOLDEN["loss"]["cases"]} == {0.2, 4e-4, 0.1}
    assert {c["beta"] for c in GOLDEN["loss"]["cases"]} == {0.0, 0.01}
    assert {c["draws"] for c in GOLDEN["loss"]["cases"]} == {1, 2}


# ---- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coupled", "single"])
@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_elbo(model, kind, iteration):
    policy, theirs = model
    noised, coupled = GOLDEN["noised"][iteration], kind == "coupled"
    for draw in range(DRAWS):
        ours = elbo(policy, AS_THEIRS, COMPLETION, masks_of([noised[draw]], coupled=coupled))
        assert_equal(ours, theirs[kind][iteration][draw])
    ours = elbo(policy, AS_THEIRS, COMPLETION, masks_of(noised, coupled=coupled))
    assert_equal(ours, [row[iteration] for row in theirs[f"{kind}_mean"]])


def test_elbo_by_chunks(tiny):
    rows = GOLDEN["chunks"]["rows"]
    noised = iter(GOLDEN["chunks"]["noised"])
    for start in range(0, len(IDS), rows):
        chunk = slice(start, start + rows)
        for iteration in range(ITERATIONS):
            masks = masks_of([next(noised) for _ in range(DRAWS)])
            theirs = [row[iteration] for row in GOLDEN["chunks"]["elbo"][chunk]]
            assert_equal(elbo(tiny, AS_THEIRS.of(chunk), COMPLETION[chunk], masks), theirs)
    assert next(noised, None) is None


def test_pads_are_masked_here_and_attended_to_there(model):
    """With the pads masked, the padded rows differ from the authors' ELBOs, and no other row does."""
    policy, theirs = model
    prompts = Prompts(IDS, IDS != PAD)
    for iteration, noised in enumerate(GOLDEN["noised"]):
        ours = elbo(policy, prompts, COMPLETION, masks_of(noised))
        difference = ours - torch.tensor(theirs["coupled_mean"])[:, iteration]
        assert (difference[~PADDED].abs() < TOLERANCE).all()
        assert (difference[PADDED].abs() > 0.01).all()
        for row in PADDED.nonzero().flatten().tolist():  # and what they differ by is the padding: without it, the same
            bare = Prompts(IDS[row][IDS[row] != PAD][None], None)
            alone = elbo(policy, bare, COMPLETION[row : row + 1], masks_of(noised).of(slice(row, row + 1)))
            assert_equal(alone, ours[row : row + 1])


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["loss"]["cases"], ids=lambda c: "-".join(str(v) for v in list(c.values())[:6]))
def test_loss_and_gradients(tiny, case):
    tiny.zero_grad()
    loss, statistics = loss_of(tiny, case)
    loss.backward()
    assert_equal(loss.detach(), case["loss"], 1e-6)
    norms = {their_name(name): parameter.grad.norm() for name, parameter in tiny.model.named_parameters()}
    assert sorted(norms) == sorted(GOLDEN["loss"]["parameters"])
    ours = torch.stack([norms[name] for name in GOLDEN["loss"]["parameters"]])
    torch.testing.assert_close(ours, torch.tensor(case["grad_norms"]), rtol=2e-5, atol=0)
    torch.testing.assert_close(ours.norm(), torch.tensor(case["grad_norm_total"]), rtol=2e-5, atol=0)
    if statistics is not None:
        positive = torch.tensor(GOLDEN["loss"]["advantages"]) > 0
        # theirs counts what the clip changes; ours also the ratios on the side where the minimum is not the clipped one
        assert_equal((statistics.clip_low * ~positive).mean(), case["clipped_low"], 1e-7)
        assert_equal((statistics.clip_high * positive).mean(), case["clipped_high"], 1e-7)
        if case["beta"]:
            assert_equal(statistics.kl.mean() / LENGTH, case["kl"], 1e-5)


@pytest.mark.parametrize(("name", "estimator"), [("k1", k1_score), ("k2", k2), ("k3", k3)])
def test_kl_estimators(name, estimator):
    policy, ref = (torch.tensor(GOLDEN["kl"][key]).float() for key in ("policy", "ref"))
    policy.requires_grad_()
    value = estimator((policy - ref)[None])
    (grad,) = torch.autograd.grad(value.sum(), policy)
    assert_equal(value.detach(), GOLDEN["kl"][name]["value"])
    assert_equal(grad, GOLDEN["kl"][name]["grad"])


@pytest.mark.parametrize("case", GOLDEN["advantages"], ids=lambda c: c["name"])
def test_advantages(case):
    rewards = case["rewards"]
    if rewards is None:  # several reward functions: they add the weighted rewards and skip missing ones
        per_function = torch.tensor(
            [[float("nan") if r is None else r for r in f] for f in case["rewards_per_function"]]
        )
        rewards = (per_function * torch.tensor(case["reward_weights"]).unsqueeze(1)).nansum(0)
    ours = leave_one_out(torch.as_tensor(rewards).view(-1, case["num_generations"]))
    assert_equal(ours.flatten(), case["advantages"])


# ---- decoding -------------------------------------------------------------------------------------------------------


class Recorder:
    """A policy that notes every canvas it is called with.

    mask_allowed: the mask token may be proposed, as in their sampler: under another number, which is not banned.
    """

    def __init__(self, policy: Policy, *, mask_allowed: bool):
        self.policy, self.mask_id, self.mask_allowed, self.canvases = policy, policy.mask_id, mask_allowed, []

    def __call__(self, ids, attention, select, reduce, *columns):
        self.canvases.append(ids.clone())

        def renumbered(logits, *columns):
            mask = torch.tensor(self.mask_id)
            moved = torch.cat([logits, logits[:, mask].unsqueeze(1)], 1).index_fill(1, mask, float("-inf"))
            return reduce(moved, *columns)

        return self.policy(ids, attention, select, renumbered if self.mask_allowed else reduce, *columns)


@pytest.mark.parametrize("case", GOLDEN["greedy"], ids=lambda c: f"{c['length']}/{c['steps']}/{c['mask_forbidden']}")
def test_greedy_trajectories(decoder, case):
    """Every intermediate state. Where their sampler may propose the mask token, it happens to commit none."""
    recorder = Recorder(decoder, mask_allowed=not case["mask_forbidden"])
    prompts = Prompts(torch.tensor(case["prompts"]), None)
    decoding = Decoding(case["length"], case["block_length"], case["steps"], temperature=0.0)
    ours = generate(recorder, prompts, torch.arange(len(prompts.ids)), decoding)
    theirs = torch.tensor([*case["states"], case["final"]])
    left = (theirs[:, :, -case["length"] :] == MASK).sum(-1)
    assert (left[:-1] - left[1:] == torch.tensor([step.count for step in decoding.plan]).unsqueeze(1)).all()
    assert len(recorder.canvases) == len(case["states"]) == case["steps"]
    for step, (mine, state) in enumerate(zip(recorder.canvases, case["states"])):
        assert mine.tolist() == state, f"step {step}"
    assert torch.cat([prompts.ids, ours], 1).tolist() == case["final"]


@pytest.mark.parametrize("case", GOLDEN["transfer"], ids=lambda c: f"{c['masked']}/{c['steps']}")
def test_commits_per_step(case):
    for masked, theirs in zip(case["masked"], case["official"]):
        if 1 <= case["steps"] <= masked:
            assert [step.count for step in even_schedule(masked, case["steps"])] == theirs
        elif masked:  # their schedule has steps that commit nothing; here that is an error
            assert 0 in theirs
            with pytest.raises(ValueError, match="steps must be"):
                Decoding(masked, masked, case["steps"])
