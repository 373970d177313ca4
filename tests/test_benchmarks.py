"""The baselines that the library's speed is measured against are ESPO, and agree with the library."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import competent
from measure import random_policy
from straightforward import Straightforward, assert_same

VERSIONS = {
    "straightforward": {},
    "competent": {"log_probs": competent.log_probs, "generate": competent.generate},
}
PROMPTS = torch.randint(8, 60, (2, 5), generator=torch.Generator().manual_seed(0))


def trainer(version: str, **changes):
    """A small policy of the library and the baseline on a copy of its weights."""
    policy = random_policy(16, 2, 2, 24)
    model = deepcopy(policy.model)
    settings = dict(length=8, block=4, steps=4, group=2, updates=3, draws=2, micro_batch=2, clip_range=0.2, beta=0.01)
    settings |= changes
    return policy, Straightforward(
        model,
        deepcopy(model).requires_grad_(False),
        torch.optim.SGD(model.parameters(), lr=1.0),
        policy.mask_id,
        **settings,
        max_norm=1.0,
        generator=torch.Generator().manual_seed(0),
        **VERSIONS[version],
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_baseline_computes_what_the_library_computes(version):
    policy, baseline = trainer(version)
    assert_same(baseline, policy, PROMPTS)


@pytest.mark.parametrize("version", VERSIONS)
def test_ratios_are_one_at_the_first_update_and_move_afterwards(version, monkeypatch):
    """The old policy is the one that decoded, for every update: scored anew before each, all ratios would be 1."""
    _, baseline = trainer(version)
    ratios = []
    loss = Straightforward.loss

    def noted(self, prompts, completion, masks, old, ref, advantages):
        new = self.terms(self.model, prompts, completion, masks)
        ratios.append(((new - old).sum(-1).mean(0) / self.length).exp().detach())
        return loss(self, prompts, completion, masks, old, ref, advantages)

    monkeypatch.setattr(Straightforward, "loss", noted)
    baseline.outer_step(PROMPTS, lambda completion: (completion % 2).float().mean(1))
    updates = torch.stack(ratios).view(3, -1)  # of 2 micro-batches of 2 completions
    assert torch.allclose(updates[0], torch.ones(4), atol=1e-6)
    assert ((updates[1:] - 1).abs() > 1e-4).all()
