"""What the notebooks measure: one function per question, from a seed and settings to plain numbers.

Exact numbers are of a *state*: the canvas of a real rollout in which some of the puzzle's empty cells, drawn at
random, are hidden again. The rest of that rollout is a small canvas (`FreeCells`) of n cells and 4 digits whose law,
ELBOs, gradients and decoders can be enumerated. It is a state that decoding in random order passes through.
"""

from espo_lightning.studies.kl import kl_estimators, kl_training
from espo_lightning.studies.ratios import ratios
from espo_lightning.studies.tightness import tightness

__all__ = ["kl_estimators", "kl_training", "ratios", "tightness"]
