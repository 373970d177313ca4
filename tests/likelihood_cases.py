"""Keys, tables and laws of the tests of likelihoods."""

import math

import torch

from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import subset_log_probs
from espo_lightning.lab.tabular import TabularPolicy
from espo_lightning.policies.policy import Prompts
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score

PROMPT = Prompts(torch.zeros(1, 2, dtype=torch.int64), None)
COUNT_LAWS = [(False, 0), (True, 0), (False, 1)]  # coupled, smallest


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_of(seed: int, n: int) -> torch.Tensor:
    return fold_in(seed, torch.arange(n))


def assert_mean(samples: torch.Tensor, expected: float) -> None:
    """The sample mean lies within 4 standard errors."""
    assert abs(samples.mean() - expected) < 4 * samples.std() / math.sqrt(len(samples))


def assert_variance(samples: torch.Tensor, expected: float) -> None:
    """The sample variance lies within 4 of its standard errors."""
    assert_mean((samples - samples.mean()) ** 2, expected)


def tabular(seed: int, length: int = 4, symbols: int = 3) -> tuple[TabularPolicy, torch.Tensor, torch.Tensor]:
    """A policy, a completion [L], and its table."""
    policy = TabularPolicy(symbols, length, generator=rng(seed))
    completion = torch.randint(symbols, (length,), generator=rng(seed + 1000))
    return policy, completion, subset_log_probs(policy, PROMPT, completion).detach()


def draws_of(policy, completion: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Scores [B] of one completion on masks for B rows."""
    n = masks.hidden.shape[1]
    with torch.no_grad():
        return score(policy, PROMPT.repeat_each(n), completion.expand(n, -1), masks).sum(-1).mean(0)
