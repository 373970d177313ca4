"""Tasks: prompts and verifiers, without torch."""

from espo_lightning.tasks.base import Problem, Task, Verdict
from espo_lightning.tasks.code import MBPP, AceCode, HumanEval
from espo_lightning.tasks.countdown import Countdown
from espo_lightning.tasks.maths import GSM8K, MATH
from espo_lightning.tasks.rewards import Weighted
from espo_lightning.tasks.rows import Rows
from espo_lightning.tasks.sudoku import Sudoku

__all__ = [
    "GSM8K",
    "MATH",
    "MBPP",
    "AceCode",
    "Countdown",
    "HumanEval",
    "Problem",
    "Rows",
    "Sudoku",
    "Task",
    "Verdict",
    "Weighted",
]
