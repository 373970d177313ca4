"""ESPO (arXiv:2512.03759): reinforcement learning for diffusion language models, on PyTorch Lightning."""

from espo_lightning.decoding.causal import AutoregressiveDecoding
from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.decoding.orders import entropy_order, low_confidence, margin_order, random_order
from espo_lightning.decoding.schedules import Step, dream_schedule, even_schedule, origin_schedule
from espo_lightning.objectives.loss import (
    espo_loss,
    k1,
    k1_score,
    k2,
    k2_u,
    k3,
    leave_one_out,
    mean_centred,
    sequence_ratio,
    standardised,
    token_ratio,
)
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.lora import LoRA
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import (
    ELBO,
    Autoregressive,
    Likelihood,
    MeanField,
    QuadratureELBO,
    TimeELBO,
    score,
)
from espo_lightning.scoring.masks import Masks
from espo_lightning.tasks import Countdown, Problem, Sudoku, Task, TRLReward
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.module import ESPOModule, Rollout
from espo_lightning.training.strategies import FSDP, FSDP2
from espo_lightning.training.zero import DeepSpeed

__all__ = [
    "ELBO",
    "FSDP",
    "FSDP2",
    "Autoregressive",
    "AutoregressiveDecoding",
    "Countdown",
    "Decoder",
    "Decoding",
    "DeepSpeed",
    "ESPOModule",
    "Likelihood",
    "LoRA",
    "Masks",
    "MeanField",
    "Policy",
    "Problem",
    "PromptDataModule",
    "Prompts",
    "QuadratureELBO",
    "Rollout",
    "Step",
    "Sudoku",
    "TRLReward",
    "Task",
    "TimeELBO",
    "dream_schedule",
    "entropy_order",
    "espo_loss",
    "even_schedule",
    "generate",
    "k1",
    "k1_score",
    "k2",
    "k2_u",
    "k3",
    "leave_one_out",
    "load_policy",
    "low_confidence",
    "margin_order",
    "mean_centred",
    "new_policy",
    "origin_schedule",
    "random_order",
    "score",
    "sequence_ratio",
    "standardised",
    "token_ratio",
]
