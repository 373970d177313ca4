"""Rows of a data set: from local files or the hub, in an order that depends on (seed, index) only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType

from espo_lightning.tasks.base import Problem, Task, Verdict, rng
from espo_lightning.tasks.files import Line, Row, check_columns, checked_lines, good, readable
from espo_lightning.tasks.messages import prompt_of
from espo_lightning.tasks.verifiers import check_signature


@dataclass(frozen=True)
class RowTask(Task):
    """Base of the tasks that read a published data set; a subclass says what its columns are and writes `problem_of`.

    path: JSONL of the hub's schema, CSV or Parquet, see `files.read`; "{split}" in it becomes "train" or "test".
        Without "{split}" the last ``held_out`` share of the rows is "test" and the rest "train". None: the hub's own
        splits (needs `datasets`).

    Raises:
        ValueError: ``held_out`` is no share.
    """

    path: str | None = None
    held_out: float = 0.1
    _lines: dict[str, list[Line]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rows: dict[str, list[Row]] = field(default_factory=dict, init=False, repr=False, compare=False)

    # (hub id, configuration, split) per split; subclasses set it. No annotation, so that it is no constructor argument.
    HUB = MappingProxyType({})
    COLUMNS = ()  # what to keep of the hub's columns; empty: all
    NEEDED = ()  # columns that every row must have, as texts; "a|b": one of the two
    LISTS = ()  # of these, those that hold lists of texts

    def __post_init__(self):
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"held_out is a share of the rows between 0 and 1, got {self.held_out}")

    def lines(self, split: str) -> list[Line]:
        """All rows of a split with their places, in file order, loaded and checked once; some may be unusable.

        Raises:
            ValueError: there are none, or none that could be read at all.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        if split not in self._lines:
            self._lines[split] = checked_lines(self._load(split), self.check_row)
        if not self._lines[split]:
            if self.path is not None:  # what is wrong with the rest of the file may be why
                good(checked_lines(self._read(split), self.check_row))
            raise ValueError(
                f"{type(self).__name__} has no {split!r} rows (path={self.path}, held_out={self.held_out})"
            )
        return self._lines[split]

    def rows(self, split: str) -> list[Row]:
        """All rows of a split, in file order. Raises ValueError if there are none, BadRows if one cannot be used."""
        if split not in self._rows:
            self._rows[split] = good(self.lines(split))
        return self._rows[split]

    def check_row(self, row: Row) -> None:
        """Raise ValueError, with the end of a sentence that starts with the row's place, if a row cannot be used."""
        check_columns(row, self.NEEDED, self.LISTS, type(self).__name__)

    def problem_of(self, row: Row) -> Problem:
        """The problem that a row describes."""
        raise NotImplementedError

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return self.problem_of(self.row(split, seed, index))

    def inspect(self, split: str) -> Iterator[tuple[str, Problem | Exception]]:
        if type(self).problem is not RowTask.problem:  # a subclass that chooses its rows itself
            yield from super().inspect(split)
            return
        for place, row, fault in self.lines(split):
            try:
                yield place, ValueError(fault) if row is None else self.problem_of(row)
            except Exception as error:
                yield place, error

    def size(self, split: str) -> int:
        return len(self.rows(split))

    def row(self, split: str, seed: int, index: int) -> Row:
        """Row ``index`` of an endless stream: every epoch is a new permutation, each row once per epoch."""
        rows = self.rows(split)
        epoch, position = divmod(index, len(rows))
        return rows[_permutation(type(self).__name__, split, seed, epoch, len(rows))[position]]

    def _load(self, split: str) -> list[Line]:
        if self.path is None:
            return self._from_hub(split)
        lines = self._read(split)
        return lines if "{split}" in self.path else self._held_out(split, lines)

    def _read(self, split: str) -> list[Line]:
        return readable(self.path.replace("{split}", split), type(self).__name__)

    def _held_out(self, split: str, lines: list[Line]) -> list[Line]:
        held = round(len(lines) * self.held_out)
        if 0 < self.held_out < 1 and len(lines) > 1:  # of few rows, at least one for either split
            held = min(max(held, 1), len(lines) - 1)
        cut = len(lines) - held
        return lines[:cut] if split == "train" else lines[cut:]

    def _from_hub(self, split: str) -> list[Line]:
        if split not in self.HUB:
            return []
        from datasets import load_dataset  # slow to import, and only needed here

        name, configuration, hub_split = self.HUB[split]
        try:
            rows = load_dataset(name, configuration, split=hub_split)
        except OSError as error:
            columns = f" with the columns {', '.join(self.NEEDED)}" if self.NEEDED else ""
            raise ValueError(f"{error}. Set path of {type(self).__name__} to a JSONL file{columns} instead") from error
        rows = rows.select_columns(list(self.COLUMNS)) if self.COLUMNS else rows
        return [Line(f"{name} ({hub_split}), row {number}", row) for number, row in enumerate(rows, 1)]


@dataclass(frozen=True, kw_only=True)
class Rows(RowTask):
    """Your own prompts, judged by your own function.

    Args:
        path: JSONL, CSV or Parquet; a row's "prompt" is a text or a list of chat messages; its "answer", if there is
            one, a demonstration for supervised training. See `RowTask` for ``path`` and ``held_out``.
        verifier: (row, completion text) -> verdict; in YAML by its import path. `TRLReward` makes one of a reward
            function of TRL.

    Raises:
        ValueError: a verifier that cannot be called like that.
    """

    verifier: Callable[[Row, str], Verdict]
    NEEDED = ("prompt",)
    DEMONSTRATION = "'answer'"

    def __post_init__(self):
        super().__post_init__()
        check_signature(self.verifier, "row", "text")

    def check_row(self, row: Row) -> None:
        if "prompt" not in row:
            super().check_row(row)  # names the columns
        prompt_of(row["prompt"])

    def problem_of(self, row: Row) -> Problem:
        answer = row.get("answer")
        return Problem(prompt_of(row["prompt"]), partial(self.verifier, row), "" if answer is None else str(answer))


@lru_cache(maxsize=8)
def _permutation(*key: int | str) -> list[int]:
    order = list(range(key[-1]))
    rng(*key).shuffle(order)
    return order
