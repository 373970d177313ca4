"""Rewards made of several verifiers: a weighted sum in which every part is logged under its own key.

A verifier is any ``text -> Verdict``. In Python::

    verify = partial(weighted, parts={"correct": (1.0, check), "tags": (0.2, has_tags), "short": (0.1, brevity)})

`Weighted` does the same to every problem of a task, with the parts named in YAML by import path.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

from espo_lightning.tasks.base import Problem, Task, Verdict
from espo_lightning.tasks.verifiers import Failed, check_signature, checked

Verifier = Callable[[str], Verdict]


def weighted(text: str, parts: Mapping[str, tuple[float, Verifier]]) -> Verdict:
    """reward: the sum of weight times reward over ``parts``. ``name/key``: every key of every part, unweighted.

    failed, timeout: 1 if any part failed or ran out of time. A part that raises, or whose verdict is no dictionary of
    finite numbers with a reward, scores 0 with ``name/failed`` 1; the other parts still count. ``exact`` is that of the
    first part that has one, so that evaluations stay comparable.
    """
    total: Verdict = {"reward": 0.0, "failed": 0.0, "timeout": 0.0}
    causes: dict[str, str] = {}
    for name, (weight, verifier) in parts.items():
        verdict, _ = checked(verifier, text)
        causes |= verdict.causes if isinstance(verdict, Failed) else {}
        total["reward"] += weight * verdict["reward"]
        for key in ("failed", "timeout"):
            total[key] = max(total[key], verdict.get(key, 0.0))
        if "exact" in verdict:
            total.setdefault("exact", verdict["exact"])
        total |= {f"{name}/{key}": value for key, value in verdict.items()}
    return Failed(total, causes) if causes else total


def check_weights(weight: float, extra: Mapping[str, float]) -> None:
    """Raises ValueError that names the first weight that is no finite number. extra: import path -> weight."""
    for name, value in {"weight": weight, **{f"extra.{path}": share for path, share in extra.items()}}.items():
        if not math.isfinite(value):
            raise ValueError(f"weights are finite numbers, got {name}={value}")


def tags(text: str) -> Verdict:
    """Format: 1 if the text is ``<reasoning>...</reasoning><answer>...</answer>``, each tag once and in this order."""
    names = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    places = [text.find(name) for name in names]
    ordered = places[0] >= 0 and places == sorted(places) and all(text.count(name) == 1 for name in names)
    return {"reward": float(ordered)}


def brevity(text: str, free: int = 0, limit: int = 1000) -> Verdict:
    """Length penalty: 0 up to ``free`` characters, then linearly down to -1 at ``limit``. Raises ValueError."""
    if not 0 <= free < limit:
        raise ValueError(f"brevity needs 0 <= free < limit, got free={free}, limit={limit}")
    return {"reward": -min(1.0, max(0, len(text) - free) / (limit - free))}


def imported(path: str) -> Callable:
    """The function at an import path like ``package.module.function``. Raises ValueError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} is no import path of a verifier (package.module.function): {error}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a function text -> verdict")
    return found


def load(path: str) -> Verifier:
    """The function of a text at an import path. Raises ValueError if there is none, or it takes something else."""
    found = imported(path)
    check_signature(found, "text")
    return found


def _name(path: str) -> str:
    return path.rpartition(".")[2]


@dataclass(frozen=True)
class Weighted(Task):
    """A task with extra rewards.

    Args:
        task: draws the problems.
        weight: of its own verifier, logged as ``task/...``.
        extra: import path -> weight; each is logged under the function's name.

    Raises:
        ValueError: a path that leads to no function of a text; two rewards of one name; a weight that is no number.
    """

    task: Task
    weight: float = 1.0
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        names = ["task", *map(_name, self.extra)]
        if len(set(names)) < len(names):
            raise ValueError(f"two rewards share a name: {names}")
        check_weights(self.weight, self.extra)
        for path in self.extra:
            load(path)

    @property
    def DEMONSTRATION(self) -> str:
        return self.task.DEMONSTRATION

    def size(self, split: str) -> int | None:
        return self.task.size(split)

    def check_host(self) -> None:
        self.task.check_host()

    def inspect(self, split: str) -> Iterator[tuple[str, Problem | Exception]]:
        return self.task.inspect(split)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        inner = self.task.problem(split, seed, index)
        parts = {"task": (self.weight, inner.verify)}
        parts |= {_name(path): (weight, load(path)) for path, weight in self.extra.items()}
        return inner._replace(verify=partial(weighted, parts=parts))
