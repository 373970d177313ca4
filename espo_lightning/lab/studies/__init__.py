"""What the notebooks measure: one function per question, from a seed and settings to plain numbers.

Exact numbers are of a *state*: a Sudoku puzzle with n empty cells whose givens are visible, so that the canvas has n
cells and 4 digits (`FreeCells`) and all 4^n completions, their ELBOs, gradients and decoders can be enumerated.
Training is the library's default run, on puzzles with 8 empty cells.
"""

from espo_lightning.lab.studies.arms import Arm, equal_rollouts, expected_flops
from espo_lightning.lab.studies.causal import causal_ratios
from espo_lightning.lab.studies.compute import paper_costs, step_costs
from espo_lightning.lab.studies.jump import covered, growth, jump, rare_mode
from espo_lightning.lab.studies.kl import kl_estimators, kl_training
from espo_lightning.lab.studies.noise import noise, points
from espo_lightning.lab.studies.ratios import ratios
from espo_lightning.lab.studies.statistics import broken_line, first_above, rank_correlation
from espo_lightning.lab.studies.tightness import tightness
from espo_lightning.lab.studies.training import final_reward, pilot_run, training_run

__all__ = [
    "Arm", "broken_line", "causal_ratios", "covered", "equal_rollouts", "expected_flops", "final_reward", "first_above",
    "growth", "jump", "kl_estimators", "kl_training", "noise", "paper_costs", "pilot_run", "points", "rank_correlation",
    "rare_mode", "ratios", "step_costs", "tightness", "training_run",
]  # fmt: skip
