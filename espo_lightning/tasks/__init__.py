"""Tasks: prompts and verifiers, without torch."""

from espo_lightning.tasks.base import Problem, Task, Verdict
from espo_lightning.tasks.countdown import Countdown
from espo_lightning.tasks.sudoku import Sudoku

__all__ = ["Countdown", "Problem", "Sudoku", "Task", "Verdict"]
