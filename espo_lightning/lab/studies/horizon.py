"""Notebook 11: the same policies and the same task on canvases of 16 to 128 tokens.

The task is `Chain`, whose answers are as long as one likes and whose steps are no harder for it. A base is a small
transformer with full attention that was taught on all canvases in turn, so that they differ in length alone.
"""

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.gradients import cosine
from espo_lightning.lab.studies.kl import KLS
from espo_lightning.lab.studies.ratios import RATIOS, Recorded, surrogate
from espo_lightning.lab.studies.states import new_module, teach, train, train_or_diverge
from espo_lightning.objectives.objective import Scores, Statistics
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.policy import Policy
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood, MeanField, Seen
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score
from espo_lightning.tasks.chain import Chain
from espo_lightning.training.module import ESPOModule, Rollout

BLOCK = 8  # the decoder fills the canvas in blocks of so many tokens, two tokens a step
GROUP = 8  # completions of a prompt, the default
LIKELIHOODS: dict[str, Likelihood] = {
    "ELBO": ELBO(),  # one coupled pair
    "uncoupled": ELBO(draws=2, coupled=False),  # as many forwards
    "M = 2": ELBO(draws=2),
    "mean field": MeanField(),
}


def chains(length: int) -> Chain:
    """The task whose answers fill a canvas; its reward is the share of all demands that are met."""
    return Chain(steps=length // 2, reward="step")


def decoder(length: int) -> Decoding:
    return Decoding(length=length, block_length=BLOCK, steps=length // 2)


# ---- the bases -------------------------------------------------------------------------------------------


def base(seed: int, *, canvases: list[int], lessons: int, tokens: int, rounds: int, lr: float) -> dict:
    """A policy taught from scratch, on one canvas after the other, several rounds long.

    Args:
        canvases: lengths.
        lessons: batches on every canvas in a round.
        tokens: of answers in a batch.
        rounds: how often.
        lr: learning rate.

    Returns:
        "weights": see `as_text`.
    """
    policy = untaught()
    for turn in range(rounds):
        for length in canvases:
            teach(policy, chains(length), fold(seed, turn), lessons, lr, tokens // length, length)
    return {"weights": as_text(policy)}


def untaught() -> Policy:
    return new_policy(hidden_size=64, layers=3, heads=4, intermediate_size=128)


def fold(seed: int, turn: int) -> int:
    """Another seed for every round of lessons."""
    return 1000 * turn + seed


def as_text(policy: Policy) -> str:
    """All weights, so that a stored result can hold them."""
    return base64.b85encode(parameters_to_vector(policy.parameters()).detach().numpy().tobytes()).decode()


def from_text(weights: str) -> Policy:
    """The policy of `base`."""
    policy = untaught()
    values = np.frombuffer(base64.b85decode(weights), dtype=np.float32)
    vector_to_parameters(torch.from_numpy(values.copy()), policy.parameters())
    return policy


# ---- the noise of the ratios -----------------------------------------------------------------------------


def expected_square(length: int, likelihood: Likelihood, draws: int = 4096) -> float:
    """E[w^2] of a term's weight, 0 where it is not scored: what a mask law does to independent changes of size 1."""
    weight = likelihood.draw(fold_in(0, torch.arange(draws)), length).weight
    return float(weight.double().square().mean())


def noise(
    seed: int, *, bases: dict[int, str], lengths: list[int], updates: list[int], lr: float, prompts: int, scatter: int
) -> dict:
    """How far token and sequence log-ratios spread, and how their gradients scatter, while one rollout is reused.

    The rollout is of a base, and its updates are ESPO's without clip.

    Args:
        bases: seed -> weights of `base`.
        lengths: of the canvas.
        updates: after which to measure, with masks that no update saw; one more than the largest are made.
        lr: learning rate.
        prompts: of the rollout, 8 completions each.
        scatter: completions whose gradients are taken one by one, under the ELBO.

    Returns:
        "rows": for every canvas, number of updates and likelihood of `LIKELIHOODS` the root mean squares of the
        "change" of a scored token's log-probability, of the "token" and the "sequence" log-ratio; the "largest" token
        log-ratio; of the ELBO also `scattered`.
    """
    rows = []
    for length in lengths:
        objective = PolicyGradient(clip_range=math.inf, beta=0.0)
        settings = {"decoding": decoder(length), "objective": objective, "updates": max(updates)}
        module = new_module(from_text(bases[seed]), seed, Recorded, lr=lr, **settings)
        train(module, chains(length), seed, 1, batch=prompts)
        rollout, old = module.last_rollout, module.iterates[0]
        for count in updates:
            policy = module.iterates[count]
            for name, likelihood in LIKELIHOODS.items():
                masks = likelihood.draw(fold_in(fold_in(seed, 77), torch.arange(len(rollout.completion))), length)
                row = log_ratios(rollout, masks, old, policy)
                if name == "ELBO":
                    row |= scattered(rollout, masks, old, policy, scatter)
                rows.append({"length": length, "updates": count, "likelihood": name, **row})
    return {"rows": rows}


@torch.no_grad()
def log_ratios(rollout: Rollout, masks: Masks, old: Policy, new: Policy) -> dict[str, float]:
    """See `noise`."""
    before, now = (score(p, rollout.prompts, rollout.completion, masks) for p in (old, new))
    change = now - before  # [M, B, L]
    token, sequence = change.mean(0), change.mean((0, 2))
    plain = (change / masks.weight.clamp(min=1e-9))[masks.scored]
    squares = {"change": plain, "token": token, "sequence": sequence}
    return {
        **{key: float(values.square().mean().sqrt()) for key, values in squares.items()},
        "largest": float(token.abs().max()),
    }


def scattered(rollout: Rollout, masks: Masks, old: Policy, new: Policy, count: int) -> dict[str, float]:
    """Of the gradients of single completions at each level, without a clip: the "_noise", their total variance over the
    squared norm of their mean, and the "_largest" one's share of all norms; the "cosine" of the two levels' means."""
    with torch.no_grad():
        before = score(old, rollout.prompts, rollout.completion, masks)
    rows = rollout.advantages.nonzero().squeeze(1)[:count].tolist()
    result, means = {}, []
    for level, ratio in RATIOS.items():
        gradients = []
        for row in rows:
            one = slice(row, row + 1)
            terms = score(new, rollout.prompts.of(one), rollout.completion[one], masks.of(one))
            loss = surrogate(before[:, one], rollout.advantages[one], ratio, math.inf, terms)
            gradients.append(parameters_to_vector(torch.autograd.grad(loss, list(new.parameters()))))
        stacked = torch.stack(gradients).double()
        mean, norms = stacked.mean(0), stacked.norm(dim=1)
        means.append(mean)
        variance = float(stacked.var(0).sum())
        signal = max(float(mean.square().sum()) - variance / len(rows), 0.0)  # without the mean's own noise
        result |= {f"{level}_variance": variance, f"{level}_signal": signal}
        result[f"{level}_largest"] = float(norms.max() / norms.sum())
    return result | {"cosine": cosine(*means)}


# ---- training --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(PolicyGradient):
    """Also says of every completion how many of its terms make its gradient.

    "tokens": (sum of |g|)^2 / (sum of g^2) over the derivatives g of its loss in the log-probabilities, in the unit of
    scored terms: all of them if they count alike, 1 if one drowns the others, 0 if all are clipped. "token_square",
    "sequence_square": squared log-ratios at both levels, whichever is trained with.
    """

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        losses, statistics = super().__call__(scores, advantages, group)
        (slope,) = torch.autograd.grad(losses.sum(), scores.new, retain_graph=True)
        size = slope.abs().sum((0, 2)).square()
        with torch.no_grad():
            change = scores.delta(scores.old)
            statistics |= {
                "tokens": size / slope.square().sum((0, 2)).clamp(min=1e-30) / len(slope),
                "token_square": change.mean(0).square().mean(-1),
                "sequence_square": change.mean((0, 2)).square(),
            }
        return losses, statistics


WATCHED = ("reward", "grad_norm", "tokens", "token_square", "sequence_square", "log_ratio_max", "clip_low", "clip_high")


def passes(length: int, *, likelihood: str, updates: int, beta: float = 0.0, **_) -> int:
    """What a rollout and its updates cost, in forward passes of a whole canvas per completion; a backward pass is two.

    All of them see the same canvas, so that FLOPs are in proportion. MeanField scores its old values but once.
    """
    law = LIKELIHOODS[likelihood]
    views = len(law.draw(torch.zeros(1, dtype=torch.int64), length).rows()[0])
    scores = (updates - 1 if law.random else 0) + (beta > 0) * (updates if law.random else 1)
    return decoder(length).passes + views * (3 * updates + scores)


def module_of(arm: dict, policy: Policy, length: int, seed: int) -> ESPOModule:
    """The module of an arm: "ratio" of `RATIOS`, "likelihood" of `LIKELIHOODS`, "updates", "lr", "clip_range" (None: no
    clip), and perhaps "kl" of `KLS` and "beta"."""
    clip = math.inf if arm["clip_range"] is None else arm["clip_range"]
    kl, beta = KLS[arm.get("kl", "k2")], arm.get("beta", 0.0)
    return new_module(
        policy,
        seed,
        lr=arm["lr"],
        decoding=decoder(length),
        likelihood=LIKELIHOODS[arm["likelihood"]],
        objective=Watched(ratio=RATIOS[arm["ratio"]], clip_range=clip, kl=kl, beta=beta),
        updates=arm["updates"],
    )


def trained(
    seed: int, *, bases: dict[int, str], length: int, arm: dict, rollouts: int, prompts: int, tokens: int
) -> dict:
    """RL of a base on one canvas.

    Args:
        bases: seed -> weights of `base`.
        length: of the canvas.
        arm: see `module_of`.
        rollouts: so many, of ``prompts`` problems with 8 completions each.
        tokens: of the answers that measure the policy, before and after; about unseen pairs of digits.

    Returns:
        "before", "after": `measured`; after a run that "diverged" it is of nothing, 0. "watched": what `WATCHED` names,
        for every rollout.
    """
    policy = from_text(bases[seed])
    before = measured(policy, length, tokens)
    module = module_of(arm, policy, length, seed)
    snapshots, diverged = train_or_diverge(module, chains(length), seed, rollouts, {rollouts}, prompts)
    after = dict.fromkeys(before, 0.0) if diverged else measured(snapshots.policies[rollouts], length, tokens)
    watched = {key: [round_to(row.get(f"train/{key}", math.nan)) for row in snapshots.metrics] for key in WATCHED}
    return {"before": before, "after": after, "diverged": diverged, "watched": watched}


def measured(policy: Policy, length: int, tokens: int) -> dict[str, float]:
    """Means over sampled answers to problems of the test split, ``tokens`` of them in all."""
    count = max(1, tokens // length)
    problems = [chains(length).problem("test", 0, i) for i in range(count)]
    verdicts = []
    for part in range(0, count, 64):
        some = problems[part : part + 64]
        verdicts += solve(policy, some, fold_in(1, torch.arange(part, part + len(some))), decoder(length))[1]
    return {key: round(sum(v[key] for v in verdicts) / count, 4) for key in ("reward", "step", "target", "exact")}


def round_to(value: float, digits: int = 4) -> float | None:
    """To so many significant digits; None for what is not finite, since a stored result has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
