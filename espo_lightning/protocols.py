"""Decoding settings of published evaluations, by name.

The paper (arXiv:2512.03759) trains at 256 tokens and evaluates greedily at 128, 256 and 512, LLaDA in blocks of 32 with
low-confidence remasking: two tokens a step for Sudoku and Countdown, 256 test problems each; one token a step for
GSM8K, MATH and code. It evaluates Dream with another harness, whose settings are not known; ``dream`` here means
Dream's own order and schedule on the whole canvas, at the same lengths and numbers of steps.
"""

from espo_lightning.sampler import Decoding, dream_schedule, entropy_order

LENGTHS = (128, 256, 512)
TOKENS_A_STEP = {"planning": 2, "reasoning": 1}

PROTOCOLS: dict[str, Decoding] = {
    f"llada-{kind}-{length}": Decoding(length, block_length=32, steps=length // tokens, temperature=0.0)
    for kind, tokens in TOKENS_A_STEP.items()
    for length in LENGTHS
} | {
    f"dream-{kind}-{length}": Decoding(
        length, length, steps=length // tokens, temperature=0.0, order=entropy_order, schedule=dream_schedule
    )
    for kind, tokens in TOKENS_A_STEP.items()
    for length in LENGTHS
}


def protocol(name: str) -> Decoding:
    """The decoding of a protocol, like ``llada-planning-256``. Raises ValueError for an unknown name."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown: take one of {', '.join(PROTOCOLS)}, or set decoding yourself")
    return PROTOCOLS[name]
