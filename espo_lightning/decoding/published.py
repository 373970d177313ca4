"""Decoding settings of published evaluations, by name: ``FAMILY-KIND-LENGTH``.

planning is for Sudoku and Countdown, reasoning for GSM8K, MATH and code. Where the numbers come from:

* lengths 128, 256 and 512: the paper (arXiv:2512.03759), which trains at 256.
* planning, greedy, two tokens a step: the authors' ``eval/`` of both models, which takes 256 problems.
* reasoning, one token a step: the paper. It used the models' own evaluations, LLaDA's with OpenCompass, Dream's with
  lm-eval (the authors' README).
* llada, low confidence in blocks of 32: the authors' recipes and ``eval/``. LLaDA's OpenCompass configurations (read in
  copies of them) take one token a step too, but blocks of 8 for GSM8K, of 32 for code and none for MATH; which of these
  the paper's numbers had is not known.
* dream, entropy order, no blocks, Dream's schedule: Dream's ``diffusion_generate``, and the authors' recipe.
* dream-reasoning, temperature 0.1 and top-p 0.9: Dream's ``eval_instruct/eval.sh``, which takes 256 tokens for GSM8K,
  512 for MATH, 768 for HumanEval and 1024 for MBPP.

The prompts, examples and parsers of those harnesses are not reproduced: numbers compare with each other here, and with
published ones only roughly.
"""

from espo_lightning.decoding.masked import Decoding
from espo_lightning.decoding.orders import entropy_order
from espo_lightning.decoding.schedules import dream_schedule

LENGTHS = (128, 256, 512)


def _llada(length: int, tokens: int) -> Decoding:
    return Decoding(length, block_length=32, steps=length // tokens, temperature=0.0)


def _dream(length: int, tokens: int, **sampling: float) -> Decoding:
    return Decoding(length, length, steps=length // tokens, order=entropy_order, schedule=dream_schedule, **sampling)


PROTOCOLS: dict[str, Decoding] = {
    **{f"llada-planning-{length}": _llada(length, tokens=2) for length in LENGTHS},
    **{f"llada-reasoning-{length}": _llada(length, tokens=1) for length in LENGTHS},
    **{f"dream-planning-{length}": _dream(length, tokens=2, temperature=0.0) for length in LENGTHS},
    **{
        f"dream-reasoning-{length}": _dream(length, tokens=1, temperature=0.1, top_p=0.9)
        for length in (*LENGTHS, 768, 1024)
    },
}


def protocol(name: str) -> Decoding:
    """The decoding of a protocol, like ``llada-planning-256``. Raises ValueError for an unknown name."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown: take one of {', '.join(PROTOCOLS)}, or set decoding yourself")
    return PROTOCOLS[name]
