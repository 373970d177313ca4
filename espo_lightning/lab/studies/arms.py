"""What training runs of notebooks 04, 05 and 08 differ in, and what they cost."""

import math
from dataclasses import dataclass
from functools import cache

from espo_lightning.decoding.masked import Decoding
from espo_lightning.lab.costs import expected_work
from espo_lightning.lab.flops import decoding_passes, flops
from espo_lightning.lab.network import read_network
from espo_lightning.lab.studies.kl import KLS
from espo_lightning.lab.studies.ratios import RATIOS
from espo_lightning.lab.studies.states import LEARNING_RATE, SUDOKU, new_module
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood, MeanField
from espo_lightning.tasks import Sudoku, Task
from espo_lightning.training.module import ESPOModule

PROMPTS = 16  # per rollout, as in `fit`


@dataclass(frozen=True)
class Arm:
    """What training runs differ in; plain values, so that a notebook can store them.

    Args:
        ratio: a key of `RATIOS`.
        likelihood: "ELBO" or "mean field".
        draws, coupled: of the ELBO.
        kl: a key of `KLS`.
        beta, clip_range: see `PolicyGradient`; a clip_range of None is no clip, as a stored result has no infinity.
        updates, fresh_masks: see `ESPOModule`.
        steps: denoising steps of a rollout.
        lr: learning rate.
    """

    ratio: str = "sequence"
    likelihood: str = "ELBO"
    draws: int = 1
    coupled: bool = True
    kl: str = "k2"
    beta: float = 0.0
    updates: int = 2
    fresh_masks: bool = True
    clip_range: float | None = 0.05
    steps: int = 16
    lr: float = LEARNING_RATE

    def __post_init__(self):
        if self.likelihood not in ("ELBO", "mean field"):
            raise ValueError(f'likelihood must be "ELBO" or "mean field", got {self.likelihood!r}')

    def module(
        self, seed: int, kind: type[ESPOModule] = ESPOModule, policy: Policy | None = None, **changes
    ) -> ESPOModule:
        """A new module that trains ``policy``; None = the bundled Sudoku policy."""
        elbo = ELBO(draws=self.draws, coupled=self.coupled)
        likelihood: Likelihood = MeanField() if self.likelihood == "mean field" else elbo
        clip_range = math.inf if self.clip_range is None else self.clip_range
        return new_module(
            load_policy(SUDOKU) if policy is None else policy,
            seed,
            kind,
            lr=self.lr,
            decoding=Decoding(steps=self.steps),
            likelihood=likelihood,
            objective=PolicyGradient(ratio=RATIOS[self.ratio], clip_range=clip_range, kl=KLS[self.kl], beta=self.beta),
            updates=self.updates,
            fresh_masks=self.fresh_masks,
            **changes,
        )


@cache
def expected_flops(arm: Arm) -> dict[str, float]:
    """FLOPs of every phase of a training step, averaged over masks, if no completion is left out."""
    return module_flops(arm.module(0), Sudoku(), SUDOKU, PROMPTS)


def module_flops(module: ESPOModule, task: Task, network: str, prompts: int) -> dict[str, float]:
    """FLOPs of every phase of a training step of ``prompts`` problems, averaged over masks.

    All completions are scored at once; where groups of equal rewards are left out (``skip_equal_groups``), it is less.

    Args:
        task: whose first prompt gives the width of all prompts.
        network: path of the policy, see `read_network`.
    """
    completions, length = prompts * module.group_size, module.decoding.length
    prompt = module.policy.encode([task.problem("train", 0, 0).prompt])
    passes = expected_work(
        decoding_passes(module.decoding, completions, prompt.ids.shape[1] + length),
        module.likelihood,
        completions,
        module.decoding,
        module.updates if module.fresh_masks else 1,
        updates=module.updates,
        objective=module.objective,
        micro_batch=completions,
        view_by_view=False,
    )
    return flops(read_network(network), passes)


def equal_rollouts(arm: dict, like: dict, rollouts: int) -> int:
    """How many rollouts of an arm take the FLOPs of ``rollouts`` of another one; at least 1."""
    ours, theirs = (sum(expected_flops(Arm(**settings)).values()) for settings in (arm, like))
    return max(1, round(rollouts * theirs / ours))
