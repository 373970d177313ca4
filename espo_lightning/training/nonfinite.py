"""NaN and infinity in training: gradients, weights after a step, logits, rewards; and steps that round to nothing."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from espo_lightning.tasks.base import Verdict
from espo_lightning.training.gradient import Loss
from espo_lightning.training.rollout import Rollout
from espo_lightning.training.strategies import gather

if TYPE_CHECKING:
    from espo_lightning.training.module import ESPOModule

ADVICE = "lower the learning rate or max_grad_norm, raise beta, or use float32"
SAMPLED = 256  # entries of each weight by which is judged whether weights move
ENOUGH = 0.5  # of them


def naming(moment: str) -> Callable[[Callable], Callable]:
    """A step of a module whose FloatingPointErrors say when they happened: ``moment``, formatted with the module."""

    def decorate(step: Callable) -> Callable:
        @wraps(step)
        def named(module: LightningModule, *arguments: Any, **options: Any) -> Any:
            try:
                return step(module, *arguments, **options)
            except FloatingPointError as error:
                raise FloatingPointError(f"{moment.format(module)}: {error}") from error

        return named

    return decorate


# ---- gradients and rewards -------------------------------------------------------------------------------


def accepted(module: "ESPOModule", rollout: Rollout, pieces: list[Loss], norm: Tensor) -> bool:
    """Whether the gradient is finite, as its norm says, the same on every process. If not, it is dropped and reported.

    Raises:
        FloatingPointError: see `report_nonfinite`.
    """
    finite = bool(torch.isfinite(norm))
    if not finite:
        module.optimizers().zero_grad()  # without gradients a step only counts
        report_nonfinite(module, rollout, pieces)
    module.skipped_in_a_row = 0 if finite else module.skipped_in_a_row + 1
    return finite


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


def check_rewards(verdicts: list[Verdict], rewards: Tensor, advantages: Tensor) -> None:
    """Refuse rewards that float32 cannot hold or compare.

    Args:
        verdicts: B of them, whose rewards are floats of Python.
        rewards: the same in float32.
        advantages: [B].

    Raises:
        FloatingPointError: a reward or an advantage is not finite.
    """
    bad = ~(rewards.flatten().isfinite() & advantages.isfinite())
    if bad.any():
        first = int(bad.int().argmax())
        raise FloatingPointError(
            f"completion {first} has the reward {verdicts[first]['reward']:g} and the advantage "
            f"{float(advantages[first]):g}, which are to be finite in float32: scale the rewards"
        )


# ---- weights ---------------------------------------------------------------------------------------------


def watched(optimizer: Optimizer, module: LightningModule, warmup: int) -> Optimizer:
    """The optimizer, every step of which is followed by a look at its weights: one sum over them, no number changed.

    A step after which a weight is NaN or infinite raises a FloatingPointError on every process. If weights of bfloat16
    stay where they are, there is a warning, see `Movement`.

    Args:
        warmup: steps until the learning rate is at its full height.
    """

    def check(*_: Any) -> None:
        weights = [local(weight) for group in optimizer.param_groups for weight in group["params"]]
        finite = bool(get_total_norm(weights).isfinite()) or all(bool(w.isfinite().all()) for w in weights)
        if module.trainer.strategy.reduce_boolean_decision(not finite, all=False):
            raise FloatingPointError(
                f"weights are NaN or infinite after a step of {type(optimizer).__name__} with the learning rate "
                f"{float(optimizer.param_groups[0]['lr']):g}: {ADVICE}; nothing of this is saved, and the last "
                "checkpoint is intact"
            )

    optimizer.register_step_post_hook(check)
    if any(weight.dtype == torch.bfloat16 for group in optimizer.param_groups for weight in group["params"]):
        Movement(optimizer, warmup)
    return optimizer


class Movement:
    """Looks at one step at the full learning rate, and warns if most weights of bfloat16 do not move.

    bfloat16 has 8 bits of mantissa: a weight of 0.02 moves by 6e-5 or not at all, so that a learning rate of 1e-6
    does nothing, silently, however many steps there are. Only weights with a gradient are counted, a few of each
    parameter.
    """

    def __init__(self, optimizer: Optimizer, warmup: int):
        self.remaining, self.before = max(1, warmup), None
        self.hooks = [
            optimizer.register_step_pre_hook(self.look),
            optimizer.register_step_post_hook(self.compare),
        ]

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step."""
        self.remaining -= 1
        if self.remaining <= 0:
            gradients = torch.cat([sample(weight.grad) for weight in self.weights(optimizer)] or [torch.zeros(0)])
            self.counted = gradients != 0
            if self.counted.any():  # else wait for a step that has gradients
                self.before = torch.cat([sample(weight) for weight in self.weights(optimizer)])

    def compare(self, optimizer: Optimizer, *_: Any) -> None:
        """After it."""
        if self.before is None:
            return
        after = torch.cat([sample(weight) for weight in self.weights(optimizer)])
        share = float((after != self.before)[self.counted].float().mean())
        for hook in self.hooks:
            hook.remove()
        if share < ENOUGH:
            rank_zero_warn(
                f"only {100 * share:.1f} % of the weights moved in an update with the full learning rate "
                f"{float(optimizer.param_groups[0]['lr']):g}: they are stored in bfloat16, whose steps are larger. "
                "Store them in float32 (model.policy.dtype=float32, with trainer.precision=bf16-mixed), train adapters "
                "(model.policy.lora), or raise the rate"
            )

    @staticmethod
    def weights(optimizer: Optimizer) -> list[Tensor]:
        """Those of bfloat16 that have a gradient."""
        found = [weight for group in optimizer.param_groups for weight in group["params"]]
        return [weight for weight in found if weight.dtype == torch.bfloat16 and weight.grad is not None]


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight or gradient, without its graph."""
    return weight.detach().to_local() if isinstance(weight, DTensor) else weight.detach()


def sample(weight: Tensor) -> Tensor:
    """A copy of up to twice `SAMPLED` entries, evenly spread."""
    flat = local(weight).flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()
