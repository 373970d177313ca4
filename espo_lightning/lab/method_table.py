"""``python -m espo_lightning.lab.method_table FOLDER``: the page that compares all presets of a folder, as Markdown.

Everything in it comes from the presets themselves: their settings, and the comments at their head.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops import decoding_passes, plain_trace, work
from espo_lightning.lab.methods import Method, read_method
from espo_lightning.objectives.balance import Balance
from espo_lightning.objectives.objective import Objective
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.scoring.likelihood import Seen

SAMPLES = 4096  # completions whose masks are drawn, to average how many views show nothing hidden
COLUMNS = ("method", "masks", "score or ratio", "objective", "counts", "advantage", "KL", "decoding", "μ")
COLUMNS += ("forwards", "paper")
PHASES = ("rollout", "old", "reference", "updates")

PAGE = """# Methods

One page for every preset in [`experiments/methods`](../experiments/methods), generated from them by
`python -m espo_lightning.lab.method_table experiments/methods > docs/methods.md`; a test compares. A method is a mask
law (which states of a completion are scored), an advantage, and an objective; everything else is shared. Their losses
and gradients equal the official code's to 1e-12 (`tests/test_methods.py`, `tests/test_trace_methods.py`), up to the
constant factors and the departures that each preset names; EBPO, RSPO and TraFL have no official code, but a formula.

{table}

Names are those of functions and classes of `espo_lightning`; `total` is a likelihood's own score. "counts" says how
much a completion weighs in the mean. Arguments that have their default are not shown. "forwards" are those of a
completion and rollout, a backward pass counted as two, split up below. What is official, and what differs here, stands
in the section of each method. The causal controls, GRPO and GSPO with exact likelihoods, are
`experiments/sudoku_grpo.yaml` and `sudoku_gspo.yaml`.

## What a rollout costs

Forward passes per completion and rollout on the default canvas of 16 tokens, decoded in 16 steps, from the cost model,
which `tests/test_cost.py` holds against counted passes. An update runs its forwards with gradient; a backward pass
costs about two more. EBPO's are of a block where it decodes, and of the noisy copy of the canvas where it scores; its
passes over clean tokens, one a block and one a scoring, are not among them.

{forwards}

## Sources, official settings, departures

{sections}"""


def name_of(value: Any) -> str:
    """A function or class by its name, a frozen dataclass with the arguments that are not its defaults."""
    if not hasattr(value, "__dataclass_fields__"):
        return (
            value.__name__ if isinstance(value, Callable) else f"{value:g}" if isinstance(value, float) else f"{value}"
        )
    changed = [(f.name, getattr(value, f.name)) for f in fields(value) if differs(f, getattr(value, f.name))]
    inner = ", ".join(f"{name} {name_of(argument)}" for name, argument in changed)
    return type(value).__name__ + (f" ({inner})" if inner else "")


def differs(field: Any, value: Any) -> bool:
    """Whether an argument of a dataclass is not its default."""
    return field.default is MISSING or value != field.default


def decoding_of(decoding: Any) -> str:
    """What a preset changes of the default decoding."""
    plain = Decoding()
    changed = [f.name for f in fields(plain) if getattr(decoding, f.name) != getattr(plain, f.name)]
    kind = [] if type(decoding) is Decoding else [type(decoding).__name__]
    return ", ".join([*kind, *(f"{name} {name_of(getattr(decoding, name))}" for name in changed)]) or "default"


def score_and_kl(objective: Objective) -> tuple[str, str]:
    """What is compared or weighed, and the penalty."""
    if isinstance(objective, Balance):
        clip = f", ε {objective.clip_range:g}" if objective.clip_range < math.inf else ""
        to = "old policy" if objective.to_old else "reference"
        penalty = f", {name_of(objective.kl)}, β {objective.beta:g}" if objective.beta else ""
        square = f"{name_of(objective.square)} of the log-ratio to the {to}, κ {objective.temperature:g}{clip}"
        return square, ("none" if objective.to_old else "implicit, κ") if not penalty else penalty[2:]
    score, kl = name_of(getattr(objective, "score", None) or getattr(objective, "ratio", None)), "none"
    if isinstance(objective, PolicyGradient):
        score += f", ε {objective.clip_range:g}" if objective.clip_range < math.inf else ""
        score += f" and {objective.clip_high:g}" if objective.clip_high is not None else ""
        if objective.beta:
            to = " to the old policy" if objective.to_old else ""
            kl = f"{name_of(objective.kl)}, {name_of(objective.kl_at)}, β {objective.beta:g}{to}"
    return score, kl


def row(name: str, method: Method, path: Path) -> list[str]:
    """One line of the table of settings."""
    objective = method.objective
    score, kl = score_and_kl(objective)
    kind = type(objective).__name__ + (f", cap {objective.cap:g}" if hasattr(objective, "cap") else "")
    cells = [kind, name_of(objective.count), name_of(method.advantage), kl, decoding_of(method.decoding)]
    paper = re.search(r"arXiv:(\d+\.\d+)", " ".join(header(path)[2])).group(1)
    about = [str(method.updates), f"{total(forwards(method)):.0f}", f"[{paper}](https://arxiv.org/abs/{paper})"]
    return [f"[{name}](#{name.lower()})", name_of(method.likelihood), score, *cells, *about]


def forwards(method: Method, completions: int = SAMPLES) -> dict[str, float]:
    """Forward passes per completion in every phase of a rollout, of completions that fill the canvas."""
    length = method.decoding.length
    random = method.fresh_masks and method.likelihood.random
    keys = torch.arange(completions)
    trace = plain_trace(method.decoding, completions) if method.likelihood.traced else None
    seen = Seen.whole(keys, length)._replace(updates=method.updates, trace=trace)
    masks = [
        method.likelihood.masks(fold_in(keys, u), seen._replace(update=u))
        for u in range(method.updates if random else 1)
    ]
    rollout = decoding_passes(method.decoding, completions, length)
    options = {"updates": method.updates, "objective": method.objective, "view_by_view": False}
    spent = work(rollout, masks, micro_batch=completions, **options)
    return {phase: getattr(spent, phase).rows / completions for phase in PHASES}


def total(cost: dict[str, float]) -> float:
    """Forward passes in all phases, a backward pass counted as two."""
    return sum(cost.values()) + 2 * cost["updates"]


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def header(path: Path) -> tuple[str, str, list[str]]:
    """Name, sentence and other lines of the comment at the head of a preset, without its command."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    name, _, sentence = lines[0].partition(": ")
    return name, sentence, [line for line in lines[1:] if not line.startswith("python -m")]


def section(path: Path) -> str:
    """Source, official settings and departures of a preset, as its head says them."""
    name, sentence, lines = header(path)
    text = " ".join(lines)
    for mark in ("Official", "Departs", "Kept although odd"):
        text = re.sub(rf"\s*\b{mark}", f"\n\n**{mark}**", text, count=1)
    text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"(?<![(\w])(https://github\.com/[\w./-]+)", r"<\1>", text)
    return f"### {name}\n\n{sentence[0].upper()}{sentence[1:]}\n\n`experiments/methods/{path.name}`. {text.strip()}\n"


def page(folder: Path) -> str:
    """docs/methods.md of the presets in a folder."""
    paths = sorted(folder.glob("*.yaml"))
    methods = {path: read_method(path) for path in paths}
    costs = {header(path)[0]: forwards(method) for path, method in methods.items()}
    rows = [[name, *(f"{n:.3g}" for n in cost.values()), f"{total(cost):.0f}"] for name, cost in costs.items()]
    return PAGE.format(
        table=table(COLUMNS, [row(header(path)[0], method, path) for path, method in methods.items()]),
        forwards=table(("method", "decoding", "old", "reference", "updates", "with backward passes"), rows),
        sections="\n".join(section(path) for path in paths),
    )


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
