"""Decoding of causal policies, token by token from the left, with a key-value cache. Everything random is keyed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.decoding.proposals import entropy, greedy_tokens, require_finite, sample_tokens, warp
from espo_lightning.keys import uniform
from espo_lightning.ranges import check_counts

ASKED = 8  # tokens between two questions whether all have ended, where a question waits for the device


@dataclass(frozen=True)
class AutoregressiveDecoding(Decoder):
    """How a causal policy's completions are decoded: left to right, each until its first end-of-text token.

    Args:
        length: canvas width L in tokens, the most a completion has, end-of-text included.
        temperature: of the sampled tokens; 0 is greedy. At 1 the samples follow the law that `Autoregressive` scores.

    Raises:
        ValueError: length below 1 or a negative temperature.
    """

    length: int = 16
    temperature: float = 1.0
    order_free = True

    def __post_init__(self):
        check_counts(1, length=self.length)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")

    def check(self, policy) -> None:
        if policy.mask_id is not None:
            raise ValueError(
                "decoding=AutoregressiveDecoding needs a causal policy, but this one is a diffusion model: use Decoding"
            )
        policy.check_canvas(self.length)

    @property
    def passes(self) -> int:
        """A forward pass per token, at most."""
        return self.length

    def decode(
        self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more
    ) -> tuple[Tensor, Trace]:
        return decode_left_to_right(policy, prompts, keys, self, agree, traced=True)

    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        return decode_left_to_right(policy, prompts, keys, self, agree, traced=False)[0]


@torch.no_grad()
def decode_left_to_right(
    policy, prompts, keys: Tensor, decoding: AutoregressiveDecoding, agree: Callable[[bool], bool], *, traced: bool
) -> tuple[Tensor, Trace | None]:
    """Sample y_i from p(. | x, y_<i), i = 1..L, and stop once all completions have ended.

    Args:
        policy: a causal `Policy`.
        prompts: `Prompts` of B rows and width P.
        keys: int64 [B], the randomness of each completion; position i takes the i-th uniform of its key.
        agree: see `Decoder.decode`; asked before every token on a CPU, and before every `ASKED` tokens elsewhere.
        traced: whether to note the entropies.

    Returns:
        Token ids [B, L], end-of-text from each completion's first one on; and their `Trace`, position i in step i.
    """
    batch, length = len(prompts.ids), decoding.length
    end = policy.tokenizer.eos_token_id
    completion = prompts.ids.new_full((batch, length), end)
    running = torch.ones(batch, dtype=torch.bool, device=prompts.ids.device)
    finite: list[Tensor] = []
    ends = torch.stack([completion.new_full((), token) for token in sorted(policy.eos_ids)])
    every = 1 if keys.device.type == "cpu" else ASKED
    noise, entropies = uniform(keys, length), torch.zeros(batch, length, device=keys.device)

    def draw(logits: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        warped = warp(logits, decoding.temperature, top_p=1.0)
        tokens = (
            sample_tokens(warped, u, finite.append) if decoding.temperature else greedy_tokens(warped, finite.append)
        )
        return (tokens, entropy(warped)) if traced else (tokens,)

    prefix = policy.prefix(room=prompts.ids.shape[1] + length)
    for i in range(length):
        if i % every == 0 and not agree(bool(running.any())):
            break
        ids = torch.cat([prompts.ids, completion[:, :i]], 1)
        select = F.pad(torch.zeros_like(ids, dtype=torch.bool), (0, 1), value=True)  # the token to come
        tokens, *noted = policy(ids, prompts.attention(i), select, draw, noise[:, i], prefix=prefix)
        completion[:, i] = tokens.where(running, end)
        for entropy_of_tokens in noted:
            entropies[:, i] = entropy_of_tokens.where(running, 0.0)
        running &= (tokens.unsqueeze(-1) != ends).all(-1)
    require_finite(torch.cat(finite))
    steps = torch.arange(length, device=keys.device).expand(batch, -1)
    return completion, Trace(steps, entropies) if traced else None
