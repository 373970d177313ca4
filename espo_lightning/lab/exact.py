"""Exact likelihoods, ELBOs, variances and gradients of tiny models, by enumeration: the oracle of tests and notebooks.

Everything lives on one lattice. A *state* is a canvas of L positions, each hidden or showing one of W
candidate tokens; its index is sum_i d_i (W+1)^i, where the digit d_i is a candidate's number, or W = hidden.
An edge reveals one position. A random-order decoder walks from the state where everything is hidden to a
completion, and its likelihood and the ELBO are sums over the same edges.

With W = 1, the candidate being the completion's own token, the states are the masked sets A as bit masks
(bit i = position i), and the edges' log-probabilities are a *table* [2^L, L]: entry [A, i] is
log p(y_i | x, y outside A) for i in A, and 0 for i outside A.

All numbers are in nats per sequence and float64. Everything is differentiable unless it says otherwise.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espo_lightning.scoring.masks import quadrature_masks

MAX_LENGTH = 16  # one completion needs 2^L rows of the network
MAX_STATES = 2**19  # all completions need (V+1)^L rows
CHUNK = 2**13  # rows of the network at once


def all_numbers(base: int, length: int) -> Tensor:
    """All numbers of ``length`` digits, position 0 the least significant: [base^L, L]."""
    return torch.arange(base**length).unsqueeze(1) // base ** torch.arange(length) % base


def all_symbols(symbols: int, length: int) -> Tensor:
    """Every token 0..V-1 as a candidate at every position: [L, V]."""
    return torch.arange(symbols).expand(length, -1)


def enumerate_completions(symbols: int, length: int) -> Tensor:
    """All V^L completions over the tokens 0..V-1, in the order of every vector over completions here: [V^L, L]."""
    return all_numbers(symbols, length)


def edge_chunks(policy, prompts, candidates: Tensor, rows: int = CHUNK) -> Iterator[Tensor]:
    """`lattice_edges` in pieces of ``rows`` states, each with a graph of its own."""
    length, width = candidates.shape
    digits = all_numbers(width + 1, length).to(candidates.device)
    tokens = F.pad(candidates, (0, 1), value=policy.mask_id)  # digit W shows the mask
    attention = prompts.seen_by(policy, length)

    def wanted(logits: Tensor, columns: Tensor) -> Tensor:
        return logits.double().log_softmax(-1).gather(-1, columns)

    for states in digits.split(rows):
        n, hidden = len(states), states == width
        canvas = tokens.expand(n, -1, -1).gather(-1, states.unsqueeze(-1)).squeeze(-1)
        log_probs = policy(
            torch.cat([prompts.ids.expand(n, -1), canvas], 1),
            None if attention is None else attention.expand(n, -1),
            F.pad(hidden, (prompts.ids.shape[1], 0)),
            wanted,
            candidates.expand(n, -1, -1)[hidden],
        )
        shape = (n, length, width)
        yield log_probs.new_zeros(shape).masked_scatter(hidden.unsqueeze(-1).expand(shape), log_probs)


def lattice_edges(policy, prompts, candidates: Tensor) -> Tensor:
    """Every state's log-probabilities of the candidates [L, W] at the hidden positions: [(W+1)^L, L, W], else 0."""
    return torch.cat(list(edge_chunks(policy, prompts, candidates, CHUNK)))


def _over_orders(edges: Tensor, combine: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Fold the edges of every order of revealing, level by level: [(W+1)^L, L, W] -> [W^L] completions.

    A state's value is ``combine(value of each parent + edge, n)``; its parents have n hidden positions, one
    more than itself. combine maps [states, parents] to [states].
    """
    _, length, width = edges.shape
    digits = all_numbers(width + 1, length).to(edges.device)
    place = (width + 1) ** torch.arange(length, device=edges.device)
    level = (digits == width).sum(1)
    rank = torch.zeros_like(level)  # of a state within its level
    value, edges = edges.new_zeros(1), edges.flatten()
    for hidden in reversed(range(length)):
        states = (level == hidden).nonzero().squeeze(1)
        position = (digits[states] < width).nonzero()[:, 1].view(len(states), -1)  # what was revealed last
        digit = digits[states].gather(1, position)
        parents = states.unsqueeze(1) + (width - digit) * place[position]
        edge = (parents * length + position) * width + digit
        # index_select, since the backward pass of advanced indexing is many times slower on a CPU
        paths = value.index_select(0, rank[parents].flatten()) + edges.index_select(0, edge.flatten())
        value = combine(paths.view(edge.shape), hidden + 1)
        rank[states] = torch.arange(len(states), device=rank.device)
    return value


def log_likelihoods(edges: Tensor) -> Tensor:
    """The decoder picks each of n hidden positions with chance 1/n."""
    return _over_orders(edges, lambda paths, hidden: paths.logsumexp(1) - math.log(hidden))


def elbos(edges: Tensor) -> Tensor:
    """In a uniform order, each of the positions revealed so far is equally likely to have been the last one."""
    return _over_orders(edges, lambda paths, _: paths.mean(1))


def subset_log_probs(policy, prompts, completion: Tensor) -> Tensor:
    """The table of one completion: every position's log-probability under every mask that hides it.

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``.
        prompts: `Prompts` of one row.
        completion: token ids [L].

    Returns:
        float64 [2^L, L], see the module's docstring.

    Raises:
        ValueError: more than one prompt, or L > 16.
    """
    if len(prompts.ids) != 1:
        raise ValueError(f"the exact table is of one completion, got {len(prompts.ids)} prompts")
    if len(completion) > MAX_LENGTH:
        raise ValueError(
            f"a completion of {len(completion)} tokens has 2^{len(completion)} masks, each a row of the network: "
            f"at most {MAX_LENGTH} tokens"
        )
    return lattice_edges(policy, prompts, completion.unsqueeze(1)).squeeze(-1)


def exact_elbo(table: Tensor) -> Tensor:
    """The any-order ELBO, Eqs. 2 and 3 of arXiv:2512.03759 without Monte Carlo: [2^L, L] -> scalar.

    It is the mean over all L! orders of the log-probability of revealing the tokens in that order.
    """
    return elbos(table.unsqueeze(-1)).squeeze()


def random_order_log_likelihood(table: Tensor) -> Tensor:
    """log p^U(y), of the decoder that reveals one uniformly chosen position per step: [2^L, L] -> scalar.

    It is the logarithm of the mean over all L! orders of the probability of revealing the tokens in that order.
    """
    return log_likelihoods(table.unsqueeze(-1)).squeeze()


def _edge_weights(function: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    """How much every edge of the lattice counts in ``function(table)``: its gradient, [2^L, L], detached."""
    with torch.enable_grad():
        leaf = table.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]


def order_posterior(table: Tensor) -> Tensor:
    """The chance W(A, i) that position i is revealed in state A, given that y came out: [2^L, L], not differentiable.

    The edge weights of the posterior over orders are the gradient of log p^U in the table; likewise those of
    the uniform orders, 1 / (|A| C(L, |A|)), are the gradient of the ELBO. Every level |A| = n sums to 1.
    """
    return _edge_weights(random_order_log_likelihood, table)


def order_gap(table: Tensor) -> Tensor:
    """KL(uniform orders || posterior over orders given y) = log p^U(y) - ELBO(y): scalar, not differentiable.

    Computed from the two sets of edge weights, by the chain rule of the KL over the steps of an order.
    """
    hidden = all_numbers(2, table.shape[1]).to(table.device).bool()
    weights = _edge_weights(exact_elbo, table), order_posterior(table)
    uniform, posterior = ((w / w.sum(1, keepdim=True))[hidden].log() for w in weights)
    return (weights[0][hidden] * (uniform - posterior)).sum()


class ScoreMoments(NamedTuple):
    """mean (nats) and variance (nats^2) over the masks of a Monte-Carlo ELBO; scalars."""

    mean: Tensor
    variance: Tensor


def score_moments(
    table: Tensor, *, draws: int = 1, coupled: bool, stratified: bool = False, smallest: int = 0
) -> ScoreMoments:
    """Exact moments of the score that `masking.count_masks` estimates, over all counts and all subsets.

    The variance splits into the part within the counts and the part between them; stratified counts change
    only the latter, which is enumerated over the common start of the counts.

    Args:
        table: [2^L, L].
        draws, coupled, stratified, smallest: as in `count_masks`. A coupled draw costs two forwards.

    Raises:
        ValueError: coupled with ``smallest=1``.
    """
    if coupled and smallest:
        raise ValueError("coupled masks need counts uniform on 0..L: set smallest=0, or coupled=False")
    length = table.shape[1]
    span = length + 1 - smallest
    sizes = all_numbers(2, length).to(table.device).sum(1)
    scores = table.sum(1) * span / sizes.clamp(min=1)  # of one forward, per masked set
    if coupled:
        scores = (scores + scores.flip(0)) / 2  # the complement of A is 2^L - 1 - A
    by_count = [scores[sizes == count] for count in range(smallest, length + 1)]
    means = torch.stack([s.mean() for s in by_count])
    within = torch.stack([s.var(correction=0) for s in by_count]).mean() / draws
    if stratified:
        start, draw = torch.arange(span).unsqueeze(1), torch.arange(draws)
        between = means[(start + draw * span // draws) % span].mean(1).var(correction=0)
    else:
        between = means.var(correction=0) / draws
    return ScoreMoments(means.mean(), within + between)


def quadrature_moments(table: Tensor, nodes: int) -> ScoreMoments:
    """Exact moments of the score that `masking.quadrature_masks` estimates; its mean is not quite the ELBO.

    Args:
        table: [2^L, L].
        nodes: forwards.
    """
    length = table.shape[1]
    masks = quadrature_masks(torch.zeros(1, dtype=torch.int64), length, nodes)
    scale, counts = masks.weight.double().amax(-1), masks.hidden.sum(-1)  # of each node
    sizes, sums = all_numbers(2, length).sum(1), table.sum(1)
    of_count = [sums[sizes == count] for count in counts]
    mean = (scale * torch.stack([s.mean() for s in of_count]).unsqueeze(1)).mean()
    variance = (scale.square() * torch.stack([s.var(correction=0) for s in of_count]).unsqueeze(1)).mean() / nodes
    return ScoreMoments(mean, variance)


class CompletionLaw(NamedTuple):
    """Of all V^L completions, in the order of `enumerate_completions`.

    log_likelihood: [V^L], log p^U(y). elbo: [V^L], ELBO(y) <= log p^U(y).
    """

    log_likelihood: Tensor
    elbo: Tensor


def completion_law(policy, prompts, symbols: int, length: int) -> CompletionLaw:
    """log p^U and ELBO of every completion over the tokens 0..V-1; each of the (V+1)^L states is evaluated once.

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``.
        prompts: `Prompts` of one row.
        symbols: V. If it is the policy's whole vocabulary but the mask, p^U sums to 1.
        length: L.

    Raises:
        ValueError: more than one prompt, or too many states.
    """
    if len(prompts.ids) != 1:
        raise ValueError(f"the exact law is that of one prompt, got {len(prompts.ids)} prompts")
    if (symbols + 1) ** length > MAX_STATES:
        raise ValueError(
            f"{symbols} symbols on {length} positions have {symbols + 1}^{length} masked states, each a row of the "
            f"network: at most {MAX_STATES}"
        )
    edges = lattice_edges(policy, prompts, all_symbols(symbols, length).to(prompts.ids.device))
    return CompletionLaw(log_likelihoods(edges), elbos(edges))


def low_confidence_log_likelihoods(edges: Tensor) -> Tensor:
    """Of every completion under LLaDA's decoder at temperature 1, one token per step (`low_confidence`): [V^L].

    In a state every hidden position i proposes v with chance p_i(v), and the most confident proposal is committed:
    (i, v) with chance p_i(v) times that of every other position proposing something less likely than p_i(v).
    Differentiable where no two confidences are equal; a completion out of reach has a very low log-likelihood.

    Args:
        edges: [(V+1)^L, L, V] over all V symbols, see `lattice_edges`. Two equal confidences in one state, where the
            decoder would decide by position, lose probability.
    """
    hidden = (edges != 0).any(-1)  # [S, L]
    probability = edges.exp() * hidden.unsqueeze(-1)
    weaker = edges.unsqueeze(2).unsqueeze(2) < edges.unsqueeze(1).unsqueeze(-1)  # [S, j, i, v, v']: j's v' < i's v
    below = (probability.unsqueeze(2).unsqueeze(2) * weaker).sum(-1)  # [S, j, i, v]
    rival = hidden.unsqueeze(2) & ~torch.eye(edges.shape[1], dtype=torch.bool, device=edges.device)  # [S, j, i]
    chance = probability * torch.where(rival.unsqueeze(-1), below, 1.0).prod(1)
    return _over_orders(chance.clamp(min=1e-300).log(), lambda paths, _: paths.logsumexp(1))


def exact_policy_gradient(
    policy: nn.Module, score: Tensor, log_likelihood: Tensor, rewards: Tensor, *, centred: bool = True
) -> Tensor:
    """E over y ~ p^U of (R(y) - E R) grad score(y), in the policy's parameters: flat [number of parameters].

    With the score log p^U this is the gradient of E[R], centred or not. With the ELBO it is what an on-policy
    ELBO policy gradient has for a mean: biased unless the ELBO is tight, and much more so if not centred.

    Args:
        policy: its trainable parameters are what the gradient is taken in.
        score: [V^L], `CompletionLaw.log_likelihood` or `CompletionLaw.elbo`, with its graph (which is kept).
        log_likelihood: [V^L], log p^U of the sampler; no gradient flows through it.
        rewards: [V^L].
        centred: subtract E R.
    """
    probability = log_likelihood.detach().exp()
    advantages = rewards - (probability * rewards).sum() if centred else rewards
    parameters = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad((probability * advantages * score).sum(), parameters, retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def exact_kl(log_likelihood: Tensor, ref_log_likelihood: Tensor) -> Tensor:
    """KL(p^U_theta || p^U_ref) from the two laws' log-likelihoods [V^L]: scalar."""
    return (log_likelihood.exp() * (log_likelihood - ref_log_likelihood)).sum()
