"""Rows of local files, each with the place where it stands: JSONL, CSV and Parquet, validated before anything is done.

A row that cannot be used costs a message, never a run: readers collect what is wrong and `report` says it in one text.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import NamedTuple

Row = Mapping[str, object]

SHOWN = 10  # bad rows that a message names
SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_FORMATS = {"arrow", "bz2", "db", "feather", "npy", "npz", "ods", "pkl", "tar", "xls", "xlsx", "xz", "yaml", "zip"}
TRANSLATE = "write it as JSONL, CSV or Parquet"


class Line(NamedTuple):
    """A row and its place, such as "rows.jsonl, line 3"; or, with ``row`` None, why there is none (``fault``)."""

    place: str
    row: Row | None
    fault: str = ""


class BadRows(ValueError):
    """Rows that cannot be used; the message names the first of them."""

    def __init__(self, faults: list[tuple[str, str]]):
        super().__init__(report(faults))
        self.faults = faults


def report(faults: list[tuple[str, str]]) -> str:
    """One message about (place, what is wrong) of some rows, the first ten of them by name."""
    named = [f"{place}, {fault}" for place, fault in faults[:SHOWN]]
    if len(faults) == 1:
        return named[0]
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n  ".join([f"{len(faults)} rows cannot be used:", *named, *more])


def read(path: str) -> list[Line]:
    """All rows of a file. ``.csv``, ``.tsv`` and ``.parquet`` are what they say, others JSONL; each may end ``.gz``.

    A byte-order mark is skipped. Values of CSV are texts.

    Raises:
        ValueError: the file cannot be read, is cut off, is not UTF-8, or is of a format that is not read.
    """
    plain = path.removesuffix(".gz")
    kind = PurePath(plain).suffix.lower()
    if kind[1:] in OTHER_FORMATS:
        raise ValueError(f"{path} is a {kind} file, which is not read: {TRANSLATE}")
    try:
        if kind == ".parquet":
            return list(_parquet(path))
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig", newline="" if kind in SEPARATORS else None) as file:
            return list(_csv(path, file, SEPARATORS[kind]) if kind in SEPARATORS else _jsonl(path, file))
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): {TRANSLATE}") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def _jsonl(path: str, file: Iterable[str]) -> Iterator[Line]:
    for number, text in enumerate(file, 1):
        if text.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                if text.lstrip().startswith("["):
                    raise ValueError(f"{path} is one JSON array over several lines: {TRANSLATE}") from error
                yield Line(place, None, f"is not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield Line(place, row)
            else:
                what = "a whole array, where every line is to be an object" if isinstance(row, list) else "no object"
                yield Line(place, None, f"is {kind_of(row)}, {what} with named columns")


def _csv(path: str, file: Iterable[str], separator: str) -> Iterator[Line]:
    reader = csv.DictReader(file, delimiter=separator)
    columns = reader.fieldnames or []
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        values = row.pop(None, [])  # beyond the last column
        if values or None in row.values():
            found = len(columns) + len(values) - sum(value is None for value in row.values())
            yield Line(place, None, f"has {found} values for {len(columns)} columns")
        else:
            yield Line(place, row)


def _parquet(path: str) -> Iterator[Line]:
    import pyarrow  # comes with datasets; slow to import, and only needed here
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    for number, row in enumerate(rows, 1):
        yield Line(f"{path}, row {number}", row)


def readable(path: str, owner: str) -> list[Line]:
    """`read`, where whatever the system refuses is a ValueError that names the argument ``path`` of ``owner``."""
    try:
        return read(path)
    except OSError as error:
        raise ValueError(f"path {path} of {owner} cannot be read: {error.strerror or error}") from error


def checked_lines(lines: Iterable[Line], check: Callable[[Row], None]) -> list[Line]:
    """The lines, those among them that ``check`` refuses (ValueError) with its reason in the place of their row."""
    found = []
    for line in lines:
        if line.row is not None:
            try:
                check(line.row)
            except ValueError as error:
                line = Line(line.place, None, str(error))
        found.append(line)
    return found


def good(lines: list[Line]) -> list[Row]:
    """The rows of all lines. Raises BadRows if some have none."""
    if faults := [(line.place, line.fault) for line in lines if line.row is None]:
        raise BadRows(faults)
    return [line.row for line in lines]


def check_columns(row: Row, needed: Iterable[str], lists: Iterable[str], owner: str) -> None:
    """Every column of ``needed`` is there and holds a text, or, if it is among ``lists``, a list of texts.

    Raises:
        ValueError: one is not there, null, empty or of another type. "a|b" in ``needed`` is a, or else b.
    """
    for names in needed:
        found = [name for name in names.split("|") if row.get(name) is not None]
        if not found:
            there = [name for name in names.split("|") if name in row]
            if there:
                raise ValueError(f"has null as {there[0]!r}, which {owner} needs")
            columns = ", ".join(map(repr, row)) or "nothing"
            raise ValueError(f"has no {' or '.join(map(repr, names.split('|')))}, which {owner} needs, only {columns}")
        value = row[found[0]]
        if found[0] in lists:
            if not isinstance(value, list) or not value or not all(isinstance(x, str) and x.strip() for x in value):
                raise ValueError(f"has a column {found[0]!r} that is no list of texts: {_short(value)}")
        elif not isinstance(value, str):
            raise ValueError(f"has a column {found[0]!r} that is {kind_of(value)}, not a text: {_short(value)}")
        elif not value.strip():
            raise ValueError(f"has an empty {found[0]!r}, which {owner} needs")


def kind_of(value: object) -> str:
    """The type of a value as a message calls it: "null", "a list", "an int"."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
