"""Proposals: the law that a token is drawn from, and drawing from it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits [n, V] of the law that proposals are drawn from: divided by the temperature, -inf outside the nucleus.

    Args:
        temperature: 0 leaves the logits as they are; the caller then takes the argmax.
        top_p: the nucleus is the shortest list of most probable tokens whose probability exceeds ``top_p``
            (Holtzman et al. 2020), after the temperature as in Dream; 1 = all tokens.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p == 1:
        return logits
    ranked, index = logits.sort(-1, descending=True)
    before = ranked.softmax(-1).cumsum(-1)[:, :-1]  # the probability of all better tokens
    outside = F.pad(before > top_p, (1, 0))
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))


def require_finite(values: Tensor) -> None:
    """Raise a FloatingPointError unless every value [n], one for each row of logits, is a finite number.

    It waits for the device. Decoders keep the values and ask once, at their end.
    """
    if not (finite := values.isfinite()).all():
        count = int((~finite).sum())
        raise FloatingPointError(
            f"logits are NaN or infinite, at {count} of {len(values)} positions that were to be decoded: the weights "
            "are damaged, their type is too narrow for these activations (use float32 or bfloat16), or the "
            "temperature is too small for float32"
        )


def greedy_tokens(logits: Tensor, check: Callable[[Tensor], None] = require_finite) -> Tensor:
    """The most probable token of every row: [n, V] -> [n].

    Args:
        check: called with values [n] that are finite where the logits are; see `require_finite`.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    tokens = logits.argmax(-1)  # NaN counts as the largest
    check(logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    return tokens


def sample_tokens(logits: Tensor, u: Tensor, check: Callable[[Tensor], None] = require_finite) -> Tensor:
    """One token per row from softmax(logits) by inverse CDF.

    Args:
        logits: float32 [n, V]; a token of probability 0 is never drawn.
        u: uniforms [n] in [0, 1).
        check: as in `greedy_tokens`.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    probabilities = torch.softmax(logits, -1)
    cdf = probabilities.cumsum(-1)
    total = cdf[:, -1:]
    check(total.squeeze(-1))  # one NaN or infinity makes its row's sum NaN
    # strictly below the total, so that the search ends inside the row
    point = torch.minimum(u.float().unsqueeze(-1) * total, total * (1 - 2**-23))
    token = torch.searchsorted(cdf, point, right=True).clamp(max=logits.shape[-1] - 1)  # beyond the row if it is NaN
    # a parallel sum (CUDA) may rise by rounding where nothing is added; and NaN must not become the mask token
    impossible = ~(probabilities.gather(-1, token) > 0)
    if token.device.type == "cpu" and not impossible.any():  # a question that another device would be waited for
        return token.squeeze(-1)
    return torch.where(impossible, logits.argmax(-1, keepdim=True), token).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits): [n, V] -> [n], nats; tokens at -inf count nothing."""
    probabilities = logits.softmax(-1)
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
