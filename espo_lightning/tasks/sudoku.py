"""4x4 Sudoku: the paper's planning task, with a split that is disjoint in the solution grids."""

import csv
import re
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import permutations, product
from math import factorial, prod
from random import Random
from typing import Literal

from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Problem, Task, Verdict, answer_part, rng

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
    rows = ["".join(p) for p in permutations("1234")]
    return tuple(grid for four in product(rows, repeat=4) if is_solved(grid := "".join(four)))  # rows are sorted


def is_solved(grid: str) -> bool:
    """Whether 16 characters hold every digit 1..4 once in each row, column and 2x2 block."""
    return all({grid[i] for i in unit} == set("1234") for unit in _UNITS)


_UNITS = (
    [range(4 * r, 4 * r + 4) for r in range(4)]
    + [range(c, 16, 4) for c in range(4)]
    + [(b, b + 1, b + 4, b + 5) for b in (0, 2, 8, 10)]
)


def parse_grid(text: str) -> str | None:
    """The 16 digits of an answer, or None.

    Labels and layout are fine (four groups of four digits, or 16 digits with any separators); more or
    fewer digits are not, so that nothing can be gained from a correct prefix. ASCII digits only.
    """
    answer = answer_part(text)
    rows = re.findall(r"(?<![0-9])[0-9]{4}(?![0-9])", answer)
    digits = "".join(rows) if len(rows) == 4 else re.sub(r"[^0-9]", "", answer)
    return digits if len(digits) == 16 else None


def verify(puzzle: str, solution: str, reward: str, text: str) -> Verdict:
    """Score an answer.

    exact: a solved grid that keeps the givens (any, should the puzzle have several). cell: the share of
    empty cells that match ``solution``, the metric of the d1 line of papers. The reward is 1 for an exact
    answer; otherwise the cell share if ``reward`` is "cell" and all givens were kept; otherwise 0.
    """
    grid = parse_grid(text)
    if grid is None:
        return {"reward": 0.0, "exact": 0.0, "cell": 0.0}
    kept = all(p in ("0", g) for p, g in zip(puzzle, grid))
    empty = [i for i, p in enumerate(puzzle) if p == "0"]
    exact = kept and is_solved(grid)
    cell = sum(grid[i] == solution[i] for i in empty) / len(empty) if empty else float(exact)
    graded = cell if kept and reward == "cell" else 0.0
    return {"reward": 1.0 if exact else graded, "exact": float(exact), "cell": cell}


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
        path: a CSV file with columns Puzzle and Solution (the published test file's format), used for
            every split instead of drawn puzzles. A puzzle with several solutions accepts them all.
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
    def _rows(self) -> list[tuple[str, str]]:
        with open(self.path, newline="") as file:
            rows = [(r.get("Puzzle", "").zfill(16), r.get("Solution", "")) for r in csv.DictReader(file)]
        if not rows or not all(re.fullmatch("[0-4]{16}", p) and is_solved(s) for p, s in rows):
            raise ValueError(f"{self.path} must be a CSV file with columns Puzzle and Solution of 16 digits each")
        return rows

    @cached_property
    def chance(self) -> dict[str, float]:
        """Exact expectation of filling each row with its missing digits in random order, over 256 test puzzles."""
        puzzles = [p for p, _ in (self._draw("test", 0, i) for i in range(256)) if "0" in p]
        missing = [[row.count("0") for row in re.findall("....", puzzle) if "0" in row] for puzzle in puzzles]
        cell = sum(len(rows) / sum(rows) for rows in missing) / len(missing)
        exact = sum(1 / prod(map(factorial, rows)) for rows in missing) / len(missing)
        return {"exact": exact, "cell": cell}

    def _draw(self, split: str, seed: int, index: int) -> tuple[str, str]:
        if self.path is not None:
            return self._rows[index % len(self._rows)]
        draw = rng("sudoku", split, seed, index, self.empty)
        solution = draw.choice(solutions(split))
        while True:
            holes = set(draw.sample(range(16), self.empty))
            givens = [(i, d) for i, d in enumerate(solution) if i not in holes]
            if sum(all(g[i] == d for i, d in givens) for g in grids()) == 1:
                return "".join("0" if i in holes else d for i, d in enumerate(solution)), solution

    def size(self, split: str) -> int | None:
        return None if self.path is None else len(self._rows)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        puzzle, solution = self._draw(split, seed, index)
        draw = rng("sudoku answer", split, seed, index)
        right = draw.random() < self.right
        answer = solution if right else fill_rows(puzzle, draw if self.habit == "random" else None)
        text = puzzle if self.prompt == "compact" else INSTRUCTION.format(puzzle=puzzle)
        return Problem(text, partial(verify, puzzle, solution, self.reward), answer)


@cache
def solutions(split: str) -> tuple[str, ...]:
    """The solved grids of a split: "train" 216, "test" 72, disjoint."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    shuffled = rng("sudoku split").sample(grids(), 288)
    return tuple(shuffled[:72] if split == "test" else shuffled[72:])
