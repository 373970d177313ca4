"""Scoring: the log-probabilities of completions on given masks. The only place where a diffusion policy is scored."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.scoring.masks import Masks

Reduce = Callable[[Tensor, Tensor], Tensor]  # logits [n, V], targets [n] -> [n] nats
DRAWS = 8  # scored in one batch where there is no graph: many draws, such as all steps of a decoder, take turns


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: [n, V] float32, [n] -> [n]."""
    return -F.cross_entropy(logits, targets, reduction="none")


def sampler_log_probs(mask_id: int, temperature: float) -> Reduce:
    """`token_log_probs` of the law that a decoder draws from: without the mask token, divided by the temperature."""

    def reduce(logits: Tensor, targets: Tensor) -> Tensor:
        mask_token = torch.full((), mask_id, device=logits.device)
        logits = logits.index_fill(-1, mask_token, float("-inf"))
        return token_log_probs(logits if temperature == 1 else logits / temperature, targets)

    return reduce


def log_probs(policy, prompts, completion: Tensor, masks: Masks, reduce: Reduce = token_log_probs) -> Tensor:
    """log p(y_i | x, the visible tokens) of completions on given masks.

    All passes of all draws go through the policy in one batch (without a graph, of at most `DRAWS` draws at once), and
    the language-model head runs only on the positions that are scored: L per coupled draw, not 2(P + L).

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``.
        prompts: `Prompts` of B rows and width P.
        completion: token ids [B, L].
        masks: `Masks` [M, B, L].
        reduce: from logits to log-probabilities; `sampler_log_probs` for the law of a decoder.

    Returns:
        [M, B, L] nats, float32 from a `Policy`; 0 where nothing is scored.
    """
    if not torch.is_grad_enabled() and len(masks.weight) > DRAWS:
        return torch.cat([log_probs(policy, prompts, completion, part, reduce) for part in masks.split(DRAWS)])
    masks = masks.tallied()
    used, hidden, wanted = masks.rows()
    batch = len(completion)
    owner = used % batch
    prompt = prompts.ids[owner]
    if masks.prompt is not None:
        noise = masks.prompt.flatten(0, 1)[used % (len(masks.prompt) * batch)]
        prompt = prompt.masked_fill(noise, policy.mask_id)
    ids = torch.cat([prompt, completion[owner].masked_fill(hidden, policy.mask_id)], 1)
    attention = prompts.seen_by(policy, completion.shape[1])
    select = F.pad(wanted, (prompts.ids.shape[1], 0))
    targets = completion[owner].flatten()[torch.nonzero_static(wanted.flatten(), size=masks.count).squeeze(1)]
    values = policy(ids, None if attention is None else attention[owner], select, reduce, targets)
    return spread(values, masks)


def spread(values: Tensor, masks: Masks) -> Tensor:
    """Log-probabilities of all scored positions, in the order of `Masks.rows`, where they belong: [M, B, L]."""
    scored = masks.scored
    return values.new_zeros(scored.shape).masked_scatter(scored, values).sum(0)


def score(policy, prompts, completion: Tensor, masks: Masks, reduce: Reduce = token_log_probs) -> Tensor:
    """Terms [M, B, L]: ``masks.weight`` times `log_probs`, whose arguments these are.

    Their sum over the positions, averaged over the draws, is the score of a completion in nats per sequence.
    """
    return log_probs(policy, prompts, completion, masks, reduce) * masks.weight
