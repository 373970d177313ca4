"""Rows of mathematical tasks, and phrases that give an answer."""

from pathlib import Path

from espo_lightning.tasks.maths import GSM8K, MATH

DATA = Path(__file__).parent / "data"
GSM8K_ROWS = GSM8K(path=str(DATA / "gsm8k_60.jsonl"), held_out=1.0)
MATH_ROWS = MATH(path=str(DATA / "math500_84.jsonl"), held_out=1.0)
RIGHT = ["\\boxed{{{}}}", "The answer is {}.", "The answer is {}", "so\n#### {}", "Final answer: ${}$", "\\fbox{{{}}}"]
