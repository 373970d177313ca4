"""Supervised training on a task's answers, with the likelihoods of RL."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from espo_lightning.keys import fold_in
from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.scoring.likelihood import ELBO, Likelihood, Seen
from espo_lightning.tasks.base import Problem
from espo_lightning.training.checkpoints import PolicyModule
from espo_lightning.training.checks import check_training
from espo_lightning.training.nonfinite import naming, watched
from espo_lightning.training.strategies import shard


def encode_answers(policy: Policy, answers: list[str], length: int) -> Tensor:
    """Answers as canvases [B, L]: their tokens, then end-of-text tokens to the end, which the model learns as well.

    Raises:
        ValueError: an answer has more than ``length`` tokens.
    """
    rows = policy.answer_tokens(answers)
    longest = max(rows, key=len)
    if len(longest) > length:
        raise ValueError(f"an answer has {len(longest)} tokens, more than length={length}: raise length")
    eos = policy.tokenizer.eos_token_id
    return torch.tensor([row + [eos] * (length - len(row)) for row in rows], device=policy.device)


class SFTModule(PolicyModule):
    """Supervised training: minimise -S / L of the answers given their prompts, S being their ELBO, or exact likelihood.

    Args:
        policy: `load_policy` of a folder, or `new_policy` from scratch. With ``denoise: true``, a causal
            checkpoint becomes a diffusion policy.
        length: canvas width L in tokens. A causal policy learns to stop where an answer is shorter.
        likelihood: the ELBO estimator, with masks drawn fresh for every example; `Autoregressive` for a causal policy.
        optimizer: any torch optimizer.
        warmup: share of the training in which the learning rate rises; it then falls to 0 along a cosine.
        max_prompt_length: longest prompt in tokens.
        seed: of the masks.

    Raises:
        ValueError: a number out of range, or a likelihood that cannot score the policy.
    """

    def __init__(
        self,
        policy: Policy,
        length: int = 16,
        likelihood: Likelihood = ELBO(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.02,
        max_prompt_length: int = 512,
        seed: int = 0,
    ):
        super().__init__()
        check_counts(1, length=length)
        check_numbers("[0, 1]", warmup=warmup)
        likelihood.check(policy, length)
        check_training(policy, optimizer, length, max_prompt_length, seed)
        if likelihood.traced:
            raise ValueError(
                f"likelihood={type(likelihood).__name__} scores along the trace of a decoder, and examples were not "
                "decoded: use ELBO, or another likelihood that draws its masks"
            )
        self.policy, self.length, self.likelihood = policy, length, likelihood
        self.optimizer, self.warmup, self.max_prompt_length, self.seed = optimizer, warmup, max_prompt_length, seed
        self.batches = 0  # trained on; with the seed, the whole state of the randomness
        self.leave_out_frozen()

    def configure_model(self) -> None:
        self.policy = shard(self.policy, self.trainer.strategy)

    def training_step(self, problems: list[Problem], batch_idx: int) -> Tensor:
        prompts = self.policy.encode([p.prompt for p in problems], self.max_prompt_length)
        answers = encode_answers(self.policy, [p.answer for p in problems], self.length)
        index = self.global_rank * len(problems) + torch.arange(len(problems), device=answers.device)
        keys = fold_in(fold_in(self.seed, self.batches).to(index.device), index)
        masks = self.likelihood.masks(keys, Seen.of(self.policy, prompts, answers, keys))
        loss = -self.likelihood.terms(self.policy, prompts, answers, masks).sum(-1).mean() / self.length
        self.log("train/loss", loss, prog_bar=True, batch_size=1, sync_dist=True)
        self.batches += 1
        return loss

    @naming("after {0.batches} batches")
    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)

    def configure_optimizers(self):
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=self.warmup,
            cycle_momentum=False,
        )
        return [watched(optimizer, self, round(self.warmup * steps))], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        # before there was this clock, a batch was an optimizer step
        self.batches = checkpoint.get("batches", checkpoint["global_step"])
