"""Sudoku: its problems and its verifier."""

import math
import random
import re
from functools import partial

import pytest
from conftest import assert_linear
from task_cases import DATA, PUZZLE, SOLUTION, assert_share, strict

from espo_lightning.tasks import Sudoku
from espo_lightning.tasks.sudoku import fill_rows, grids, is_solved, solutions
from espo_lightning.tasks.sudoku import verify as verify_sudoku

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
