"""ESPO (arXiv:2512.03759): reinforcement learning for diffusion language models, on PyTorch Lightning."""

from espo_lightning.autoregressive import AutoregressiveDecoding
from espo_lightning.checkpoint import LoRA, load_policy
from espo_lightning.data import PromptDataModule
from espo_lightning.likelihood import ELBO, Autoregressive, Likelihood, MeanField, QuadratureELBO, TimeELBO, score
from espo_lightning.loss import (
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
from espo_lightning.masking import Masks
from espo_lightning.module import ESPOModule, Rollout
from espo_lightning.policy import Policy, Prompts
from espo_lightning.sampler import (
    Decoder,
    Decoding,
    Step,
    dream_schedule,
    entropy_order,
    even_schedule,
    generate,
    low_confidence,
    margin_order,
    origin_schedule,
    random_order,
)
from espo_lightning.scratch import new_policy
from espo_lightning.strategies import FSDP, FSDP2
from espo_lightning.tasks import Countdown, Problem, Sudoku, Task
from espo_lightning.zero import DeepSpeed

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
