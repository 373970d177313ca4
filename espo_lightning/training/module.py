"""`ESPOModule`: one training step = one rollout, then mu inner updates on it."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.objectives import loss as losses
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.reference import make_reference
from espo_lightning.scoring.likelihood import ELBO, Likelihood
from espo_lightning.scoring.masks import Masks
from espo_lightning.tasks.base import Problem, Verdict
from espo_lightning.tasks.judge import judge_all
from espo_lightning.tasks.statistics import cluster_of, summarise
from espo_lightning.training.checkpoints import PolicyModule
from espo_lightning.training.metrics import UPDATE_METRICS, Share, pool, share
from espo_lightning.training.strategies import check, clip_grad_norm, copy_weights, gather, gathered, shard, unreduced

# purposes of random keys, folded into the seed
DECODE, MASK, EVALUATE = range(3)


class Rollout(NamedTuple):
    """Everything the inner updates need: B = Q prompts x G completions of L tokens, U sets of masks.

    The first six describe the N <= B completions that are trained on. prompts: `Prompts` [N, P].
    completion: int64 [N, L]. masks: U `Masks` [M, N, L], or one if they are reused. old, ref: as many terms
    [M, N, L] float32; old[0] is None until the first update, whose own terms it equals; ref None if beta is
    0. advantages: [N]. counted: of the N rows, the first so many have a gradient; the others only keep this process in
    step with one that has more. rewards: [Q, G]. decoded: int64 [B, L], all completions. texts, verdicts: B each.
    """

    prompts: Prompts
    completion: Tensor
    masks: list[Masks]
    old: list[Tensor | None]
    ref: list[Tensor | None]
    advantages: Tensor
    counted: int
    rewards: Tensor
    decoded: Tensor
    texts: list[str]
    verdicts: list[Verdict]


class ESPOModule(PolicyModule):
    """ESPO (arXiv:2512.03759) for a policy on verifiable prompts.

    Defaults are those of the bundled tiny policy; the paper's settings for LLaDA and Dream are in
    ``experiments/``. Optimization is manual: clipping and micro-batches are arguments here, and Lightning's
    ``global_step`` counts updates, ``updates`` of them per training batch.

    Args:
        policy: the policy to train, see `load_policy`; diffusion or causal.
        decoding: how rollouts are decoded (`Decoding`, or `AutoregressiveDecoding` for a causal policy); validation
            uses the same at temperature 0.
        group_size: completions per prompt (G).
        updates: inner updates per rollout (mu).
        likelihood: how completions are scored: `ELBO`, `MeanField`, ...; `Autoregressive` for a causal policy.
        ratio: `sequence_ratio` (ESPO) or `token_ratio` (GRPO-style).
        clip_range: eps of Eq. 7 as in the papers, after the exponent was divided by L; null with ``clip_nats``.
        clip_nats: the same in nats per sequence, L ln(1 + eps).
        kl: KL estimator: `k1`, `k1_score`, `k2`, `k2_u`, `k3`.
        beta: KL coefficient; 0 drops the reference altogether.
        advantage: `leave_one_out` (the authors' code), `mean_centred` (the paper's text) or `standardised` (GRPO).
        reference_sync: copy the policy into the reference every so many rollouts; null = frozen for good.
        fresh_masks: new masks for every update, the paper's way; false reuses those of the first update, which
            saves all old passes and all but one reference pass.
        skip_equal_groups: leave out completions whose advantage is 0 where they have no gradient (beta = 0).
        optimizer: any torch optimizer.
        warmup: updates of linear learning-rate warm-up; the first update has 1/warmup of the full rate.
        max_grad_norm: clip the global gradient norm to this; null = do not clip.
        micro_batch: completions per forward and backward pass; null = all at once.
        view_by_view: backpropagate one mask view at a time: same gradient, the memory of one view, one more forward.
        gather_rollouts: under FSDP, gather every weight once per rollout, not in every forward pass. Needs the memory
            of the whole policy; false needs that of one layer.
        compile: backend for torch.compile of the network, such as "inductor"; null = eager. Pays after a warm-up.
        max_skipped: stop after so many updates in a row with a NaN or infinite gradient.
        max_prompt_length: longest prompt in tokens; longer ones raise.
        seed: of everything random in training.
    """

    def __init__(
        self,
        policy: Policy,
        decoding: Decoder = Decoding(),
        group_size: int = 8,
        updates: int = 2,
        likelihood: Likelihood = ELBO(),
        ratio: Callable[[Tensor, Tensor], Tensor] = losses.sequence_ratio,
        clip_range: float | None = 0.05,
        clip_nats: float | None = None,
        kl: Callable[[Tensor], Tensor] = losses.k2,
        beta: float = 3e-3,
        advantage: Callable[[Tensor], Tensor] = losses.leave_one_out,
        reference_sync: int | None = None,
        fresh_masks: bool = True,
        skip_equal_groups: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
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
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2: an advantage compares completions; got {group_size}")
        if updates < 1 or (micro_batch is not None and micro_batch < 1):
            raise ValueError(f"updates and micro_batch must be at least 1, got {updates} and {micro_batch}")
        if (clip_range is None) == (clip_nats is None):
            raise ValueError(f"give clip_range or clip_nats, and null for the other; got {clip_range} and {clip_nats}")
        if kl is losses.k2_u and beta and likelihood.independent_draws < 2:
            raise ValueError("kl=k2_u needs independent mask draws: set likelihood.draws >= 2 and stratified: false")
        if reference_sync is not None and not beta:
            raise ValueError("reference_sync has no effect with beta=0: there is no reference; set beta or drop it")
        if reference_sync is not None and policy.has_adapters:
            raise ValueError("reference_sync is not possible with adapters: the reference is the base without them")
        likelihood.check(policy)
        decoding.check(policy)
        if decoding.temperature == 0:
            raise ValueError("decoding.temperature is 0: the completions of a group would all be equal; set it above 0")
        self.automatic_optimization = False
        self.policy, self.decoding, self.likelihood = policy, decoding, likelihood
        self.group_size, self.updates, self.fresh_masks = group_size, updates, fresh_masks and likelihood.random
        self.ratio, self.kl, self.beta, self.advantage = ratio, kl, beta, advantage
        length = decoding.length
        self.clip_range = losses.clip_range_of_nats(clip_nats, length) if clip_range is None else clip_range
        self.reference = make_reference(policy, stored=reference_sync is not None) if beta else None
        if compile is not None:
            for scored in (policy, self.reference.policy) if beta else (policy,):
                scored.compile_network(compile)
        self.reference_sync = reference_sync
        self.leave_out_frozen(but="reference." if reference_sync else None)
        self.skip_equal_groups = skip_equal_groups
        self.optimizer, self.warmup, self.max_grad_norm = optimizer, warmup, max_grad_norm
        self.micro_batch, self.view_by_view, self.gather_rollouts = micro_batch, view_by_view, gather_rollouts
        self.max_skipped, self.skipped_in_a_row = max_skipped, 0
        self.max_prompt_length, self.seed = max_prompt_length, seed
        self.rollouts = 0  # finished rollouts; with the seed, the whole state of the randomness
        self.last_rollout: Rollout | None = None  # for callbacks
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
        batch = len(prompts.ids)
        index = self.global_rank * batch + torch.arange(batch, device=prompts.ids.device)  # global sample index
        keys = fold_in(fold_in(self.seed, self.rollouts).to(index.device), index)
        return prompts, self.generate(prompts, fold_in(keys, DECODE), self.decoding), keys

    def generate(self, prompts: Prompts, keys: Tensor, decoding: Decoder) -> Tensor:
        """Completions [B, L] of prompts [B, P] with keys [B]; all processes run equally many steps."""
        with gathered(self.policy) if self.gather_rollouts else nullcontext():
            return decoding.generate(
                self.policy, prompts, keys, lambda more: self.trainer.strategy.reduce_boolean_decision(more, all=False)
            )

    def judge_and_score(self, problems: list[Problem], prompts: Prompts, completion: Tensor, keys: Tensor) -> Rollout:
        """Verify the completions, draw all masks, and score what must be scored before the first update."""
        texts = self.policy.decode(completion)
        each = [problem for problem in problems for _ in range(self.group_size)]
        verdicts = judge_all(each, texts, must_work=self.rollouts == 0)
        rewards = torch.tensor([v["reward"] for v in verdicts], device=completion.device).view(-1, self.group_size)
        advantages = self.advantage(rewards).flatten()
        rows, counted = self.rows_with_gradient(advantages)
        batch = prompts.of(rows), completion[rows]
        keys = fold_in(keys[rows], MASK)
        draws = self.updates if self.fresh_masks else 1
        masks = [self.likelihood.draw(fold_in(keys, u), self.decoding.length) for u in range(draws)]
        old = [None] + [self.score(self.policy, *batch, m) for m in masks[1:]]
        ref = [self.score(self.reference, *batch, m) for m in masks] if self.beta else [None] * draws
        return Rollout(*batch, masks, old, ref, advantages[rows], counted, rewards, completion, texts, verdicts)

    def rows_with_gradient(self, advantages: Tensor) -> tuple[Tensor, int]:
        """Indices of the completions to train on, and how many of them have a gradient: these come first.

        Every process keeps as many as the one that has most, so that collectives match; the surplus has advantage 0.
        """
        needed = torch.ones_like(advantages, dtype=torch.bool)
        if self.skip_equal_groups and not self.beta:
            needed = advantages != 0
        most = int(self.trainer.strategy.reduce(needed.sum(), reduce_op="max"))
        return needed.int().argsort(descending=True, stable=True)[:most], int(needed.sum())

    @torch.no_grad()
    def score(self, policy, prompts: Prompts, completion: Tensor, masks: Masks) -> Tensor:
        """Terms [M, B, L] without gradient, in the same micro-batches as the updates."""
        terms = self.likelihood.terms
        pieces = [terms(policy, prompts.of(r), completion[r], masks.of(r)) for r in self.chunks(len(completion))]
        return torch.cat(pieces, 1) if pieces else torch.zeros_like(masks.weight)

    def chunks(self, n: int) -> list[slice]:
        """The micro-batches of ``n`` completions."""
        size = self.micro_batch or max(n, 1)
        return [slice(start, start + size) for start in range(0, n, size)]

    def update(self, rollout: Rollout, u: int) -> dict[str, Share]:
        """One optimizer step on the whole rollout, in micro-batches; this process's share of its metrics.

        A NaN or infinite gradient is never applied: the step only counts, the offending completions are
        named and the rollout is saved for inspection.

        Raises:
            FloatingPointError: more than ``max_skipped`` such updates in a row.
        """
        optimizer, view = self.optimizers(), u if self.fresh_masks else 0
        optimizer.zero_grad()
        chunks = self.chunks(len(rollout.completion))
        pieces = [self.accumulate(rollout, view, rows, last=rows is chunks[-1]) for rows in chunks]
        if rollout.old[view] is None:
            rollout.old[view] = (
                torch.cat([piece.terms for piece in pieces], 1) if pieces else rollout.masks[view].weight
            )
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = clip_grad_norm(self.policy, self.trainer.strategy, max_norm)
        finite = bool(torch.isfinite(norm))  # the same on every process, as the norm is
        if not finite:
            optimizer.zero_grad()  # without gradients the step below only counts
            self.report_nonfinite(rollout, pieces)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        self.lr_schedulers().step()
        metrics = {"grad_norm": (float(norm), 1), "lr": (learning_rate, 1), "skipped_updates": (float(not finite), 1)}
        return {**dict.fromkeys(UPDATE_METRICS, (0.0, 0)), **metrics, **self.loss_metrics(pieces, rollout.counted)}

    def loss_metrics(self, pieces: list["MicroBatch"], counted: int) -> dict[str, Share]:
        """Of an update, over the first ``counted`` completions; nothing if all groups of all processes were skipped."""
        if not pieces:
            return {}
        s = losses.LossStatistics(
            *(torch.cat(parts)[:counted] for parts in zip(*(piece.statistics for piece in pieces)))
        )
        terms = torch.cat([piece.terms for piece in pieces], 1)[:, :counted]
        named = {"clip_low": s.clip_low, "clip_high": s.clip_high, "kl": s.kl, "score_per_token": terms}
        return {
            "loss": (float(torch.stack([piece.loss for piece in pieces]).sum()), 1),
            "log_ratio": share(s.log_ratio),
            "log_ratio_max": (float(s.log_ratio.abs().max()) if counted else 0.0, 1),
            **{name: share(values) for name, values in named.items()},
        }

    def accumulate(self, rollout: Rollout, view: int, rows: slice, last: bool) -> "MicroBatch":
        """Add the gradient of some completions. ``last``: gradients are to be synchronised over processes now."""
        batch = rollout.prompts.of(rows), rollout.completion[rows]
        masks, old, ref = rollout.masks[view].of(rows), rollout.old[view], rollout.ref[view]
        with torch.set_grad_enabled(not self.view_by_view):
            terms = self.likelihood.terms(self.policy, *batch, masks)
        leaf = terms.requires_grad_() if self.view_by_view else terms
        loss, statistics = losses.espo_loss(
            leaf,
            terms.detach() if old is None else old[:, rows],
            None if ref is None else ref[:, rows],
            rollout.advantages[rows],
            clip_range=self.clip_range,
            beta=self.beta,
            ratio=self.ratio,
            kl=self.kl,
        )
        loss = loss * len(batch[1]) / rollout.rewards.numel()  # so that micro-batches add up to the mean over all
        parts, n = [loss], 1
        if self.view_by_view:
            # the loss depends on the policy through its terms only: backpropagate d loss / d terms one view at a time
            (coefficient,) = torch.autograd.grad(loss, leaf)
            views = masks.single_views()
            per_draw, n = len(views) // len(coefficient), len(views)
            parts = (
                (coefficient[i // per_draw] * self.likelihood.terms(self.policy, *batch, single)).sum()
                for i, single in enumerate(views)
            )
        for i, part in enumerate(parts):
            with nullcontext() if last and i == n - 1 else unreduced(self.policy, self.trainer.strategy):
                self.manual_backward(part)
        return MicroBatch(terms.detach(), loss.detach(), statistics)

    def report_nonfinite(self, rollout: Rollout, pieces: list["MicroBatch"]) -> None:
        """Name the completions whose score or loss is not finite, save the rollout, and give up after too many."""
        terms = torch.cat([piece.terms for piece in pieces], 1)
        bad = (~terms.sum((0, 2)).isfinite()).nonzero().squeeze(-1).tolist()
        name = f"nonfinite_rollout_{self.rollouts}_rank{self.global_rank}.pt"
        path = Path(self.trainer.strategy.broadcast(str(self.trainer.default_root_dir))) / name
        tensors = {"prompt": rollout.prompts.ids, "completion": rollout.completion, "advantages": rollout.advantages}
        torch.save(tensors, path)
        bad = ", ".join(f"{rows} of rank {rank}" for rank, rows in enumerate(gather(bad)) if rows)
        advice = "lower the learning rate or max_grad_norm, raise beta, or use float32"
        rank_zero_warn(
            f"rollout {self.rollouts}: the gradient is NaN or infinite (completions with a non-finite score: "
            f"{bad or 'none'}); the update is skipped and the rollout of every process saved like {path}"
        )
        if self.skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self.skipped_in_a_row + 1} updates in a row had a NaN or infinite gradient: {advice}; "
                "the last checkpoint is intact"
            )

    # ---- metrics, validation, optimizer, checkpoints -------------------------------------------------

    def log_step(self, rollout: Rollout, updates: list[dict[str, Share]], seconds: dict[str, float]) -> None:
        """One row of metrics per rollout, of all processes; the README's dictionary explains each."""
        rewards, lengths = rollout.rewards, self.policy.lengths(rollout.decoded)
        left = {}
        if not self.policy.causal:
            left = {"rollout/mask_tokens": (float((rollout.decoded == self.policy.mask_id).sum()), 1)}
        shares = {
            "train/reward": share(rewards),
            "train/reward_std": share(rewards.std(-1)),
            "train/zero_variance_groups": share((rewards == rewards[:, :1]).all(-1)),
            "rollout/length": share(lengths),
            "rollout/eos_rate": share(lengths < self.decoding.length),
            **left,
            **{f"time/{phase}": (s, 1) for phase, s in seconds.items()},
        }
        for key in updates[0].keys() - {"log_ratio_max"}:
            shares[f"train/{key}"] = tuple(map(sum, zip(*(metrics[key] for metrics in updates))))
        largest = [value for value, count in (metrics["log_ratio_max"] for metrics in updates) if count]
        everyone = gather((shares, largest, rollout.verdicts))
        means = pool([shares for shares, _, _ in everyone])
        largest = [value for _, part, _ in everyone for value in part]
        means["train/log_ratio_max"] = float(torch.tensor(largest).max()) if largest else math.nan  # NaN wins
        verdicts = [v for _, _, part in everyone for v in part]
        for key in sorted({key for v in verdicts for key in v} - {"reward"}):
            means[f"reward/{key}"] = sum(v.get(key, 0.0) for v in verdicts) / len(verdicts)
        tokens = len(verdicts) * self.decoding.length
        means["speed/rollout_tokens_per_s"] = tokens / means["time/rollout"]
        means["speed/update_tokens_per_s"] = tokens * self.updates / (means["time/score"] + means["time/update"])
        means |= {"rollout": float(self.rollouts), "update": float(self.rollouts * self.updates)}
        self.log_dict(means, batch_size=1)
        self.log_dict({"reward": means["train/reward"], "updates": means["update"]}, prog_bar=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        self.verdicts = []

    def validation_step(self, problems: list[Problem], batch_idx: int) -> None:
        """Greedy completions of held-out problems."""
        prompts = self.policy.encode([p.prompt for p in problems], self.max_prompt_length)
        keys = fold_in(EVALUATE, torch.zeros(len(problems), dtype=torch.int64, device=prompts.ids.device))
        texts = self.policy.decode(self.generate(prompts, keys, self.decoding.greedy))
        clusters = [cluster_of(problem.prompt, problem.cluster) for problem in problems]
        self.verdicts += zip(judge_all(problems, texts), clusters)

    def on_validation_epoch_end(self) -> None:
        pairs = [pair for part in gather(self.verdicts) for pair in part]
        self.summary = summarise([verdict for verdict, _ in pairs], [cluster for _, cluster in pairs])
        metrics = {f"val/{key}": self.summary[key] for key in self.summary["ci95"]}
        self.log_dict({**metrics, "rollout": float(self.rollouts)}, sync_dist=True)  # they are equal already

    def configure_optimizers(self):
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / max(1, self.warmup)))
        return [optimizer], [schedule]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Randomness is keyed, so two counters are all that resume needs beside Lightning's own state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"rollouts": self.rollouts, "skipped_in_a_row": self.skipped_in_a_row}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts, self.skipped_in_a_row = checkpoint["rollouts"], checkpoint["skipped_in_a_row"]


class MicroBatch(NamedTuple):
    """What one micro-batch of b completions left: terms [M, b, L], its share of the loss, statistics."""

    terms: Tensor
    loss: Tensor
    statistics: losses.LossStatistics
