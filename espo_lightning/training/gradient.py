"""The loss of a micro-batch as parts to be backpropagated one after the other."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.objectives.objective import Objective, Scores, Statistics
from espo_lightning.scoring.masks import Masks


class Loss(NamedTuple):
    """What a micro-batch of b completions left: log-probabilities [M, b, L], its share of the loss, statistics [b]."""

    log_probs: Tensor
    value: Tensor
    statistics: Statistics


def loss_parts(
    log_probs: Callable[[Masks], Tensor],
    masks: Masks,
    weigh: Callable[[Tensor], tuple[Tensor, Statistics]],
    view_by_view: bool,
) -> tuple[Loss, Iterator[tuple[Tensor, bool]]]:
    """A loss, and what to backpropagate: (part, whether it is the last), whose gradients add up to the loss's.

    A loss depends on the policy through its log-probabilities only. View by view, they are taken without a graph, the
    loss is differentiated in them, and then each pass of each draw is taken again, with its graph, and weighed by its
    derivatives: the memory of one view, for one more forward.

    Args:
        log_probs: masks [M, b, L] -> log-probabilities [M, b, L] under the policy.
        weigh: log-probabilities [M, b, L] -> a scalar loss and statistics.
    """
    if not view_by_view:
        new = log_probs(masks)
        loss, statistics = weigh(new)
        return Loss(new.detach(), loss.detach(), statistics), iter([(loss, True)])
    with torch.no_grad():
        new = log_probs(masks)
    loss, statistics = weigh(new.requires_grad_())
    (derivatives,) = torch.autograd.grad(loss, new)
    passes = masks.single_passes()
    per_draw = len(passes) // len(derivatives)

    def parts() -> Iterator[tuple[Tensor, bool]]:
        for i, single in enumerate(passes):
            yield (derivatives[i // per_draw] * log_probs(single)).sum(), i == len(passes) - 1

    return Loss(new.detach(), loss.detach(), statistics), parts()


def mean_loss(
    objective: Objective, scores: Scores, advantages: Tensor, count: Tensor, group: int, completions: int
) -> tuple[Tensor, Statistics]:
    """A micro-batch's share of the mean of all ``completions``' losses, each counting ``count`` [b]; and statistics."""
    losses, statistics = objective(scores, advantages, group)
    return (count * losses).mean() * (len(losses) / completions), statistics
