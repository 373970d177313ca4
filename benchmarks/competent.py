"""What a second version of `straightforward.py` would do better: the two functions in which most of its time goes.

    Straightforward(..., log_probs=competent.log_probs, generate=competent.generate)

The head sees only completion tokens, or those of the block that is decoded; noise is float32; all rows commit their
tokens in one call. What it computes is the same, except that other random numbers are drawn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_probs(model: nn.Module, mask_id: int, prompts: Tensor, completion: Tensor, hidden: Tensor) -> Tensor:
    """log p of every completion token [B, L], hidden or not, with ``hidden`` [B, L] shown as the mask token."""
    noisy = torch.where(hidden, mask_id, completion)
    canvas = torch.cat([prompts, noisy], 1)
    logits = model(canvas, use_cache=False, logits_to_keep=completion.shape[1]).logits.float()
    return -F.cross_entropy(logits.flatten(0, 1), completion.flatten(), reduction="none").view_as(completion)


@torch.no_grad()
def generate(
    model: nn.Module,
    mask_id: int,
    prompts: Tensor,
    length: int,
    block: int,
    steps: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Low-confidence decoding, block by block: [B, P] -> [B, L]."""
    canvas = torch.cat([prompts, prompts.new_full((len(prompts), length), mask_id)], 1)
    per_block = steps * block // length
    base, extra = divmod(block, per_block)
    for step in range(steps):
        current, number = divmod(step, per_block)
        positions = prompts.shape[1] + current * block + torch.arange(block)
        logits = model(canvas, use_cache=False, logits_to_keep=positions).logits.float()
        logits[:, :, mask_id] = float("-inf")  # neither a token nor part of a confidence
        log_probability = logits.log_softmax(-1)
        if temperature:
            logits = logits / temperature - torch.log(-torch.log(torch.rand(logits.shape, generator=generator)))
        proposal = logits.argmax(-1)
        confidence = log_probability.gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
        confidence = confidence.masked_fill(canvas[:, positions] != mask_id, float("-inf"))
        chosen = confidence.topk(base + (number < extra), -1).indices
        canvas.scatter_(1, positions[chosen], proposal.gather(1, chosen))
    return canvas[:, prompts.shape[1] :]
