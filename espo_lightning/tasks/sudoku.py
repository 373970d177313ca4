"""4x4 Sudoku: the paper's planning task, with a split that is disjoint in the solution grids."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from itertools import permutations
from math import factorial, prod
from random import Random
from typing import Literal

from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Distinct, Problem, Task, Verdict, rng
from espo_lightning.tasks.files import Line, Row, check_columns, checked_lines, good, readable
from espo_lightning.tasks.offered import offered
from espo_lightning.tasks.published import sudoku_cells

INSTRUCTION = """Solve a 4x4 Sudoku. The puzzle is a string of 16 digits, read row by row; 0 marks an empty cell.
Rules: fill every empty cell with a digit from 1 to 4, so that each row, each column and each of the four \
2x2 blocks holds every digit exactly once. Digits that are already there stay as they are.

Example
Puzzle: 0401002010030310
Solution: 2431312412434312

Think inside <reasoning> tags, then give the solution inside <answer> tags as exactly 16 digits:
<reasoning>
your reasoning
</reasoning>
<answer>
16 digits
</answer>

Now, solve this puzzle: {puzzle}"""


@cache
def grids() -> tuple[str, ...]:
    """All 288 solved grids, as 16 digits each, sorted."""
    rows, grown = ["".join(p) for p in permutations("1234")], [""]
    for _ in range(4):  # a grid is dropped at its first row that does not fit: 72 tries where all rows make 331,776
        grown = [grid for above in grown for row in rows if _fits(grid := above + row)]
    return tuple(grown)  # sorted, as the rows are


def _fits(grid: str) -> bool:
    """Whether the first rows of a grid repeat no digit in a column or a 2x2 block."""
    units = ([grid[i] for i in unit if i < len(grid)] for unit in _UNITS)
    return all(len(set(unit)) == len(unit) for unit in units)


def is_solved(grid: str) -> bool:
    """Whether 16 characters hold every digit 1..4 once in each row, column and 2x2 block."""
    return all({grid[i] for i in unit} == set("1234") for unit in _UNITS)


_UNITS = (
    [range(4 * r, 4 * r + 4) for r in range(4)]
    + [range(c, 16, 4) for c in range(4)]
    + [(b, b + 1, b + 4, b + 5) for b in (0, 2, 8, 10)]
)


LABEL = re.compile(
    r"\b(?:row|line)[ \t]{0,4}#?[1-4]\b[ \t]{0,4}[:.)=|-]?|\br[ \t]?[1-4][ \t]{0,4}[:.)=|]", re.IGNORECASE
)
NUMBERED = re.compile(r"\W{0,4}([1-4])\s?[.):|\]]\s(.*)")  # of a list: "1. 2 4 3 1"
BETWEEN = re.compile(r"[\s,;|&*_\[\](){}\\.+'\"-]+")  # what may stand between the digits of a row
REMARKS = 3  # digits beside a clear grid ("in 12 steps"); four would make another row


def parse_grid(text: str) -> str | None:
    """The 16 digits of an answer, or None.

    Layout is free: 16 digits with any separators, or four rows of four, also with labels ("Row 1:", "1.") and a remark.
    More or fewer digits are not, so that nothing can be gained from a correct prefix; a second grid, or part of one,
    makes a hedge, which is no answer. ASCII digits only. `offered` says where the answer stands.
    """
    answer = offered(text, _grid_in)
    return None if answer is None else _grid_in(answer)


def _grid_in(answer: str) -> str | None:
    answer = LABEL.sub("\n", answer)
    lines = [line for line in answer.splitlines() if re.search("[0-9]", line)]
    items = [match.groups() for line in lines[:5] if (match := NUMBERED.match(line))]
    rests = [re.sub("[^0-9]", "", rest) for _, rest in items]
    if len(lines) == 4 and [label for label, _ in items] == list("1234") and {len(rest) for rest in rests} == {4}:
        return "".join(rests)
    digits = re.sub("[^0-9]", "", answer)
    if len(digits) == 16:
        return digits
    rows = [row for line in lines for row in _rows_of(line)] if len(digits) <= 16 + REMARKS else []
    return "".join(rows) if len(rows) == 4 else None


def _rows_of(line: str) -> list[str]:
    """The rows of four digits that stand in a line: one if there is nothing else in it, else those written in one."""
    bare = BETWEEN.sub("", line)
    return [bare] if re.fullmatch("[0-9]{4}", bare) else re.findall(r"(?<![0-9])[0-9]{4}(?![0-9])", line)


def verify(puzzle: str, solution: str, reward: str, text: str) -> Verdict:
    """Score an answer.

    exact: a solved grid that keeps the givens (any, should the puzzle have several). cell: the share of empty cells
    that match ``solution``. cell_published: the same share as the published evaluation reads the text, `sudoku_cells`;
    it is never rewarded. The reward is 1 for an exact answer; otherwise the cell share if ``reward`` is "cell" and all
    givens were kept; otherwise 0.
    """
    published = sudoku_cells(puzzle, solution, text)
    grid = parse_grid(text)
    if grid is None:
        return {"reward": 0.0, "exact": 0.0, "cell": 0.0, "cell_published": published}
    kept = all(p in ("0", g) for p, g in zip(puzzle, grid))
    empty = [i for i, p in enumerate(puzzle) if p == "0"]
    exact = kept and is_solved(grid)
    cell = sum(grid[i] == solution[i] for i in empty) / len(empty) if empty else float(exact)
    graded = cell if kept and reward == "cell" else 0.0
    return {"reward": 1.0 if exact else graded, "exact": float(exact), "cell": cell, "cell_published": published}


def puzzle_of(row: Row) -> tuple[str, str]:
    """Puzzle and solution of a row. Raises ValueError with what is wrong: no digits, givens that contradict, ..."""
    check_columns(row, ("Puzzle", "Solution"), (), "Sudoku")
    puzzle, solution = row["Puzzle"].strip().zfill(16), row["Solution"].strip()  # spreadsheets drop leading zeros
    if not re.fullmatch("[0-4]{16}", puzzle):
        raise ValueError(f"has a 'Puzzle' that is no 16 digits from 0 to 4: {puzzle!r}")
    if not re.fullmatch("[1-4]{16}", solution) or not is_solved(solution):
        raise ValueError(f"has a 'Solution' that is no solved grid of 16 digits: {solution!r}")
    if wrong := [i for i, (p, s) in enumerate(zip(puzzle, solution)) if p not in ("0", s)]:
        cell = f"row {wrong[0] // 4 + 1}, column {wrong[0] % 4 + 1}"
        raise ValueError(
            f"has a 'Puzzle' whose givens contradict its 'Solution', first in {cell}: no answer can be right"
        )
    if puzzle == "0" * 16:
        raise ValueError("has a 'Puzzle' without givens: every solved grid would be right")
    return puzzle, solution


def fill_rows(puzzle: str, order: Random | None) -> str:
    """Complete each row with its missing digits, ascending or in random order: plausible, and mostly wrong."""
    rows = []
    for row in re.findall("....", puzzle):
        missing = [d for d in "1234" if d not in row]
        if order is not None:
            order.shuffle(missing)
        rows.append("".join(missing.pop(0) if cell == "0" else cell for cell in row))
    return "".join(rows)


@dataclass(frozen=True)
class Sudoku(Task):
    """4x4 Sudoku puzzles with one solution.

    The 288 solved grids are split once and for all: 216 for training, 72 for testing.

    Args:
        empty: empty cells of a puzzle.
        prompt: "compact" (just the 16 digits, for the tiny policies) or "instruct" (for LLaDA and Dream).
        reward: "cell" (share of right cells, the paper's) or "exact" (all or nothing).
        right: share of right demonstrations for supervised training.
        habit: the wrong ones: each row's missing digits in "ascending" or in "random" order.
        path: a file, such as CSV, with columns Puzzle and Solution (the published test file's format), used for
            every split instead of drawn puzzles. A puzzle with several solutions accepts them all.

    Test puzzles are all different, as long as there are different ones.
    """

    empty: int = 8
    prompt: Literal["compact", "instruct"] = "compact"
    reward: Literal["cell", "exact"] = "cell"
    right: float = 1.0
    habit: Literal["ascending", "random"] = "ascending"
    path: str | None = None

    def __post_init__(self):
        check_counts(0, empty=self.empty)
        if not 1 <= self.empty <= 12:
            raise ValueError(f"empty must be 1..12 (no puzzle with fewer than 4 givens is unique), got {self.empty}")
        if not 0 <= self.right <= 1:
            raise ValueError(f"right is a share between 0 and 1, got {self.right}")

    @cached_property
    def _lines(self) -> list[Line]:
        lines = checked_lines(readable(self.path, "Sudoku"), puzzle_of)
        if not lines:
            raise ValueError(f"{self.path} has no rows: Sudoku needs columns Puzzle and Solution of 16 digits each")
        return lines

    @cached_property
    def _rows(self) -> list[tuple[str, str]]:
        return [puzzle_of(row) for row in good(self._lines)]

    @cached_property
    def chance(self) -> dict[str, float]:
        """Exact expectation of filling each row with its missing digits in random order, over 256 test puzzles."""
        puzzles = [p for p, _ in (self._draw("test", 0, i) for i in range(256)) if "0" in p]
        missing = [[row.count("0") for row in re.findall("....", puzzle) if "0" in row] for puzzle in puzzles]
        cell = sum(len(rows) / sum(rows) for rows in missing) / len(missing)
        exact = sum(1 / prod(map(factorial, rows)) for rows in missing) / len(missing)
        return {"exact": exact, "cell": cell}

    def _draw(self, split: str, seed: int, index: int) -> tuple[str, str]:
        """Puzzle and solution."""
        if self.path is not None:
            return self._rows[index % len(self._rows)]
        if split == "test":
            return _test_puzzles(self.empty, seed)[index]
        return draw_puzzle(self.empty, split, seed, index)

    def size(self, split: str) -> int | None:
        return None if self.path is None else len(self._rows)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return self._pose(*self._draw(split, seed, index), rng("sudoku answer", split, seed, index))

    def inspect(self, split: str) -> Iterator[tuple[str, Problem | Exception]]:
        for place, row, fault in [] if self.path is None else self._lines:
            yield place, ValueError(fault) if row is None else self._pose(*puzzle_of(row), rng(place))

    def _pose(self, puzzle: str, solution: str, draw: Random) -> Problem:
        right = draw.random() < self.right
        answer = solution if right else fill_rows(puzzle, draw if self.habit == "random" else None)
        text = puzzle if self.prompt == "compact" else INSTRUCTION.format(puzzle=puzzle)
        return Problem(text, partial(verify, puzzle, solution, self.reward), answer, cluster=solution)


def draw_puzzle(empty: int, split: str, seed: int, index: int) -> tuple[str, str]:
    """A puzzle with one solution, and that."""
    draw = rng("sudoku", split, seed, index, empty)
    solution = draw.choice(solutions(split))
    while True:
        holes = set(draw.sample(range(16), empty))
        givens = [(i, d) for i, d in enumerate(solution) if i not in holes]
        if sum(all(g[i] == d for i, d in givens) for g in grids()) == 1:
            return "".join("0" if i in holes else d for i, d in enumerate(solution)), solution


@lru_cache(maxsize=8)
def _test_puzzles(empty: int, seed: int) -> Distinct[tuple[str, str]]:
    return Distinct(partial(draw_puzzle, empty, "test", seed))


@cache
def solutions(split: str) -> tuple[str, ...]:
    """The solved grids of a split: "train" 216, "test" 72, disjoint."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    shuffled = rng("sudoku split").sample(grids(), 288)
    return tuple(shuffled[:72] if split == "test" else shuffled[72:])
