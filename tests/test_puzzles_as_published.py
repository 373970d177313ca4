"""Answers to puzzles as the published code reads them."""

import re
from functools import partial

import pytest
from conftest import assert_linear
from puzzle_cases import GRID, NUMBERS, OTHER, PUZZLE, ROWS, TARGET

from espo_lightning.tasks.countdown import verify as verify_countdown
from espo_lightning.tasks.offered import offered
from espo_lightning.tasks.published import arithmetic, countdown_equals, sudoku_cells
from espo_lightning.tasks.sudoku import verify as verify_sudoku


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (GRID, 1),
        (f"<answer>{GRID}</answer>", 1),
        (f"<answer>{GRID[:15]}</answer>", 8 / 9),  # the last cell is given; the ninth empty cell is the 15th: see below
        (f"<answer>{GRID}9</answer>", 1),  # cut
        (f"<answer>{GRID}{OTHER}</answer>", 1),
        (GRID[:15], None),
        (f"{GRID}9", 1),
        (f"<answer>\n{' '.join(GRID)}\n</answer>", 1),  # blanks are dropped
        ("<answer>\n" + "\n".join(ROWS) + "\n</answer>", 1),
        (f"<answer>My grid:\n```\n{GRID}\n```</answer>", 1),
        (f"<answer></answer> {GRID}<|eot_id|> 1", 1),
        (f"<answer> </answer>\n{GRID}", 1),
        (f"<reasoning>...{GRID}</answer>", 1),
        (f"the grid {GRID} it is", 1),
        (f"<answer>{'1' * 16}</answer> no: <answer>{GRID}</answer>", 1 / 9),  # the first tag, where we read the last
        (f"<answer>{','.join(GRID)}</answer>", None),  # characters, not digits
        (f"<answer>{''.join('1' if p != '0' else s for p, s in zip(PUZZLE, GRID))}</answer>", 1),  # givens may be lost
        (f"<answer>{GRID}", 1),  # 16 digits anywhere
        (f"<answer>{GRID}<|endoftext|>", 1),
        ("", 0),
        ("no idea", 0),
        ("<answer></answer>", 0),
    ],
)
def test_cells_as_the_published_evaluation_counts_them(text, share):
    found = sudoku_cells(PUZZLE, GRID, text)
    if share is None:
        share = reference_cells(text)
    if text == f"<answer>{GRID[:15]}</answer>":
        share = reference_cells(text)
    assert found == pytest.approx(share)
    assert verify_sudoku(PUZZLE, GRID, "cell", text)["cell_published"] == found


def reference_cells(text: str) -> float:
    """By the words of the description: blanks dropped, filled up to 16 characters or cut."""
    inside = re.sub("</?answer>", "", text)
    answer = re.sub(r"\s", "", inside).ljust(16, "0")[:16]
    empty = [i for i in range(16) if PUZZLE[i] == "0"]
    return sum(answer[i] == GRID[i] for i in empty) / len(empty)


def test_strict_and_published_cells_part_on_length():
    for answer in (GRID[:15], GRID + "1", GRID + "1234"):
        verdict = verify_sudoku(PUZZLE, GRID, "cell", f"<answer>{answer}</answer>")
        assert (verdict["reward"], verdict["cell"]) == (0, 0)
        assert verdict["cell_published"] >= 8 / 9


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>\n\\boxed{93+30-100}\n</answer>", 1),
        ("\\boxed{93+30-100 = 23}", 1),
        ("<answer>93+30-100=23</answer>", 1),
        ("<answer>93 + 30 - 100 = 23</answer>", 1),
        ("<answer>93+30-100</answer> or <answer>1</answer>", 1),  # the first tag
        ("<answer>1</answer> or <answer>93+30-100</answer>", 0),
        ("\\boxed{1} \\boxed{93+30-100}", 1),  # the last box
        ("\\boxed{93+30-100} \\boxed{1}", 0),
        ("<answer>93+30-100</answer> \\boxed{1}", 0),  # a box before a tag
        ("$\\boxed 93+30-100$", 1),
        ("\\fbox{1} <answer>93+30-100</answer>", 1),
        ("So 93+30-100 = 23, as asked", 1),  # anywhere in a text without tags
        ("-100+93+30", 1),
        ("-(100-93-30)", 1),
        ("30+93--100", 0),
        ("93+30-100.", 1),
        ("93.0+30-100", 0),  # the digits are 93, 0, 30, 100
        ("9.3+30-100", 0),
        ("[93+30]-100", 0),
        ("93+30-100 or so", 0),
        ("93+30", 0),
        ("93+30-100+0", 0),
        ("93+30-100)", 0),
        ("", 0),
        ("<answer></answer>", 0),
        ("9**9**9", 0),
        ("93**30**100", 0),
        ("(" * 100 + "93+30-100" + ")" * 100, 0),
    ],
)
def test_countdown_as_the_published_evaluation_counts_it(text, right):
    assert countdown_equals(NUMBERS, TARGET, text) == bool(right)  # powers are bounded before they are computed
    assert verify_countdown(NUMBERS, TARGET, 0.1, text)["exact_published"] == right


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("2**3-4", (2, 3, 4), 4),
        ("7//2+1", (2, 7, 1), 4),
        ("2*-4/-3", (2, 3, 4), 8 / 3),
        ("2**(0-1)", (2, 0, 1), 0.5),
        ("8/(4/2)", (8, 4, 2), 4),
        ("2.5*4", (2, 5, 4), 10),
    ],
)
def test_all_of_pythons_arithmetic_counts_there(text, numbers, target):
    assert arithmetic(text) == pytest.approx(target)
    assert countdown_equals(numbers, target, text)
    assert verify_countdown(numbers, target, 0.1, text)["reward"] in (0, 1 if "(" in text and "*" not in text else 0)


def test_arithmetic_is_bounded_and_runs_nothing():
    for text in (
        "9**9**9",
        "2**99999",
        "((2**64)**64)**64",
        "1/0",
        "a",
        "f(1)",
        "(1)(2)",
        "1 if 1 else 2",
        "'1'",
        "1j",
        "",
        "0x",
    ):
        assert arithmetic(text) is None


LONG = ["<answer>", "</answer>", "<answer>1</answer> or ", "<answer>```", "```", "`", "**", "$", "(", "=", "1=", "1 "]
LONG += ["\\boxed{", "\\boxed ", "or \\boxed{1}", "\\frac{1}{2}", "row 1", "1234\n", "1. "]


@pytest.mark.parametrize("text", LONG)
def test_long_texts_are_linear(text):
    assert_linear(partial(verify_countdown, NUMBERS, TARGET, 0.1), text * (200_000 // len(text)))
    assert_linear(partial(verify_sudoku, PUZZLE, GRID, "cell"), text * (200_000 // len(text)))


def test_offered():
    def read(text: str) -> str | None:
        return offered(text, lambda answer: answer if answer in ("a", "b") else None)

    assert read("a") == read("<answer> `a`. </answer>") == read("\\boxed{a} \\boxed{ a }") == "a"
    assert read("\\boxed{a{b}c}") == "a{b}c"
    assert read("a, \\boxed{a}") == read("So: \\boxed{a}.") == read("```\na\n```") == "a"
    assert read("\\boxed{a} \\boxed{b}") is read("b, \\boxed{a}") is read("\\boxed{a} b") is read("```a``` b") is None
    assert read("") == ""
