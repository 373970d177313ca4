"""Tasks: prompts and verifiers, without torch."""

from espo_lightning.tasks.base import Problem, Task, Verdict
from espo_lightning.tasks.chain import Chain
from espo_lightning.tasks.code import MBPP, AceCode, HumanEval
from espo_lightning.tasks.countdown import Countdown
from espo_lightning.tasks.gym import ReasoningGym
from espo_lightning.tasks.maths import GSM8K, MATH
from espo_lightning.tasks.rewards import Weighted
from espo_lightning.tasks.rows import Rows
from espo_lightning.tasks.sudoku import Sudoku
from espo_lightning.tasks.trl import TRLReward

__all__ = [
    "GSM8K",
    "MATH",
    "MBPP",
    "AceCode",
    "Chain",
    "Countdown",
    "HumanEval",
    "Problem",
    "ReasoningGym",
    "Rows",
    "Sudoku",
    "TRLReward",
    "Task",
    "Verdict",
    "Weighted",
]
