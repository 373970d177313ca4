"""`ESPOModule`: one training step = one rollout, then mu inner updates on it."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder, Trace
from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.objectives.advantages import equal_groups, leave_one_out
from espo_lightning.objectives.objective import Objective, Scores
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.reference import make_reference
from espo_lightning.scoring.likelihood import ELBO, Likelihood, Seen
from espo_lightning.scoring.masks import Masks
from espo_lightning.tasks.base import Problem, Verdict
from espo_lightning.tasks.judge import judge_all
from espo_lightning.tasks.statistics import cluster_of, summarise
from espo_lightning.training.checkpoints import PolicyModule
from espo_lightning.training.checks import check_settings, check_training, check_updates
from espo_lightning.training.gradient import Loss, loss_parts, mean_loss
from espo_lightning.training.metrics import Share, rollout_row, update_shares
from espo_lightning.training.nonfinite import accepted, check_rewards, naming, watched
from espo_lightning.training.rollout import Rollout, chunks, trained_rows
from espo_lightning.training.strategies import check, clip_grad_norm, copy_weights, gather, gathered, shard, unreduced

# purposes of random keys, folded into the seed
DECODE, MASK, EVALUATE = range(3)


class ESPOModule(PolicyModule):
    """Reinforcement learning of a policy on verifiable prompts: ESPO (arXiv:2512.03759), or another objective.

    Defaults are those of the bundled tiny policy; the paper's settings for LLaDA and Dream are in ``experiments/``,
    other methods in ``experiments/methods/``. Optimization is manual: clipping and micro-batches are arguments here,
    and Lightning's ``global_step`` counts updates, ``updates`` of them per training batch.

    Args:
        policy: the policy to train, see `load_policy`; diffusion or causal.
        decoding: how rollouts are decoded (`Decoding`, or `AutoregressiveDecoding` for a causal policy); validation
            uses the same at temperature 0.
        group_size: completions per prompt (G).
        updates: inner updates per rollout (mu).
        likelihood: how completions are scored: `ELBO`, `MeanField`, ...; `Autoregressive` for a causal policy.
        objective: what is maximised: `PolicyGradient` (ESPO), `Weighted`, `SelfNormalised`, or your own `Objective`.
        advantage: `leave_one_out` (the authors' code), `mean_centred` (the paper's text), `standardised` (GRPO), ...
            [Q, G] -> [Q, G]; groups with equal rewards have advantage 0 in any case.
        reference_sync: copy the policy into the reference every so many rollouts; null = frozen for good.
        fresh_masks: new masks for every update, the paper's way; false reuses those of the first update, which
            saves all old passes and all but one reference pass.
        skip_equal_groups: leave out groups with equal rewards where these have no gradient (no KL penalty).
        optimizer: any torch optimizer.
        warmup: updates of linear learning-rate warm-up; the first update has 1/warmup of the full rate.
        max_grad_norm: clip the global gradient norm to this; null = do not clip.
        micro_batch: completions per forward and backward pass; null = all at once. A multiple of ``group_size`` for an
            objective in which the completions of a prompt meet.
        view_by_view: backpropagate one mask view at a time: same gradient, the memory of one view, one more forward.
        gather_rollouts: under FSDP, gather every weight once per rollout, not in every forward pass. Needs the memory
            of the whole policy; false needs that of one layer.
        compile: backend for torch.compile of the network, such as "inductor"; null = eager. Pays after a warm-up.
        max_skipped: stop after so many updates in a row with a NaN or infinite gradient.
        max_prompt_length: longest prompt in tokens; longer ones raise.
        seed: of everything random in training.

    Raises:
        ValueError: a number out of range, or arguments that contradict each other.
    """

    def __init__(
        self,
        policy: Policy,
        decoding: Decoder = Decoding(),
        group_size: int = 8,
        updates: int = 2,
        likelihood: Likelihood = ELBO(),
        objective: Objective = PolicyGradient(),
        advantage: Callable[[Tensor], Tensor] = leave_one_out,
        reference_sync: int | None = None,
        fresh_masks: bool = True,
        skip_equal_groups: bool = True,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01),
        warmup: int = 0,
        max_grad_norm: float | None = 1.0,
        micro_batch: int | None = None,
        view_by_view: bool = False,
        gather_rollouts: bool = True,
        compile: str | None = None,
        max_skipped: int = 10,
        max_prompt_length: int = 512,
        seed: int = 0,
    ):
        super().__init__()
        check_settings(policy, decoding, likelihood, objective, group_size, updates, micro_batch, reference_sync)
        check_updates(warmup, max_grad_norm, max_skipped)
        check_training(policy, optimizer, decoding.length, max_prompt_length, seed)
        self.automatic_optimization = False
        self.policy, self.decoding, self.likelihood, self.objective = policy, decoding, likelihood, objective
        self.group_size, self.updates, self.advantage = group_size, updates, advantage
        self.fresh_masks, self.skip_equal_groups = fresh_masks and likelihood.random, skip_equal_groups
        self.reference = make_reference(policy, stored=reference_sync is not None) if objective.reference else None
        if compile is not None:
            for scored in (policy, self.reference.policy) if objective.reference else (policy,):
                scored.compile_network(compile)
        self.leave_out_frozen(but="reference." if reference_sync else None)
        self.optimizer, self.warmup, self.max_grad_norm = optimizer, warmup, max_grad_norm
        self.micro_batch, self.view_by_view, self.gather_rollouts = micro_batch, view_by_view, gather_rollouts
        self.reference_sync, self.max_skipped, self.skipped_in_a_row = reference_sync, max_skipped, 0
        self.max_prompt_length, self.seed = max_prompt_length, seed
        self.rollouts = 0  # finished rollouts; with the seed, the whole state of the randomness
        self.last_rollout: Rollout | None = None  # for callbacks
        self.trace: Trace | None = None  # of the completions just decoded, if the likelihood asks
        self.verdicts: list[tuple[Verdict, str]] = []  # of the validation in progress, with their clusters

    def configure_model(self) -> None:
        """Shard policy and reference, if the strategy wants that. Lightning calls it before fits and validations."""
        strategy = self.trainer.strategy
        check(strategy, self.policy)
        self.policy = shard(self.policy, strategy, gather_rollouts=self.gather_rollouts)
        if self.reference is not None:
            mine = self.policy.has_adapters  # then the reference is this policy
            self.reference.policy = self.policy if mine else shard(self.reference.policy, strategy)

    # ---- one training step -------------------------------------------------------------------------

    @naming("rollout {0.rollouts}")
    def training_step(self, problems: list[Problem], batch_idx: int) -> None:
        """A rollout, ``updates`` updates on it, and one row of metrics."""
        start = time.perf_counter()
        prompts, completion, keys = self.complete(problems)
        decoded = time.perf_counter()
        rollout = self.judge_and_score(problems, prompts, completion, keys)
        scored = time.perf_counter()
        updates = [self.update(rollout, u) for u in range(self.updates)]
        seconds = {"rollout": decoded - start, "score": scored - decoded, "update": time.perf_counter() - scored}
        self.rollouts += 1
        if self.reference_sync and self.rollouts % self.reference_sync == 0:
            copy_weights(self.reference.policy, self.policy)
        self.last_rollout = rollout
        self.log_step(rollout, updates, seconds)

    def complete(self, problems: list[Problem]) -> tuple[Prompts, Tensor, Tensor]:
        """G completions per problem: prompts [B, P], token ids [B, L] and the completions' keys [B]."""
        prompts = self.policy.encode([p.prompt for p in problems], self.max_prompt_length).repeat_each(self.group_size)
        index = self.global_index(len(prompts.ids))
        keys = fold_in(fold_in(self.seed, self.rollouts).to(index.device), index)
        decoded = self.generate(prompts, fold_in(keys, DECODE), self.decoding, self.likelihood.traced)
        completion, self.trace = decoded if self.likelihood.traced else (decoded, None)
        return prompts, completion, keys

    def global_index(self, count: int) -> Tensor:
        """Numbers of this process's ``count`` samples among those of all processes: int64 [count]."""
        return self.global_rank * count + torch.arange(count, device=self.policy.device)

    def generate(self, prompts: Prompts, keys: Tensor, decoding: Decoder, traced: bool = False) -> tuple | Tensor:
        """Completions [B, L] of prompts [B, P] with keys [B], ``traced`` with their `Trace`; as many steps by all."""
        decode = decoding.decode if traced else decoding.generate
        with gathered(self.policy) if self.gather_rollouts else nullcontext():
            return decode(self.policy, prompts, keys, self.agree)

    def agree(self, more: bool) -> bool:
        """Does any process still need a denoising step?"""
        return self.trainer.strategy.reduce_boolean_decision(more, all=False)

    def judge_and_score(self, problems: list[Problem], prompts: Prompts, completion: Tensor, keys: Tensor) -> Rollout:
        """Verify the completions, draw all masks, and score what must be scored before the first update."""
        texts = self.policy.decode(completion)
        each = [problem for problem in problems for _ in range(self.group_size)]
        verdicts = judge_all(each, texts, must_work=self.rollouts == 0)
        rewards = torch.tensor([v["reward"] for v in verdicts], device=completion.device).view(-1, self.group_size)
        equal = equal_groups(rewards)
        advantages = self.advantage(rewards).masked_fill(equal.unsqueeze(-1), 0.0).flatten()
        check_rewards(verdicts, rewards, advantages)
        needed = ~equal if self.skip_equal_groups and self.objective.idle else torch.ones_like(equal)
        most = int(self.trainer.strategy.reduce(needed.sum(), reduce_op="max"))
        rows, counted = trained_rows(needed, most, self.group_size)

        keys = fold_in(keys, MASK)
        seen = Seen.of(self.policy, prompts, completion, keys, self.updates, self.trace, self.decoding.passes)
        length = seen.valid.sum(-1)
        count = self.objective.count(length)
        count = count / self.trainer.strategy.reduce(count.mean(), reduce_op="mean")

        batch, keys, seen = (prompts.of(rows), completion[rows]), keys[rows], seen.of_rows(rows)
        draws = self.updates if self.fresh_masks else 1
        masks = [self.likelihood.masks(fold_in(keys, u), seen._replace(update=u)).tallied() for u in range(draws)]
        old, ref = [None] * draws, [None] * draws
        if self.objective.old:
            old[1:] = [self.score(self.policy, *batch, m) for m in masks[1:]]
        if self.objective.reference:
            ref = [self.score(self.reference, *batch, m) for m in masks]
        trained = {"advantages": advantages[rows], "count": count[rows], "counted": counted, "idle": most == 0}
        done = {"rewards": rewards, "decoded": completion, "texts": texts, "verdicts": verdicts}
        return Rollout(*batch, length[rows], masks, old, ref, **trained, **done)

    @torch.no_grad()
    def score(self, policy, prompts: Prompts, completion: Tensor, masks: Masks) -> Tensor:
        """Log-probabilities [M, B, L] without gradient, in the same micro-batches as the updates."""
        rows, log_probs = chunks(len(completion), self.micro_batch), self.likelihood.log_probs
        return torch.cat([log_probs(policy, prompts.of(r), completion[r], masks.of(r)) for r in rows], 1)

    def update(self, rollout: Rollout, u: int) -> dict[str, Share]:
        """One optimizer step on the whole rollout, in micro-batches; this process's share of its metrics.

        A NaN or infinite gradient is never applied: the step only counts, the offending completions are
        named and the rollout is saved for inspection.

        Raises:
            FloatingPointError: more than ``max_skipped`` such updates in a row.
        """
        optimizer, view = self.optimizers(), u if self.fresh_masks else 0
        optimizer.zero_grad()
        rows = chunks(len(rollout.completion), self.micro_batch)
        pieces = [self.accumulate(rollout, view, r, last=r is rows[-1]) for r in rows]
        if self.objective.old and rollout.old[view] is None:
            rollout.old[view] = torch.cat([piece.log_probs for piece in pieces], 1)
        norm = clip_grad_norm(self.policy, self.trainer.strategy, self.max_grad_norm or math.inf)  # null: only measured
        finite = accepted(self, rollout, pieces, norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        self.lr_schedulers().step()
        metrics = {"grad_norm": (norm, 1), "lr": (learning_rate, 1), "skipped_updates": (float(not finite), 1)}
        return metrics | update_shares(pieces, rollout, view)

    def accumulate(self, rollout: Rollout, view: int, rows: slice, last: bool) -> Loss:
        """Add the gradient of some completions. ``last``: gradients are to be synchronised over processes now."""
        batch, masks = (rollout.prompts.of(rows), rollout.completion[rows]), rollout.masks[view].of(rows)
        old, ref = (None if x is None else x[:, rows] for x in (rollout.old[view], rollout.ref[view]))

        def weigh(new: Tensor):
            before = new.detach() if old is None and self.objective.old else old
            scores = Scores(new, before, ref, masks.weight, rollout.length[rows])
            settings = {"group": self.group_size, "completions": rollout.rewards.numel()}
            return mean_loss(self.objective, scores, rollout.advantages[rows], rollout.count[rows], **settings)

        loss, parts = loss_parts(
            lambda drawn: self.likelihood.log_probs(self.policy, *batch, drawn), masks, weigh, self.view_by_view
        )
        for part, final in parts:
            with nullcontext() if last and final else unreduced(self.policy, self.trainer.strategy):
                self.manual_backward(part)
        return loss

    # ---- metrics, validation, optimizer, checkpoints -------------------------------------------------

    def log_step(self, rollout: Rollout, updates: list[dict[str, Share]], seconds: dict[str, float]) -> None:
        """One row of metrics per rollout, of all processes; docs/metrics.md explains each."""
        means = rollout_row(rollout, updates, seconds, self.policy, self.trainer.world_size)
        means |= {"rollout": float(self.rollouts), "update": float(self.rollouts * self.updates)}
        self.log_dict(means, batch_size=1)
        self.log_dict({"reward": means["train/reward"], "updates": means["update"]}, prog_bar=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        self.verdicts = []

    @naming("the validation after rollout {0.rollouts}")
    def validation_step(self, problems: list[Problem], batch_idx: int) -> None:
        """Greedy completions of held-out problems, each with a key of its own, for orders that are drawn."""
        prompts = self.policy.encode([p.prompt for p in problems], self.max_prompt_length)
        first = self.trainer.world_size * len(self.verdicts)  # the last batch may be smaller
        keys = fold_in(EVALUATE, first + self.global_index(len(problems)))
        texts = self.policy.decode(self.generate(prompts, keys, self.decoding.greedy))
        clusters = [cluster_of(problem.prompt, problem.cluster) for problem in problems]
        self.verdicts += zip(judge_all(problems, texts), clusters)

    def on_validation_epoch_end(self) -> None:
        pairs = [pair for part in gather(self.verdicts) for pair in part]
        self.summary = summarise([verdict for verdict, _ in pairs], [cluster for _, cluster in pairs])
        metrics = {f"val/{key}": self.summary[key] for key in self.summary["ci95"]}
        self.log_dict({**metrics, "rollout": float(self.rollouts)}, sync_dist=True)  # they are equal already

    def configure_optimizers(self):
        optimizer = watched(self.optimizer([p for p in self.policy.parameters() if p.requires_grad]), self, self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / max(1, self.warmup)))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Randomness is keyed, so two counters are all that resume needs beside Lightning's own state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"rollouts": self.rollouts, "skipped_in_a_row": self.skipped_in_a_row}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts, self.skipped_in_a_row = checkpoint["rollouts"], checkpoint["skipped_in_a_row"]
