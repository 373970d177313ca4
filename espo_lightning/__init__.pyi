"""ESPO (arXiv:2512.03759): reinforcement learning for diffusion language models, on PyTorch Lightning."""

from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.decoding.causal import AutoregressiveDecoding
from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.decoding.orders import entropy_order, left_to_right, low_confidence, margin_order, random_order
from espo_lightning.decoding.schedules import Step, dream_schedule, even_schedule, origin_schedule
from espo_lightning.objectives.advantages import (
    leave_one_out,
    mean_centred,
    softmax_difference,
    standardised,
    z_score,
)
from espo_lightning.objectives.balance import Balance
from espo_lightning.objectives.kl import (
    k1,
    k1_score,
    k2,
    k2_each,
    k2_u,
    k3,
    sequence_kl,
    step_kl,
    token_kl,
    trace_kl,
    undivided_kl,
    view_kl,
)
from espo_lightning.objectives.objective import Objective, Scores, alike, by_length
from espo_lightning.objectives.policy_gradient import PolicyGradient, espo_loss
from espo_lightning.objectives.ratios import (
    own_length_ratio,
    scored_token_ratio,
    sequence_ratio,
    step_ratio,
    token_ratio,
    trace_ratio,
    undivided_ratio,
    view_ratio,
)
from espo_lightning.objectives.sandwich import Sandwich
from espo_lightning.objectives.self_normalised import SelfNormalised
from espo_lightning.objectives.truncated import TruncatedRatio, ball_kl, hamming_ball, truncated_ratio
from espo_lightning.objectives.weighted import Weighted, total
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.lora import LoRA
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.block import BlockELBO
from espo_lightning.scoring.likelihood import (
    ELBO,
    Autoregressive,
    Likelihood,
    MeanField,
    QuadratureELBO,
    Seen,
    TimeELBO,
)
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import log_probs, score
from espo_lightning.scoring.trajectory import HighestEntropy, Trajectory
from espo_lightning.scoring.views import BlockViews, OneMasked, RandomViews, TokenViews
from espo_lightning.tasks import Chain, Countdown, Problem, Sudoku, Task, TRLReward
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.module import ESPOModule
from espo_lightning.training.rollout import Rollout
from espo_lightning.training.strategies import FSDP, FSDP2
from espo_lightning.training.zero import DeepSpeed

__all__ = [
    "ELBO",
    "FSDP",
    "FSDP2",
    "Autoregressive",
    "AutoregressiveDecoding",
    "Balance",
    "BlockDecoding",
    "BlockELBO",
    "BlockViews",
    "Chain",
    "Countdown",
    "Decoder",
    "Decoding",
    "DeepSpeed",
    "ESPOModule",
    "HighestEntropy",
    "Layout",
    "Likelihood",
    "LoRA",
    "Masks",
    "MeanField",
    "Objective",
    "OneMasked",
    "Policy",
    "PolicyGradient",
    "Problem",
    "PromptDataModule",
    "Prompts",
    "QuadratureELBO",
    "RandomViews",
    "Rollout",
    "Sandwich",
    "Scores",
    "Seen",
    "SelfNormalised",
    "Step",
    "Sudoku",
    "TRLReward",
    "Task",
    "TimeELBO",
    "TokenViews",
    "Trace",
    "Trajectory",
    "TruncatedRatio",
    "Weighted",
    "alike",
    "ball_kl",
    "by_length",
    "dream_schedule",
    "entropy_order",
    "espo_loss",
    "even_schedule",
    "generate",
    "hamming_ball",
    "k1",
    "k1_score",
    "k2",
    "k2_each",
    "k2_u",
    "k3",
    "leave_one_out",
    "left_to_right",
    "load_policy",
    "log_probs",
    "low_confidence",
    "margin_order",
    "mean_centred",
    "new_policy",
    "origin_schedule",
    "own_length_ratio",
    "random_order",
    "score",
    "scored_token_ratio",
    "sequence_kl",
    "sequence_ratio",
    "softmax_difference",
    "standardised",
    "step_kl",
    "step_ratio",
    "token_kl",
    "token_ratio",
    "total",
    "trace_kl",
    "trace_ratio",
    "truncated_ratio",
    "undivided_kl",
    "undivided_ratio",
    "view_kl",
    "view_ratio",
    "z_score",
]
