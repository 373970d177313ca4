"""Recorded losses and gradients of methods on traces."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from espo_lightning import (
    Masks,
    Scores,
    TruncatedRatio,
    ball_kl,
    hamming_ball,
)
from espo_lightning.lab.methods import read_method
from espo_lightning.scoring.trajectory import trace_masks

ROOT = Path(__file__).parents[1]
NAMES = ("rtb", "sepo", "justgrpo", "tracerl", "agrpo", "egspo", "gdsd", "gdsd_tlc", "rspo", "trafl")
GOLDEN = {name: json.loads((ROOT / f"tests/golden/methods/{name}.json").read_text()) for name in NAMES}
CLOSE, NEAR = {"rtol": 1e-12, "atol": 1e-13}, {"rtol": 1e-5, "atol": 1e-5}
PARTS = {"gdsd_tlc": ("gdsd", "--likelihood.weighted=true")}


def preset(name: str):
    file, *changes = PARTS.get(name, (name,))
    return read_method(ROOT / "experiments" / "methods" / f"{file}.yaml", *changes)


def tensor(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def bits(strings) -> torch.Tensor:
    """Strings of 0 and 1, nested in lists: bool [..., characters]."""
    if isinstance(strings, str):
        return torch.tensor([c == "1" for c in strings])
    return torch.stack([bits(s) for s in strings])


def cases(kind: str, *names: str):
    found = [(name, case) for name in names for case in GOLDEN[name][kind]]
    return pytest.mark.parametrize(("name", "case"), found, ids=[f"{n}-{i}" for i, (n, _) in enumerate(found)])


def loss(objective, new, advantages, group=1, old=None, ref=None, weight=None) -> torch.Tensor:
    """The mean loss of completions with log-probabilities [M, B, L]."""
    weight = torch.ones_like(new) if weight is None else weight.to(new.dtype)
    old, ref = (None if x is None else torch.where(weight != 0, x, 0.0) for x in (old, ref))
    length = torch.full((new.shape[1],), new.shape[2])
    losses, _ = objective(Scores(torch.where(weight != 0, new, 0.0), old, ref, weight, length), advantages, group)
    return losses.mean()


def gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, leaf)[0]


def gdsd(name: str, case: dict, length: int):
    """The objective with the numbers of a case, and official / ours."""
    psi, draws = case["psi"], case["M"]
    settings = {"temperature": 1 / (psi * length), "clip_range": case["epsilon"]}
    objective = replace(preset(name).objective, beta=case["beta"] / (2 * draws * psi), **settings)
    return objective, 2 * draws * psi


def one_masked(case: dict, values) -> torch.Tensor:
    """[B, m] of given positions as [M, B, L]."""
    positions, values = tensor(case["positions"], torch.int64), values if torch.is_tensor(values) else tensor(values)
    canvas = torch.zeros(*positions.T.shape, case["L"], dtype=values.dtype)
    return canvas.scatter(-1, positions.T.unsqueeze(-1), values.T.unsqueeze(-1))


def sepo(case: dict):
    objective = replace(preset("sepo").objective, beta=case["kappa"])
    score = objective.ratio.score
    if case["kind"] == "hamming":
        score = hamming_ball
        objective = replace(objective, kl_at=ball_kl)
    return replace(objective, ratio=TruncatedRatio(case["epsilon"], score))


def drawn(case: dict, factor: float) -> Masks:
    """The states that AGRPO drew, with its importance weights."""
    steps, chosen = (tensor(case[key], torch.int64) for key in ("steps", "drawn_steps"))
    masks = trace_masks(steps, chosen.T, tensor(case["importance_weights"]).T * factor)
    weight = torch.where(masks.weight != 0, tensor(case["importance_weights"]).T.unsqueeze(-1) * factor, 0.0)
    return masks._replace(weight=weight)  # in float64
