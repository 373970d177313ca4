"""Rows of a data set: from local JSONL or the hub, in an order that depends on (seed, index) only."""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType

from espo_lightning.tasks.base import Problem, Task, Verdict, rng

Row = Mapping[str, object]


@dataclass(frozen=True)
class RowTask(Task):
    """Base of the tasks that read a published data set.

    path: JSONL of the hub's schema, ``.gz`` too; "{split}" in it becomes "train" or "test". Without "{split}" the last
        ``held_out`` share of the rows is "test" and the rest "train". None: the hub's own splits (needs `datasets`).
    """

    path: str | None = None
    held_out: float = 0.1
    _rows: dict[str, list[Row]] = field(default_factory=dict, init=False, repr=False, compare=False)

    # (hub id, configuration, split) per split; subclasses set it. No annotation, so that it is no constructor argument.
    HUB = MappingProxyType({})
    COLUMNS = ()  # what to keep of the hub's columns; empty: all
    NEEDED = ()  # columns that every row must have

    def __post_init__(self):
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"held_out is a share of the rows between 0 and 1, got {self.held_out}")

    def rows(self, split: str) -> list[Row]:
        """All rows of a split, in file order, loaded once. Raises ValueError if there are none."""
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        if split not in self._rows:
            self._rows[split] = self._load(split)
        if not self._rows[split]:
            raise ValueError(
                f"{type(self).__name__} has no {split!r} rows (path={self.path}, held_out={self.held_out})"
            )
        return self._rows[split]

    def size(self, split: str) -> int:
        return len(self.rows(split))

    def row(self, split: str, seed: int, index: int) -> Row:
        """Row ``index`` of an endless stream: every epoch is a new permutation, each row once per epoch."""
        rows = self.rows(split)
        epoch, position = divmod(index, len(rows))
        return rows[_permutation(type(self).__name__, split, seed, epoch, len(rows))[position]]

    def _load(self, split: str) -> list[Row]:
        if self.path is None:
            return self._from_hub(split)
        path = self.path.replace("{split}", split)
        read = gzip.open if path.endswith(".gz") else open
        try:
            with read(path, "rt", encoding="utf-8") as file:
                rows = [self._row(path, n, line) for n, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            cause = error.strerror or error
            raise ValueError(f"path {path} of {type(self).__name__} cannot be read: {cause}") from error
        if "{split}" in self.path:
            return rows
        cut = len(rows) - round(len(rows) * self.held_out)
        return rows[:cut] if split == "train" else rows[cut:]

    def _from_hub(self, split: str) -> list[Row]:
        if split not in self.HUB:
            return []
        from datasets import load_dataset  # slow to import, and only needed here

        name, configuration, hub_split = self.HUB[split]
        try:
            rows = load_dataset(name, configuration, split=hub_split)
        except OSError as error:
            columns = f" with the columns {', '.join(self.NEEDED)}" if self.NEEDED else ""
            raise ValueError(f"{error}. Set path of {type(self).__name__} to a JSONL file{columns} instead") from error
        return list(rows.select_columns(list(self.COLUMNS)) if self.COLUMNS else rows)

    def _row(self, path: str, number: int, line: str) -> Row:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is a {type(row).__name__}, not an object with named columns")
        if missing := [name for name in self.NEEDED if name not in row]:
            task, has = type(self).__name__, ", ".join(map(repr, row))
            raise ValueError(f"{path}, line {number}, has no {missing[0]!r}, which {task} needs, only {has}")
        return row


@dataclass(frozen=True, kw_only=True)
class Rows(RowTask):
    """Your own prompts, judged by your own function.

    Args:
        path: JSONL; a row's "prompt" is a text or a list of chat messages; its "answer", if there is one, a
            demonstration for supervised training. See `RowTask` for ``path`` and ``held_out``.
        verifier: (row, completion text) -> verdict; in YAML by its import path.
    """

    verifier: Callable[[Row, str], Verdict]
    NEEDED = ("prompt",)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        row = self.row(split, seed, index)
        return Problem(row["prompt"], partial(self.verifier, row), str(row.get("answer", "")))


@lru_cache(maxsize=8)
def _permutation(*key: int | str) -> list[int]:
    order = list(range(key[-1]))
    rng(*key).shuffle(order)
    return order
