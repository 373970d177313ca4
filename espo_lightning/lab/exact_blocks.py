"""The oracle of `exact` for block-causal policies: exact likelihoods and ELBOs, block by block.

The likelihood of a completion is the product over its blocks of each one's, given the blocks before it; so its
logarithm, the ELBO, their gap and the moments of the scores are sums over blocks, each a lattice of `exact` by itself.
All numbers are in nats per sequence and float64, and differentiable where those of `exact` are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.lab.exact import (
    MAX_STATES,
    CompletionLaw,
    ScoreMoments,
    all_symbols,
    elbos,
    enumerate_completions,
    exact_elbo,
    lattice_edges,
    log_likelihoods,
    order_gap,
    random_order_log_likelihood,
    score_moments,
    subset_log_probs,
)
from espo_lightning.policies.policy import Prompts


class OneBlock:
    """A block-causal policy seen through the canvas of one block after finished ones; what follows is hidden.

    Everything of `exact` that takes a policy takes it.

    Args:
        policy: a block-causal `Policy`.
        before: token ids [F] of the finished blocks.
        size: tokens of the block.
        length: tokens of the whole canvas, L.
    """

    def __init__(self, policy, before: Tensor, size: int, length: int):
        self.policy, self.before, self.size, self.mask_id = policy, before, size, policy.mask_id
        self.length, self.rest = length, length - len(before) - size

    def __call__(
        self, ids: Tensor, attention: Tensor | None, select: Tensor, reduce: Callable[..., Any], *columns: Tensor
    ) -> Any:
        """As `Policy.forward`, of prompts and canvases of one block [N, P + size]."""
        width = ids.shape[1] - self.size
        canvas = torch.cat([self.before.expand(len(ids), -1), ids[:, width:]], 1)
        canvas = F.pad(canvas, (0, self.rest), value=self.mask_id)
        prompts = Prompts(ids[:, :width], None if attention is None else attention[:, :width])
        sees = prompts.seen_by(self.policy, self.length)
        select = F.pad(select[:, width:], (width + len(self.before), self.rest))
        return self.policy(torch.cat([prompts.ids, canvas], 1), sees, select, reduce, *columns)


def block_sizes(policy, prompts, length: int) -> list[int]:
    """Positions of the canvas in each of its blocks, after one prompt.

    Raises:
        ValueError: more than one prompt.
    """
    if len(prompts.ids) != 1:
        raise ValueError(f"exact numbers are of one prompt, got {len(prompts.ids)} prompts")
    return policy.layout.blocks(prompts, length)[0].unique(return_counts=True)[1].tolist()


def block_tables(policy, prompts, completion: Tensor) -> list[Tensor]:
    """The table of `subset_log_probs` of every block of a completion, given the blocks before it.

    Args:
        policy: a block-causal `Policy`.
        prompts: `Prompts` of one row.
        completion: token ids [L].

    Returns:
        For every block of n positions, float64 [2^n, n].
    """
    tables, start, length = [], 0, len(completion)
    for size in block_sizes(policy, prompts, length):
        view = OneBlock(policy, completion[:start], size, length)
        tables.append(subset_log_probs(view, prompts, completion[start : start + size]))
        start += size
    return tables


def block_elbo(tables: list[Tensor]) -> Tensor:
    """What `BlockELBO` estimates: the sum of the blocks' ELBOs, scalar."""
    return torch.stack([exact_elbo(table) for table in tables]).sum()


def block_log_likelihood(tables: list[Tensor]) -> Tensor:
    """Of `BlockDecoding` in random order, one token a step: the sum of the blocks' log-likelihoods, scalar."""
    return torch.stack([random_order_log_likelihood(table) for table in tables]).sum()


def block_gap(tables: list[Tensor]) -> Tensor:
    """log-likelihood - ELBO, from the posterior over each block's orders (`order_gap`): scalar, not differentiable."""
    return torch.stack([order_gap(table) for table in tables]).sum()


def block_score_moments(tables: list[Tensor], **law: Any) -> ScoreMoments:
    """Exact moments of the score that `BlockELBO` draws; blocks are independent. law: as in `score_moments`."""
    moments = [score_moments(table, **law) for table in tables]
    return ScoreMoments(*(torch.stack(each).sum() for each in zip(*moments)))


def block_completion_law(policy, prompts, symbols: int, length: int) -> CompletionLaw:
    """log-likelihood and ELBO of every completion over the tokens 0..V-1, in the order of `enumerate_completions`.

    Args:
        policy: a block-causal `Policy`.
        prompts: `Prompts` of one row.
        symbols: V. If it is the policy's whole vocabulary but the mask, the law sums to 1.
        length: L.

    Raises:
        ValueError: more than one prompt, or too many states.
    """
    sizes, device = block_sizes(policy, prompts, length), prompts.ids.device
    befores = [sum(sizes[:i]) for i in range(len(sizes))]
    states = sum(symbols**before * (symbols + 1) ** size for before, size in zip(befores, sizes))
    if states > MAX_STATES:
        raise ValueError(f"{states} states, each a row of the network: at most {MAX_STATES}")
    law = CompletionLaw(*torch.zeros(2, 1, dtype=torch.float64, device=device))
    for before, size in zip(befores, sizes):
        candidates = all_symbols(symbols, size).to(device)
        views = [OneBlock(policy, tokens, size, length) for tokens in enumerate_completions(symbols, before).to(device)]
        edges = [lattice_edges(view, prompts, candidates) for view in views]
        blocks = CompletionLaw(*(torch.stack([of(e) for e in edges], 1) for of in (log_likelihoods, elbos)))
        law = CompletionLaw(*((whole + block).flatten() for whole, block in zip(law, blocks)))  # [V^size, V^before]
    return law
