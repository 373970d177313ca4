"""Notebook 11: how token and sequence ratios spread on canvases of 16 to 128 tokens.

The task is `Chain`, whose answers are as long as one likes and whose steps are no harder for it. A base is a small
transformer with full attention that was taught on all canvases in turn, so that one policy serves them all.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.gradients import cosine
from espo_lightning.lab.studies.ratios import CLIP_RANGES, RATIOS, Recorded, completion_gradients
from espo_lightning.lab.studies.states import new_module, teach, train, untaught
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import ELBO, Likelihood, MeanField
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score
from espo_lightning.tasks.chain import Chain
from espo_lightning.training.module import Rollout

BLOCK = 8  # the decoder fills the canvas in blocks of so many tokens, two tokens a step
MEASURING = 77  # a purpose of random keys, apart from those of training
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
    """Two tokens a step, block by block."""
    return Decoding(length=length, block_length=BLOCK, steps=length // 2)


def taught(seed: int, canvases: Iterable[int], lessons: int, rounds: int) -> Policy:
    """A policy of 130,000 parameters, taught from scratch on one canvas after the other, several rounds long.

    Args:
        canvases: lengths, every one of which at most 2,048 tokens.
        lessons: batches of 2,048 tokens of answers on every canvas in a round.
    """
    policy = untaught(seed)
    for turn in range(rounds):
        for length in canvases:
            teach(policy, chains(length), 1000 * turn + seed, lessons, 3e-3, 2048 // length, length)
    return policy


def mean_square_weight(likelihood: Likelihood, length: int, samples: int = 4096) -> float:
    """E[w^2] / M of a position's weight w, which is 0 where it is not scored: by how much a mask law multiplies the
    variance of changes that are independent of the masks and of each other."""
    weight = likelihood.draw(fold_in(0, torch.arange(samples)), length).weight.double()
    return float(weight.square().mean()) / len(weight)


def spread(
    seed: int,
    *,
    canvases: list[int],
    lessons: int,
    rounds: int,
    updates: list[int],
    lr: float,
    prompts: int,
    scatter: int,
) -> dict:
    """How far log-ratios spread at both levels, and how gradients scatter, while one rollout is reused on a canvas.

    Every canvas has a rollout of the same base, `taught`, and updates of its own: ESPO's, without a clip.

    Args:
        canvases: their lengths.
        lessons, rounds: of the base.
        updates: after which to measure, ascending; masks are new ones, the same after every number of updates.
        lr: learning rate.
        prompts: of a rollout, 8 completions each.
        scatter: completions whose gradients are taken one by one, of the ELBO.

    Returns:
        "rows": for every canvas ("length"), number of "updates" and "likelihood" of `LIKELIHOODS` what `log_ratios`
        says, the "reward" of the rollout, and of the ELBO what `scattered` says.
    """
    base, rows = taught(seed, canvases, lessons, rounds), []
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for length in canvases:
        base.load_state_dict(weights)
        decoding = decoder(length)
        objective = PolicyGradient(clip_range=math.inf, beta=0.0)
        module = new_module(base, seed, Recorded, lr=lr, decoding=decoding, objective=objective, updates=max(updates))
        train(module, chains(length), seed, 1, batch=prompts)
        rollout, old = module.last_rollout, module.iterates[0]
        keys = fold_in(fold_in(seed, MEASURING), torch.arange(len(rollout.completion)))
        for name, likelihood in LIKELIHOODS.items():
            masks = likelihood.draw(keys, length)
            for count in updates:
                new = module.iterates[count]
                row = {"length": length, "updates": count, "likelihood": name, "reward": float(rollout.rewards.mean())}
                row |= log_ratios(rollout, masks, old, new)
                if name == "ELBO":
                    row |= scattered(rollout, masks, old, new, scatter)
                rows.append(row)
    return {"rows": rows}


@torch.no_grad()
def log_ratios(rollout: Rollout, masks: Masks, old: Policy, new: Policy) -> dict:
    """Of all completions of a rollout on given masks, two policies compared.

    Returns:
        Root mean squares, in nats: "change", of the log-probability of a scored token; "token", of the log-ratios of
        single positions, and "sequence", of whole completions, both as the objective takes them. "largest": of the
        token log-ratios, without sign. "clipped": level -> eps of `CLIP_RANGES` -> share of ratios beyond it.
    """
    before, now = (score(p, rollout.prompts, rollout.completion, masks) for p in (old, new))
    change = now - before  # [M, B, L], times the weights
    levels = {"token": change.mean(0).flatten(), "sequence": change.mean((0, 2))}
    scored = masks.weight != 0
    plain = change[scored] / masks.weight[scored]
    return {
        "change": root_mean_square(plain),
        **{level: root_mean_square(x) for level, x in levels.items()},
        "largest": float(levels["token"].abs().max()),
        "clipped": {
            level: {str(eps): float((x.expm1().abs() > eps).float().mean()) for eps in CLIP_RANGES}
            for level, x in levels.items()
        },
    }


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def scattered(rollout: Rollout, masks: Masks, old: Policy, new: Policy, count: int) -> dict[str, float]:
    """Of the gradients of single completions with an advantage, without a clip, at both levels.

    Returns:
        "token_noise", "sequence_noise": the trace of their variance over the squared norm of the sequence level's mean
        on the spot, so that the two levels have one unit. "token_largest", ...: the largest one's share of all norms.
        "cosine": of the two levels' means.

    Raises:
        ValueError: fewer than two completions have an advantage.
    """
    rows = rollout.advantages.nonzero().squeeze(1)[:count].tolist()
    if len(rows) < 2:
        raise ValueError(
            f"gradients scatter among at least 2 completions with an advantage, got {len(rows)}: give scatter 2 or "
            "more, more prompts, or a base that was taught more lessons"
        )
    with torch.no_grad():
        before = score(old, rollout.prompts, rollout.completion, masks)
    result, means, variances = {}, {}, {}
    for level, ratio in RATIOS.items():
        stacked = completion_gradients(rollout, new, masks, before, rows, ratio).double()
        norms = stacked.norm(dim=1)
        means[level], variances[level] = stacked.mean(0), float(stacked.var(0).sum())
        result[f"{level}_largest"] = float(norms.max() / norms.sum())
    signal = float(means["sequence"].square().sum())
    result |= {f"{level}_noise": variance / signal for level, variance in variances.items()}
    return result | {"cosine": cosine(means["token"], means["sequence"])}
