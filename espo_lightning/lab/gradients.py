"""What the gradient of an estimator is in the mean, and how much it scatters: exactly, on canvases of `exact`.

Every gradient of this library is a weighted sum of grad log p(y_i | x, the visible tokens), over the edges of the
lattice of `exact`. `EdgeGradients` holds them all, as one matrix. Then the mean of any estimator over all V^L
completions is a product with that matrix, and its variance needs the inner products of one completion's edges only.
Only masks are sampled, by the library's own likelihoods.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.keys import fold_in
from espo_lightning.lab.exact import all_symbols, edge_chunks, enumerate_completions
from espo_lightning.scoring.likelihood import Likelihood
from espo_lightning.scoring.masks import Masks

BLOCK = 512  # parameters at once in products of gradients: small enough for a cache


class EdgeGradients:
    """The log-probabilities on one prompt's lattice and their gradients in the policy's P trainable parameters.

    Memory: E P float32, where E = V L (V+1)^(L-1) edges: 3.6 GB for V = L = 4 and the bundled Sudoku policy.

    Args:
        policy: a callable like `Policy` with parameters, such as `FreeCells` or `TabularPolicy`.
        prompts: `Prompts` of one row.
        symbols: V.
        length: L.

    Attributes:
        edges: float64 [(V+1)^L, L, V], as `lattice_edges`, detached.
    """

    def __init__(self, policy, prompts, symbols: int, length: int):
        self.symbols, self.length = symbols, length
        parameters = [p for p in policy.parameters() if p.requires_grad]
        states = (symbols + 1) ** length
        hidden_edges = symbols * length * (symbols + 1) ** (length - 1)
        self.jacobian = torch.empty(hidden_edges, sum(p.numel() for p in parameters))
        self.row = torch.full((states * length * symbols,), -1)  # of each edge in the jacobian
        edges, done = [], 0
        chunks = edge_chunks(policy, prompts, all_symbols(symbols, length), rows=1)
        for state, chunk in enumerate(chunks):
            edges.append(chunk.detach())
            hidden = (chunk.detach() != 0).any(-1).expand(symbols, -1, -1).movedim(0, -1).flatten()
            if not hidden.any():  # the state of a finished completion has no edges
                continue
            outputs = chunk.flatten()[hidden]
            one_hot = torch.eye(len(outputs), dtype=outputs.dtype)
            grads = torch.autograd.grad(outputs, parameters, one_hot, is_grads_batched=True)
            torch.cat([g.flatten(1).float() for g in grads], 1, out=self.jacobian[done : done + len(outputs)])
            self.row[state * len(hidden) + hidden.nonzero().squeeze(1)] = torch.arange(done, done + len(outputs))
            done += len(outputs)
        self.edges = torch.cat(edges)

    def weighted(self, coefficients: Tensor) -> Tensor:
        """Sum over the edges of coefficient times gradient: [..., (V+1)^L L V] -> [..., P]."""
        return coefficients[..., self.row >= 0].float() @ self.jacobian

    def of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of ``function(edges)``, a scalar: [P]."""
        leaf = self.edges.clone().requires_grad_()
        return self.weighted(torch.autograd.grad(function(leaf), leaf)[0].flatten())

    def compact(self) -> "EdgeGradients":
        """The same gradients in an orthonormal basis of their span: E columns instead of P, all inner products kept.

        Cosines, norms and variances are what they were, to float32; the coordinates are no longer the parameters'.
        """
        gram = torch.zeros(len(self.jacobian), len(self.jacobian), dtype=torch.float64)
        for block in self.jacobian.split(BLOCK, 1):
            gram += block.double() @ block.double().mT
        values, vectors = torch.linalg.eigh(gram)
        smaller = copy.copy(self)
        smaller.jacobian = (vectors * values.clamp(min=0).sqrt()).float()
        return smaller

    def products(self) -> Tensor:
        """Inner products of the gradients within every completion's own table: [V^L, 2^L L, 2^L L] float32."""
        index = self.row[completion_edges(self.symbols, self.length).flatten(1)]
        own = (index >= 0).all(0)  # the same entries of the table for all completions
        products = torch.zeros(len(index), int(own.sum()), int(own.sum()))
        for block in self.jacobian.split(BLOCK, 1):
            gradients = block.contiguous()[index[:, own]]
            products.baddbmm_(gradients, gradients.mT)
        full = torch.zeros(len(index), len(own), len(own))
        full[:, own.unsqueeze(1) & own] = products.flatten(1)
        return full


def completion_edges(symbols: int, length: int) -> Tensor:
    """The edge of every entry [A, i] of every completion's table (see `exact`): int64 [V^L, 2^L, L].

    An entry with i outside A is the edge of another state that shows i, whose log-probability is 0.
    """
    completions = enumerate_completions(symbols, length)
    hidden = enumerate_completions(2, length).bool()  # bit i of A
    digits = torch.where(hidden, symbols, completions.unsqueeze(1))  # [V^L, 2^L, L]
    state = (digits * (symbols + 1) ** torch.arange(length)).sum(-1, keepdim=True)
    return (state * length + torch.arange(length)) * symbols + completions.unsqueeze(1)


def table_entries(masks: Masks) -> Tensor:
    """Where the log-probability of each term stands in its completion's flat table [2^L L]: int64 [M, B, L]."""
    length = masks.hidden.shape[-1]
    code = (masks.passes * 2 ** torch.arange(length)).sum(-1, keepdim=True)  # of every pass, [H, M, B, 1]
    scored = masks.scored
    reading = torch.where(scored.any(0), (code * scored).sum(0), code[0])  # of the pass that reads a position
    return reading * length + torch.arange(length)


class MaskedCompletions(NamedTuple):
    """S random masks for each of the V^L completions, as edges of the lattice: B = V^L S rows.

    edge: int64 [M, B, L], the edge of each term. entry: int64 [M, B, L], its place in the completion's own table.
    weight: float64 [M, B, L]. completion: int64 [B].
    """

    edge: Tensor
    entry: Tensor
    weight: Tensor
    completion: Tensor

    def terms(self, edges: Tensor) -> Tensor:
        """What `likelihood.score` returns for these completions and masks: [M, B, L] float64."""
        return edges.flatten()[self.edge] * self.weight


def mask_completions(likelihood: Likelihood, symbols: int, length: int, samples: int, key: int) -> MaskedCompletions:
    """Draw the masks of ``samples`` scores of every completion.

    Args:
        key: of the masks.
    """
    completion = torch.arange(symbols**length).repeat_interleave(samples)
    masks = likelihood.draw(fold_in(key, torch.arange(len(completion))), length)
    entry = table_entries(masks)
    edge = completion_edges(symbols, length).flatten(1)[completion.unsqueeze(-1), entry]
    return MaskedCompletions(edge, entry, masks.weight.double(), completion)


class GradientMoments(NamedTuple):
    """Of one completion's gradient: mean [P]; the trace of its variance, and the masks' part of it."""

    mean: Tensor
    variance: float
    mask_variance: float

    @property
    def noise(self) -> float:
        """Trace of the variance over the squared norm of the mean: completions needed for a signal-to-noise of 1."""
        return self.variance / float(self.mean.double().square().sum())


class Estimator(NamedTuple):
    """A sampled loss. masked: S random masks per completion.

    loss: terms [M, B, L] -> scalar, the *sum* of the rows' losses, each a function of its own terms.
    """

    masked: MaskedCompletions
    loss: Callable[[Tensor], Tensor]


def estimator_moments(
    gradients: EdgeGradients, products: Tensor, probability: Tensor, estimators: dict[str, Estimator]
) -> dict[str, GradientMoments]:
    """Of the gradients of sampled losses, for y ~ ``probability`` [V^L] and random masks.

    The moments are exact in the completions and sampled in the masks. ``products`` are those of ``gradients``.
    """
    products, totals, squares, masks = products.double(), [], [], []
    for masked, loss in estimators.values():
        leaf = masked.terms(gradients.edges).requires_grad_()
        coefficient = torch.autograd.grad(loss(leaf), leaf)[0] * masked.weight
        rows = len(masked.completion)
        samples = rows // len(probability)
        weight = probability[masked.completion] / samples  # [B]
        total = torch.zeros(len(gradients.row), dtype=torch.float64)
        totals.append(total.index_add_(0, masked.edge.flatten(), (coefficient * weight.unsqueeze(-1)).flatten()))
        entries = torch.zeros(rows, products.shape[-1], dtype=torch.float64)
        for c, e in zip(coefficient, masked.entry):
            entries.scatter_add_(1, e, c)
        entries = entries.view(len(probability), samples, -1)
        average = entries.mean(1, keepdim=True)
        square = (entries @ products * entries).sum(-1).mean(1)  # of the norm, per completion
        scatter = square - (average @ products * average).sum((1, 2))
        squares.append((probability * square).sum())
        masks.append((probability * scatter).sum() * samples / max(1, samples - 1))
    means = gradients.weighted(torch.stack(totals))
    return {
        name: GradientMoments(mean, float(square - mean.double().square().sum()), float(mask))
        for name, mean, square, mask in zip(estimators, means, squares, masks)
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two gradients [P]; 0 if one of them is 0."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
