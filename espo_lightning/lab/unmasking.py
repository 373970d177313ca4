"""How a completion came about: its tokens, the step that committed each, and how sure the policy was then.

All of it is in the decoder's `Trace`, so that looking on costs no forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.decoding.causal import AutoregressiveDecoding
from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.policies.policy import Policy
from espo_lightning.tasks.base import Messages, Verdict


class Unmasking(NamedTuple):
    """One completion of L tokens and its history.

    policy: what it is called. tokens: the text of each. steps: the step that committed each, from 0; -1 = it was filled
    in after the end of the text without a forward pass. certainty: of the law that each token was drawn from, exp(-nats
    of entropy): 1 = no doubt, 1/2 = as between two tokens. end: tokens before the first end-of-text token. text: what
    the verifier reads. verdict: what it says; empty where nothing was asked for.
    """

    policy: str
    tokens: list[str]
    steps: list[int]
    certainty: list[float]
    end: int
    text: str
    verdict: Verdict

    def shown(self, step: int) -> list[str | None]:
        """The canvas after a step, None where it is masked; -1 is before the first step."""
        last = max(self.steps)
        return [token if max(s, last * (s < 0)) <= step else None for token, s in zip(self.tokens, self.steps)]


def unmask(
    policy: Policy,
    name: str,
    prompt: str | Messages,
    decoding: Decoder,
    keys: Tensor,
    judged: Callable[[str], Verdict] = lambda text: {},
) -> list[Unmasking]:
    """Decode a completion of the prompt with each of the int64 keys [B], and have it judged.

    Raises:
        ValueError: a decoder that draws finished tokens anew, as its trace does not keep what stood there before.
    """
    if getattr(decoding, "corrector", 0):
        raise ValueError(f"decoding.corrector must be 0 to look on, as it draws tokens anew; got {decoding.corrector}")
    prompts = policy.encode([prompt]).repeat_each(len(keys))
    completion, trace = decoding.decode(policy, prompts, keys.to(policy.device))
    found = []
    rows = zip(completion, policy.decode(completion), policy.lengths(completion).tolist(), trace.steps, trace.entropy)
    for ids, text, end, steps, entropy in rows:
        written = steps.tolist()
        if policy.causal:  # which stops at the first end-of-text token
            written = [step if i <= end else -1 for i, step in enumerate(written)]
        tokens = [policy.tokenizer.decode([i]) for i in ids.tolist()]
        sure = [round(math.exp(-nats), 4) for nats in entropy.tolist()]
        found.append(Unmasking(name, tokens, written, sure, end, text, judged(text)))
    return found


def steps_of(unmaskings: list[Unmasking]) -> list[int]:
    """The steps in which anything was committed in any of them, ascending."""
    return sorted({step for one in unmaskings for step in one.steps if step >= 0})


def fitting(policy: Policy, temperature: float, length: int = 16) -> Decoder:
    """The decoder of a policy's kind, with as many steps as there are tokens."""
    if policy.causal:
        return AutoregressiveDecoding(length=length, temperature=temperature)
    block = policy.layout.block
    if block is None:
        return Decoding(length=length, block_length=length, steps=length, temperature=temperature)
    length = block * math.ceil(length / block)
    return BlockDecoding(length=length, block_length=block, steps=length, temperature=temperature)


def keys_of(seed: int, problem: int, samples: int) -> Tensor:
    """Keys [samples] of a problem's completions: those of `espo_lightning.evaluate` with the same seed."""
    return fold_in(seed, torch.tensor([sample << 32 | problem for sample in range(samples)]))


def record(unmaskings: list[Unmasking], prompt: str | Messages, right: str, columns: int | None, **facts: Any) -> dict:
    """Everything as plain data, for a JSON file or a page.

    Args:
        right: a right answer, "" if none is known.
        columns: tokens of a line; None = as the text flows.
    """
    shown = {"prompt": prompt, "right": right, "columns": columns, "steps": steps_of(unmaskings)}
    return facts | shown | {"completions": [one._asdict() for one in unmaskings]}
