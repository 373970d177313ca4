"""Sudoku and Countdown: problems, splits, demonstrations, chance levels, and verifiers that nothing can break."""

import json
import math
import os
import pickle
import random
import re
import string
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from itertools import permutations, product
from pathlib import Path

import pytest
from conftest import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st

import espo_lightning
from espo_lightning.tasks import Countdown, Sudoku
from espo_lightning.tasks.base import answer_part
from espo_lightning.tasks.countdown import evaluate, shapes
from espo_lightning.tasks.countdown import verify as verify_countdown
from espo_lightning.tasks.sudoku import fill_rows, grids, is_solved, parse_grid, solutions
from espo_lightning.tasks.sudoku import verify as verify_sudoku

DATA = Path(__file__).parent / "data"
TASKS = [
    Sudoku(),
    Sudoku(empty=4, prompt="instruct", reward="exact", right=0.5, habit="random"),
    Countdown(),
    Countdown(largest=9, largest_target=30, prompt="instruct", format_reward=0.0, right=0.5),
]


def strict(verdict: dict[str, float]) -> dict[str, float]:
    """The metrics of our own reading; what the published evaluation makes of a text is tested by itself."""
    return {key: value for key, value in verdict.items() if not key.endswith("_published")}


def expressions(numbers):
    return [shape.format(*numbers) for shape in shapes(len(numbers))]


def assert_share(hits: int, chances: list[float]) -> None:
    """A sum of independent events with these chances: within 4 standard deviations of its mean."""
    deviation = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(hits - sum(chances)) < 4 * deviation


# ---- all tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_depend_on_seed_split_and_index_alone(task, split):
    first = [task.problem(split, 3, i) for i in range(20)]
    again = [pickle.loads(pickle.dumps(task)).problem(split, 3, i) for i in reversed(range(20))][::-1]
    assert [(p.prompt, p.answer) for p in first] == [(p.prompt, p.answer) for p in again]
    assert len({p.prompt for p in first}) >= 15
    other = "test" if split == "train" else "train"
    for changed in ([task.problem(split, 4, i) for i in range(20)], [task.problem(other, 3, i) for i in range(20)]):
        assert len({p.prompt for p in first} & {p.prompt for p in changed}) <= 5


def test_problems_are_the_same_in_another_process_with_another_hash_seed():
    """And without torch, which the worker processes of verifiers need not import."""
    program = """
import sys, types
package = types.ModuleType("espo_lightning")  # not its __init__, which imports everything
package.__path__ = [sys.argv[1]]
sys.modules["espo_lightning"] = package
from espo_lightning.tasks import Countdown, Sudoku
assert "torch" not in sys.modules
tasks = Sudoku(), Sudoku(empty=6, right=0.3, habit="random"), Countdown(), Countdown(right=0.3, prompt="instruct")
problems = [t.problem(s, 5, i) for t in tasks for s in ("train", "test") for i in range(10)]
print([(p.prompt, p.answer) for p in problems])
"""
    tasks = Sudoku(), Sudoku(empty=6, right=0.3, habit="random"), Countdown(), Countdown(right=0.3, prompt="instruct")
    here = [t.problem(s, 5, i) for t in tasks for s in ("train", "test") for i in range(10)]
    environment = os.environ | {"PYTHONHASHSEED": "4321"}
    command = [sys.executable, "-c", program, str(Path(espo_lightning.__file__).parent)]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == repr([(p.prompt, p.answer) for p in here])


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_problems_pickle_with_their_verifier(task):
    for index in range(5):
        problem = task.problem("train", 0, index)
        copy = pickle.loads(pickle.dumps(problem))
        assert copy.prompt == problem.prompt
        for text in (problem.answer, f"<answer>{problem.answer}</answer>", "", "no idea"):
            assert copy.verify(text) == problem.verify(text)


@pytest.mark.parametrize("task", [Sudoku(), Countdown()], ids=repr)
def test_global_generators_are_not_used(task):
    state = random.getstate()
    problem = task.problem("train", 0, 0)
    problem.verify(problem.answer)
    assert random.getstate() == state


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_unknown_splits_raise(task):
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'validation\''):
        task.problem("validation", 0, 0)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("2*4", "2*4"),
        ("", ""),
        ("<answer></answer>", ""),
        ("<answer>a</answer> b", "a"),
        ("<answer>a", "a"),
        ("<ANSWER>a</Answer>", "a"),
        ("<answer>a</answer><answer>b</answer>", "b"),
        ("<answer><answer>a</answer></answer>", "a"),
        ("x</answer><answer>a", "a"),
        ("a</answer>", "a</answer>"),
    ],
)
def test_answer_part(text, part):
    assert answer_part(text) == part


# ---- Sudoku: problems -----------------------------------------------------------------------------------------------


def solves(puzzle: str) -> list[str]:
    """All solutions by backtracking, without the library's list of grids."""
    if "0" not in puzzle:
        return [puzzle]
    i = puzzle.index("0")
    row, column, block = i // 4, i % 4, (i // 8, i % 4 // 2)
    peers = {puzzle[j] for j in range(16) if j // 4 == row or j % 4 == column or (j // 8, j % 4 // 2) == block}
    return [s for d in "1234" if d not in peers for s in solves(puzzle[:i] + d + puzzle[i + 1 :])]


def test_the_288_grids_and_their_split():
    assert len(grids()) == len(set(grids())) == 288
    assert set(grids()) == set(solves("0" * 16))
    train, test = solutions("train"), solutions("test")
    assert (len(train), len(test)) == (216, 72)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(grids())


@pytest.mark.parametrize("empty", [1, 4, 8, 10])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_puzzle_has_one_solution_of_its_split(split, empty):
    for index in range(60):
        problem = Sudoku(empty=empty).problem(split, 1, index)
        assert problem.prompt.count("0") == empty
        assert solves(problem.prompt) == [problem.answer]
        assert problem.answer in solutions(split)
        assert strict(problem.verify(problem.answer)) == {"reward": 1.0, "exact": 1.0, "cell": 1.0}


def test_drawn_grids_and_holes_vary():
    problems = [Sudoku().problem("train", 0, i) for i in range(2000)]
    assert len({p.answer for p in problems}) == 216  # the chance that one is missing is 216 (1 - 1/216)^2000 = 2 %
    for cell in range(16):
        assert 800 < sum(p.prompt[cell] == "0" for p in problems) < 1200  # about half: 8 of 16, a little by uniqueness


def test_sudoku_prompts():
    compact, instruct = (Sudoku(prompt=p).problem("test", 0, 3) for p in ("compact", "instruct"))
    assert re.fullmatch("[0-4]{16}", compact.prompt)
    assert instruct.prompt.endswith(f"Now, solve this puzzle: {compact.prompt}")
    assert "<reasoning>" in instruct.prompt
    assert compact.answer == instruct.answer
    assert solves("0401002010030310") == ["2431312412434312"]  # the example of the prompt
    assert "0401002010030310" in instruct.prompt
    assert "2431312412434312" in instruct.prompt


@pytest.mark.parametrize("habit", ["ascending", "random"])
@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
def test_share_of_right_sudoku_demonstrations(habit, right):
    """The wrong ones are right by chance: when the rows' missing digits happen to be filled in the right order."""
    task, hits, chances = Sudoku(right=right, habit=habit), 0, []
    for index in range(600):
        problem, solution = task.problem("train", 2, index), Sudoku().problem("train", 2, index).answer
        rows = [problem.prompt[i : i + 4] for i in range(0, 16, 4)]
        by_chance = 1 / math.prod(math.factorial(row.count("0")) for row in rows)
        if habit == "ascending":
            filled = ""
            for row in rows:
                missing = iter(sorted(set("1234") - set(row)))
                filled += "".join(next(missing) if cell == "0" else cell for cell in row)
            by_chance = float(filled == solution)
            assert problem.answer in (filled, solution)
        assert all(p in ("0", a) for p, a in zip(problem.prompt, problem.answer))
        assert all(set(problem.answer[i : i + 4]) == set("1234") for i in range(0, 16, 4))
        hits += problem.verify(problem.answer)["exact"] == 1
        chances.append(right + (1 - right) * by_chance)
    if right == 1 or (right == 0 and habit == "ascending"):
        assert hits == sum(chances)
    else:
        assert_share(hits, chances)


@pytest.mark.parametrize("empty", [4, 8])
def test_sudoku_chance_is_what_a_row_filler_scores(empty):
    task, draw = Sudoku(empty=empty), random.Random(0)
    exact, cells, spread, n = 0, 0.0, 0.0, 256 * 40
    chances = []
    for index in range(256):
        problem = task.problem("test", 0, index)
        scores = []
        for _ in range(40):
            filled = ""
            for row in re.findall("....", problem.prompt):
                missing = sorted(set("1234") - set(row))
                draw.shuffle(missing)
                filled += "".join(missing.pop() if cell == "0" else cell for cell in row)
            verdict = problem.verify(filled)
            exact += verdict["exact"]
            scores.append(verdict["cell"])
        mean = sum(scores) / 40
        cells += sum(scores)
        spread += sum((s - mean) ** 2 for s in scores) * 40 / 39
        chances.append(1 / math.prod(math.factorial(row.count("0")) for row in re.findall("....", problem.prompt)))
    assert task.chance["exact"] == pytest.approx(sum(chances) / 256, abs=1e-12)
    assert_share(exact, [c for c in chances for _ in range(40)])
    assert abs(cells / n - task.chance["cell"]) < 4 * math.sqrt(spread) / n


def test_fill_rows_by_hand():
    assert fill_rows("0401002010030310", None) == "2431132412432314"


@pytest.mark.parametrize("changes", [{"empty": 0}, {"empty": 13}, {"right": -0.1}, {"right": 1.1}])
def test_wrong_sudoku_settings_raise(changes):
    with pytest.raises(ValueError, match=r"empty must be|right is a share"):
        Sudoku(**changes)


def test_sudoku_file():
    rows = [line.split(",") for line in (DATA / "sudoku_12.csv").read_text().split()[1:]]
    task = Sudoku(path=str(DATA / "sudoku_12.csv"))
    assert len(rows) == 12
    assert [len(solves(puzzle)) for puzzle, _ in rows] == [1] * 8 + [2, 2] + [1, 1]  # not all are unique
    for index, (puzzle, solution) in enumerate(rows):
        assert puzzle.count("0") == 8
        assert solution in solves(puzzle)
        for split in ("train", "test"):
            problem = task.problem(split, index, index)
            assert (problem.prompt, problem.answer) == (puzzle, solution)
            assert strict(problem.verify(solution)) == {"reward": 1.0, "exact": 1.0, "cell": 1.0}
            assert all(problem.verify(other)["reward"] == 1.0 for other in solves(puzzle))
        assert task.problem("test", 0, index + 12).prompt == puzzle  # the rows come round again
    assert set(task.chance) == {"exact", "cell"}
    wrong = Sudoku(path=str(DATA / "sudoku_12.csv"), right=0.0).problem("test", 0, 0)
    assert wrong.prompt == rows[0][0]


def test_sudoku_file_whose_leading_zeros_were_lost(tmp_path):
    """Spreadsheets drop them."""
    (tmp_path / "file.csv").write_text("Puzzle,Solution\n401002010030310,2431312412434312\n")
    assert Sudoku(path=str(tmp_path / "file.csv")).problem("test", 0, 0).prompt == "0401002010030310"


# ---- Sudoku: verifier -----------------------------------------------------------------------------------------------

PUZZLE, SOLUTION = "0401002010030310", "2431312412434312"
OPEN = "1234341200000000"  # four solutions
RIGHT, NOTHING = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "reward", "exact", "cell"),
    [
        (SOLUTION, *RIGHT),
        (f"<answer>{SOLUTION}</answer>", *RIGHT),
        (f"<reasoning>4 rows, 4 columns</reasoning>\n<answer>\n{SOLUTION}\n</answer>", *RIGHT),  # only the tag counts
        (f"<ANSWER>{SOLUTION}</ANSWER>", *RIGHT),  # tags in any case
        (f"<answer>{SOLUTION}", *RIGHT),  # the canvas may end before the closing tag
        (f"<answer><answer>{SOLUTION}</answer></answer>", *RIGHT),
        (f"<answer>{'1' * 16}</answer> no: <answer>{SOLUTION}</answer>", *RIGHT),  # the last answer counts
        (f"<answer>{SOLUTION}</answer> no: <answer>{'1' * 16}</answer>", 0.0, 0.0, 1 / 9),
        (f"<answer>{SOLUTION}</answer><answer></answer>", *NOTHING),
        ("row1: 2431 row2: 3124 row3: 1243 row4: 4312", *RIGHT),  # labels are no cells
        ("2431\n3124\n1243\n4312", *RIGHT),
        ("2 4 3 1 | 3 1 2 4 | 1 2 4 3 | 4 3 1 2", *RIGHT),
        ("2,4,3,1,3,1,2,4,1,2,4,3,4,3,1,2.", *RIGHT),
        (f"{SOLUTION[:4]} and {SOLUTION[4:8]}, {SOLUTION[8:12]}, {SOLUTION[12:]} in 3 steps", *RIGHT),  # 4 x 4 is clear
        ("9" + SOLUTION, *NOTHING),  # one digit too many
        (SOLUTION + "1", *NOTHING),
        (SOLUTION + "1234", *NOTHING),  # 20 and 32 digits: nothing is won by a right prefix
        (SOLUTION + SOLUTION, *NOTHING),
        (f"{SOLUTION} {SOLUTION}", *NOTHING),
        ("2431 3124 1243 4312 1234", *NOTHING),
        (SOLUTION[:15], *NOTHING),
        ("1" * 16, 0.0, 0.0, 1 / 9),  # givens overwritten; one of the nine empty cells is a 1
        ("0" * 16, *NOTHING),
        (PUZZLE, *NOTHING),  # an unsolved puzzle keeps the givens and has no cell right
        ("".join(s if p == "0" else "0" for p, s in zip(PUZZLE, SOLUTION)), 0.0, 0.0, 1.0),  # givens zeroed
        ("".join(s if p == "0" else "9" for p, s in zip(PUZZLE, SOLUTION)), 0.0, 0.0, 1.0),  # givens overwritten
        ("3" + SOLUTION[1:], 8 / 9, 0.0, 8 / 9),  # givens kept, one empty cell wrong
        ("²" + SOLUTION[1:], *NOTHING),  # a superscript is no digit
        ("²" + SOLUTION, *RIGHT),  # and so it is not a cell either
        ("２４３１３１２４１２４３４３１２", *NOTHING),  # full-width digits
        ("٢٤٣١٣١٢٤١٢٤٣٤٣١٢", *NOTHING),  # Arabic-Indic digits
        ("", *NOTHING),
        ("<answer></answer>", *NOTHING),
        ("no idea", *NOTHING),
        ("\x00\ud800" + SOLUTION, *RIGHT),
        ("<answer>" * 1000 + SOLUTION, *RIGHT),
        (SOLUTION + " " * 1_000_000, *RIGHT),
        ("1" * 1_000_000, *NOTHING),
        ("1234 " * 200_000, *NOTHING),
        ("<answer>" * 125_000, *NOTHING),
        ("</answer>" * 110_000, *NOTHING),
        ("<answer" * 140_000, *NOTHING),
    ],
)
def test_sudoku_verdicts(text, reward, exact, cell):
    verdict = verify_sudoku(PUZZLE, SOLUTION, "cell", text)
    if len(text) > 10_000:
        assert_linear(partial(verify_sudoku, PUZZLE, SOLUTION, "cell"), text)
    assert strict(verdict) == pytest.approx({"reward": reward, "exact": exact, "cell": cell}, abs=1e-12)
    assert strict(verify_sudoku(PUZZLE, SOLUTION, "exact", text)) == pytest.approx(
        {"reward": exact, "exact": exact, "cell": cell}, abs=1e-12
    )


def test_any_solution_that_keeps_the_givens_is_right():
    answers = solves(OPEN)
    assert len(answers) > 1
    for answer in answers:
        verdict = verify_sudoku(OPEN, answers[0], "cell", answer)
        assert (verdict["reward"], verdict["exact"]) == (1.0, 1.0)
        assert (verdict["cell"] == 1.0) == (answer == answers[0])
    for grid in set(grids()) - set(answers):
        assert verify_sudoku(OPEN, answers[0], "exact", grid)["reward"] == 0.0


def test_puzzle_without_an_empty_cell():
    assert strict(verify_sudoku(SOLUTION, SOLUTION, "cell", SOLUTION)) == {"reward": 1.0, "exact": 1.0, "cell": 1.0}
    assert strict(verify_sudoku(SOLUTION, SOLUTION, "cell", SOLUTION[::-1])) == {
        "reward": 0.0,
        "exact": 0.0,
        "cell": 0.0,
    }


def test_is_solved_sees_every_unit():
    for grid in grids()[::20]:
        assert is_solved(grid)
        for i, j in ((0, 1), (0, 4), (0, 5), (10, 15)):
            swapped = list(grid)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            assert is_solved("".join(swapped)) == (grid[i] == grid[j])
    assert not is_solved("1234" * 4)
    assert not is_solved("1234234134124123")  # a Latin square whose blocks repeat digits
    assert not is_solved("0" * 16)


# ---- Countdown: problems --------------------------------------------------------------------------------------------


def value_of(expression: str) -> Fraction | None:
    """Python's own reading of a well-formed expression, in exact arithmetic."""
    try:
        return eval(re.sub("[0-9]+", lambda n: f"Fraction({int(n[0])})", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


def parts_of(prompt: str) -> tuple[tuple[int, ...], int]:
    numbers, target = prompt.split("=")
    return tuple(map(int, numbers.split(","))), int(target)


@pytest.mark.parametrize(("largest", "largest_target"), [(20, 99), (9, 30)])
def test_countdown_problems_are_solvable_and_their_answers_right(largest, largest_target):
    task = Countdown(largest, largest_target)
    for split, index in product(("train", "test"), range(60)):
        problem = task.problem(split, 1, index)
        numbers, target = parts_of(problem.prompt)
        assert len(numbers) == 3
        assert all(1 <= n <= largest for n in numbers)
        assert 1 <= target <= largest_target
        assert value_of(problem.answer) == target
        assert sorted(map(int, re.findall("[0-9]+", problem.answer))) == sorted(numbers)
        assert strict(problem.verify(problem.answer)) == {"reward": 1.0, "exact": 1.0, "format": 1.0}


def test_countdown_train_and_test_are_disjoint_in_numbers_and_target():
    items, task = {}, Countdown(right=0.0)  # which saves the search for a right answer
    for split in ("train", "test"):
        drawn = [parts_of(task.problem(split, 0, i).prompt) for i in range(600)]
        assert drawn[:5] == [parts_of(Countdown().problem(split, 0, i).prompt) for i in range(5)]
        items[split] = {(tuple(sorted(numbers)), target) for numbers, target in drawn}
        assert len(items[split]) > 300
    assert not items["train"] & items["test"]


def test_small_countdown_is_split_completely():
    """Numbers to 2, targets to 4: few enough items that all come up, in one split each."""
    task, items = Countdown(2, 4, right=0.0), {}
    for split in ("train", "test"):
        drawn = [parts_of(task.problem(split, 0, i).prompt) for i in range(400)]
        items[split] = {(tuple(sorted(numbers)), target) for numbers, target in drawn}
    assert not items["train"] & items["test"]
    possible = set()
    for numbers in [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)]:
        possible |= {(numbers, v) for v in map(value_of, expressions(numbers)) if v in (1, 2, 3, 4)}
    assert items["train"] | items["test"] == possible


def test_expressions_cover_every_value():
    numbers = (2, 5, 7)
    values = {value_of(e) for e in expressions(numbers)}
    assert None not in values
    reachable = set()
    for (a, b, c), p, q in product(permutations(map(str, numbers)), "+-*/", "+-*/"):
        reachable |= {value_of(f"({a}{p}{b}){q}{c}"), value_of(f"{a}{p}({b}{q}{c})")}
    assert values == reachable - {None}
    assert expressions((3, 4)) == [f"{a}{s}{b}" for a, b in ("34", "43") for s in "+-*/"]


def test_countdown_prompts():
    compact, instruct = (Countdown(prompt=p).problem("test", 0, 3) for p in ("compact", "instruct"))
    numbers, target = parts_of(compact.prompt)
    assert f"all of the numbers {list(numbers)}" in instruct.prompt
    assert f"equals {target}." in instruct.prompt
    assert "<answer>" in instruct.prompt
    assert compact.answer == instruct.answer
    assert evaluate("2*4-3", (2, 3, 4)) == 5  # the example of the prompt


@pytest.mark.parametrize("right", [0.0, 0.4, 1.0])
def test_share_of_right_countdown_demonstrations(right):
    """The wrong ones, the numbers as given with random operators, are right by chance."""
    task, hits, chances = Countdown(right=right, habit="random"), 0, []
    for index in range(400):
        problem = task.problem("train", 3, index)
        (a, b, c), target = parts_of(problem.prompt)
        flats = [f"{a}{p}{b}{q}{c}" for p, q in product("+-*/", repeat=2)]
        by_chance = sum(value_of(e) == target for e in flats) / 16
        verdict = problem.verify(problem.answer)
        assert verdict["format"] == 1.0
        assert verdict["exact"] or problem.answer in flats
        hits += verdict["exact"] == 1
        chances.append(right + (1 - right) * by_chance)
    if right == 1:
        assert hits == 400
    else:
        assert_share(hits, chances)


def test_the_habit_of_adding_up():
    problems = [Countdown(right=0.0).problem("train", 0, i) for i in range(50)]
    assert all(p.answer == p.prompt.partition("=")[0].replace(",", "+") for p in problems)


def test_countdown_chance_is_what_random_operators_score():
    task, draw, hits, valid, chances = Countdown(right=0.0), random.Random(1), 0, 0, []
    for index in range(256):
        problem = task.problem("test", 0, index)
        (a, b, c), target = parts_of(problem.prompt)
        flats = [f"{a}{p}{b}{q}{c}" for p, q in product("+-*/", repeat=2)]
        chances += [sum(value_of(e) == target for e in flats) / 16] * 20
        for _ in range(20):
            verdict = problem.verify(f"{a}{draw.choice('+-*/')}{b}{draw.choice('+-*/')}{c}")
            hits += verdict["exact"]
            valid += verdict["format"]
    assert task.chance["exact"] == pytest.approx(sum(chances) / len(chances), abs=1e-12)
    assert_share(hits, chances)
    assert valid / len(chances) == task.chance["format"] == 1.0


def test_countdown_file():
    rows = [json.loads(line) for line in (DATA / "countdown_12.jsonl").read_text().splitlines()]
    task = Countdown(path=str(DATA / "countdown_12.jsonl"))
    assert len(rows) == 12
    for index, row in enumerate(rows):
        for split in ("train", "test"):
            problem = task.problem(split, index, index)
            assert problem.prompt == f"{row['input']}={row['output']}"
            assert value_of(problem.answer) == int(row["output"])
            assert strict(problem.verify(problem.answer)) == {"reward": 1.0, "exact": 1.0, "format": 1.0}
        assert task.problem("test", 0, index + 12).prompt == problem.prompt  # the rows come round again
    assert set(task.chance) == {"exact", "format"}


# ---- Countdown: verifier --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "target", "text", "exact", "form"),
    [
        ((2, 3, 4), 5, "2*4-3", 1, 1),
        ((2, 3, 4), 5, "<answer>2*4-3</answer>", 1, 1),
        ((2, 3, 4), 5, "<reasoning>2+3+4=9, no</reasoning><answer>\n2 * 4 - 3\n</answer>", 1, 1),
        ((2, 3, 4), 5, "<ANSWER>2*4-3</ANSWER>", 1, 1),  # tags in any case
        ((2, 3, 4), 5, "<answer>2*4-3", 1, 1),  # the canvas may end before the closing tag
        ((2, 3, 4), 5, "<answer><answer>2*4-3</answer></answer>", 1, 1),
        ((2, 3, 4), 5, "<answer>2+3+4</answer><answer>2*4-3</answer>", 1, 1),  # the last answer counts
        ((2, 3, 4), 5, "((2)*(4))-(3)", 1, 1),
        ((2, 3, 4), 5, "2×4-3", 1, 1),  # printed signs are read as those of the keyboard
        ((2, 3, 4), 5, "2×4−3", 1, 1),
        ((8, 2, 3), 7, "8÷2+3", 1, 1),
        ((2, 3, 4), 5, "2+3+4", 0, 1),  # valid, another value
        ((2, 3, 4), 5, "2*4-3=5", 0, 0),  # the prompt forbids an equals sign
        ((2, 3, 4), 5, "<answer></answer>", 0, 0),
        ((2, 3, 4), 5, "", 0, 0),
        ((2, 3, 4), 5, "no idea", 0, 0),
        ((2, 3, 4), 5, "the answer is 2*4-3", 0, 0),  # words are no expression
        ((2, 3, 4), 4, "2**3-4", 0, 0),  # powers, floor division, remainders: not among the operations
        ((7, 2, 1), 4, "7//2+1", 0, 0),
        ((7, 2, 1), 2, "7%2+1", 0, 0),
        ((9, 9, 9), 0, "9**9**9", 0, 0),
        ((30, 100, 93), 23, "30**100**93", 0, 0),
        ((81, 99, 98), 1, "81**99**98", 0, 0),
        ((2, 3, 4), 9, "2.3*4", 0, 0),  # no decimal numbers
        ((2, 3, 4), 5, "2.*4-3", 0, 0),
        ((2, 3, 4), 5, "2e0*4-3", 0, 0),
        ((2, 3, 4), 5, "2*4-3.0", 0, 0),
        ((2, 3, 4), 5, "2*4-3+0", 0, 0),  # a number too many, too few, twice, or another
        ((2, 3, 4), 6, "2*3", 0, 0),
        ((2, 3, 4), 5, "2*4-3*2/2", 0, 0),
        ((2, 3, 4), 5, "5", 0, 0),
        ((2, 3, 4), 5, "1+4*1", 0, 0),
        ((2, 3, 4), 21, "23-4+2", 0, 0),
        ((2, 3, 4), 19, "2 3-4", 0, 0),  # a gap does not join digits
        ((2, 3, 4), 5, "-3+2*4", 0, 0),  # signs are no operations
        ((2, 3, 4), 5, "2*4+-3", 0, 0),
        ((2, 3, 4), 5, "2(4)-3", 0, 0),  # no implied product
        ((2, 3, 4), 5, "2*4-3)", 0, 0),
        ((2, 3, 4), 5, "(2*4-3", 0, 0),
        ((2, 3, 4), 5, "()2*4-3", 0, 0),
        ((2, 3, 4), 5, "2*4-3;", 0, 0),
        ((2, 3, 4), 5, "2*4-3 # right", 0, 0),
        ((2, 3, 4), 5, "__import__('os')", 0, 0),
        ((2, 2, 5), 0, "5/(2-2)", 0, 0),  # division by zero has no value
        ((2, 2, 5), 1, "5/(2-2)", 0, 0),
        ((3, 5, 8), 1, "8/(3+5)", 1, 1),
        ((1, 3, 9), 3, "1/(3/9)", 1, 1),  # exact: 1/3 is no float
        ((7, 3, 2), 2, "7-3-2", 1, 1),  # from the left
        ((8, 4, 2), 1, "8/4/2", 1, 1),
        ((8, 4, 2), 4, "8/(4/2)", 1, 1),
        ((2, 3, 4), 14, "2+3*4", 1, 1),
        ((2, 3, 4), 20, "2+3*4", 0, 1),
        ((2, 3, 4), 5, "２*４-３", 0, 0),  # full-width, superscript, Arabic-Indic digits
        ((2, 3, 4), 5, "²*4-3", 0, 0),
        ((2, 3, 4), 5, "٢*4-3", 0, 0),
        ((2, 3, 4), 5, "\x002*4-3", 0, 0),
        ((2, 3, 4), 5, "\ud8002*4-3", 0, 0),
        ((2, 3, 4), 5, "\n\t 2*4-3 \u3000", 1, 1),  # blanks of any kind around it
        ((2, 3, 4), 5, "<answer>2*4-3</answer>" + "x" * 1_000_000, 1, 1),
        ((2, 3, 4), 5, "2*4-3" + " " * 1_000_000, 1, 1),
        ((2, 3, 4), 5, "(" * 500_000 + "2*4-3" + ")" * 500_000, 0, 0),
        ((2, 3, 4), 5, "1" * 1_000_000, 0, 0),
        ((2, 3, 4), 5, "2+" * 500_000, 0, 0),
        ((2, 3, 4), 5, "<answer>" * 125_000, 0, 0),
        ((2, 3, 4), 5, "2 " * 500_000, 0, 0),
    ],
)
def test_countdown_verdicts(numbers, target, text, exact, form):
    started = time.thread_time()
    verdict = verify_countdown(numbers, target, 0.1, text)
    assert time.thread_time() - started < 1.0
    assert strict(verdict) == {"reward": 1.0 if exact else 0.1 * form, "exact": exact, "format": form}
    assert verify_countdown(numbers, target, 0.0, text)["reward"] == exact


OPERANDS = st.integers(1, 100).map(str)


def bracketed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda e, n: "(" * n + e + ")" * n, inner, st.integers(0, 1))


GAPS = st.sampled_from(["", "", " ", "  ", "\n"])
ATOMS = bracketed(OPERANDS)
PAIRS = st.builds(lambda a, g, o, h, b: f"{a}{g}{o}{h}{b}", ATOMS, GAPS, st.sampled_from("+-*/"), GAPS, ATOMS)
TRIPLES = st.one_of(
    st.builds(lambda a, g, o, h, b: f"{a}{g}{o}{h}{b}", ATOMS, GAPS, st.sampled_from("+-*/"), GAPS, bracketed(PAIRS)),
    st.builds(lambda a, g, o, h, b: f"{a}{g}{o}{h}{b}", bracketed(PAIRS), GAPS, st.sampled_from("+-*/"), GAPS, ATOMS),
)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(bracketed(TRIPLES))
def test_evaluation_is_pythons_in_exact_arithmetic(expression):
    numbers = tuple(map(int, re.findall("[0-9]+", expression)))
    expected = value_of(f"({expression})")
    assert evaluate(expression, numbers) == expected
    assert evaluate(expression, (numbers[2], numbers[0], numbers[1])) == expected  # the order of the numbers is free
    assert evaluate(expression, (*numbers[:2], numbers[2] + 1)) is None
    if expected is not None and expected.denominator == 1:
        verdict = verify_countdown(numbers, int(expected), 0.1, f"<answer>{expression}</answer>")
        assert strict(verdict) == {"reward": 1.0, "exact": 1.0, "format": 1.0}
        assert verify_countdown(numbers, int(expected) + 1, 0.1, expression)["exact"] == 0.0


# ---- verifiers are total --------------------------------------------------------------------------------------------

SOUP = ["<answer>", "</answer>", "<reasoning>", "<ANSWER>", *" \n()+-*/=.,", "**", *"01234", "12", "1234", "2431"]
SOUP += [SOLUTION, PUZZLE, "²", "×", "−", "３", "İ", "\x00", "\ud800", "row1:"]


def checked_sudoku(text: str) -> dict:
    verdict = verify_sudoku(PUZZLE, SOLUTION, "cell", text)
    assert set(verdict) == {"reward", "exact", "cell", "cell_published"}
    assert all(type(x) is float and 0 <= x <= 1 for x in verdict.values())
    assert (verdict["reward"] == 1) == (verdict["exact"] == 1)
    if verdict["reward"]:  # whatever is rewarded names the givens
        grid = parse_grid(text)
        assert all(p in ("0", g) for p, g in zip(PUZZLE, grid))
        assert verdict["exact"] == (grid == SOLUTION)
    return verdict


def checked_countdown(text: str) -> dict:
    verdict = verify_countdown((2, 3, 4), 5, 0.1, text)
    assert set(verdict) == {"reward", "exact", "format", "exact_published"}
    assert all(type(x) is float and 0 <= x <= 1 for x in verdict.values())
    assert verdict["reward"] == (1.0 if verdict["exact"] else 0.1 * verdict["format"])
    if verdict["format"]:  # whatever is rewarded is an expression for Python too, with the same value
        expression = answer_part(text).strip('$`*"\n\r\t\f\v .').translate(str.maketrans("×−÷xX[]{}", "*-/**()()"))
        assert (value_of(f"({expression})") == 5) == verdict["exact"]
        assert sorted(map(int, re.findall("[0-9]+", expression))) == [2, 3, 4]
    return verdict


CHECKED = [(checked_sudoku, SOLUTION), (checked_countdown, "2*4-3")]


def mutated(right: str, draw: random.Random) -> str:
    """A right answer with some characters replaced, removed, inserted or doubled."""
    text = list(f"<answer>{right}</answer>" if draw.random() < 0.5 else right)
    for _ in range(draw.randint(0, 3)):
        at = draw.randrange(len(text)) if text else 0
        kind = draw.randrange(4)
        if kind == 0 and text:
            text[at] = draw.choice(string.printable)
        elif kind == 1 and text:
            del text[at]
        elif kind == 2:
            text.insert(at, draw.choice(SOUP))
        elif text:
            text[at:at] = text[at : at + draw.randint(1, 8)]
    return "".join(text)


@pytest.mark.parametrize(("check", "right"), CHECKED, ids=["sudoku", "countdown"])
def test_100_000_texts(check, right):
    draw, slowest, rewarded = random.Random(0), 0.0, 0
    for n in range(100_000):
        if n % 4 < 2:
            text = mutated(right, draw)
        elif n % 4 == 2:
            text = "".join(draw.choices(SOUP, k=draw.randint(0, 30)))
        else:  # grammar-like: the tokens of an expression, or rows of digits
            tokens = "234+-*/() " if check is checked_countdown else "1234 \n"
            text = "".join(draw.choices(tokens, k=draw.randint(3, 24)))
        started = time.thread_time()
        verdict = check(text)
        slowest = max(slowest, time.thread_time() - started)
        rewarded += verdict["reward"] > 0
    assert slowest < 0.5  # CPU seconds; a call takes about 10 microseconds
    assert rewarded > 5000  # the texts are near enough to the right answer to test something


@pytest.mark.parametrize(("check", "right"), CHECKED, ids=["sudoku", "countdown"])
def test_arbitrary_text(check, right):
    pieces = st.one_of(st.text(), st.text(alphabet="0123456789+-*/() <>answer"), st.sampled_from([*SOUP, right]))

    @settings(max_examples=1500, deadline=None, database=None, derandomize=True)
    @given(st.lists(pieces, max_size=6).map("".join))
    def run(text):
        check(text)

    run()


@pytest.mark.parametrize("tag", ["answer", "ANSWER"])
def test_an_answer_after_a_letter_whose_lower_case_is_longer_still_counts(tag):
    countdown = Countdown().problem("test", 0, 0)
    assert countdown.verify(f"\u0130 <{tag}>{countdown.answer}</{tag}>")["exact"] == 1
    sudoku = Sudoku().problem("test", 0, 0)
    assert sudoku.verify(f"\u0130 <{tag}>{sudoku.answer}</{tag}>")["exact"] == 1


@pytest.mark.parametrize("settings", [{"right": 2.0}, {"largest": 0}, {"largest_target": 1}])
def test_countdown_refuses_settings_without_problems(settings):
    with pytest.raises(ValueError, match=r"right is a share|at least"):
        Countdown(**settings)


@pytest.mark.parametrize("task", [Sudoku, Countdown])
def test_a_file_without_rows_is_named(task, tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty"):
        task(path=str(tmp_path / "empty")).problem("test", 0, 0)
