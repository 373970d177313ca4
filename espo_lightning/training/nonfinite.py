"""What happens to an update whose gradient is NaN or infinite."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from espo_lightning.training.gradient import Loss
from espo_lightning.training.rollout import Rollout
from espo_lightning.training.strategies import gather

if TYPE_CHECKING:
    from espo_lightning.training.module import ESPOModule

ADVICE = "lower the learning rate or max_grad_norm, raise beta, or use float32"


def report_nonfinite(module: "ESPOModule", rollout: Rollout, pieces: list[Loss]) -> None:
    """Name the completions whose score is not finite, save the rollout of every process, and give up after too many.

    Raises:
        FloatingPointError: ``max_skipped`` updates before this one had such a gradient, too.
    """
    scores = torch.cat([piece.log_probs for piece in pieces], 1).sum((0, 2))
    bad = (~scores.isfinite()).nonzero().squeeze(-1).tolist()
    name = f"nonfinite_rollout_{module.rollouts}_rank{module.global_rank}.pt"
    path = Path(module.trainer.strategy.broadcast(str(module.trainer.default_root_dir))) / name
    tensors = {"prompt": rollout.prompts.ids, "completion": rollout.completion, "advantages": rollout.advantages}
    torch.save(tensors, path)
    named = ", ".join(f"{rows} of rank {rank}" for rank, rows in enumerate(gather(bad)) if rows)
    rank_zero_warn(
        f"rollout {module.rollouts}: the gradient is NaN or infinite (completions with a non-finite score: "
        f"{named or 'none'}); the update is skipped and the rollout of every process saved like {path}"
    )
    if module.skipped_in_a_row >= module.max_skipped:
        raise FloatingPointError(
            f"{module.skipped_in_a_row + 1} updates in a row had a NaN or infinite gradient: {ADVICE}; "
            "the last checkpoint is intact"
        )
