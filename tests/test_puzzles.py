"""Answers to puzzles as models really write them, hedges, and the published evaluation's reading beside ours."""

import re
from functools import partial
from itertools import product

import pytest
from conftest import assert_linear

from espo_lightning.tasks.countdown import evaluate, item_of, keyboard, reachable
from espo_lightning.tasks.countdown import verify as verify_countdown
from espo_lightning.tasks.offered import offered
from espo_lightning.tasks.published import arithmetic, countdown_equals, sudoku_cells
from espo_lightning.tasks.sudoku import grids, parse_grid
from espo_lightning.tasks.sudoku import verify as verify_sudoku

NUMBERS, TARGET, RIGHT = (30, 100, 93), 23, "93+30-100"
PUZZLE, GRID = "0401002010030310", "2431312412434312"
OTHER = next(grid for grid in grids() if grid != GRID)
ROWS = [GRID[i : i + 4] for i in range(0, 16, 4)]
SPACED = [" ".join(row) for row in ROWS]


def exact(text: str, numbers=NUMBERS, target=TARGET) -> float:
    return verify_countdown(numbers, target, 0.1, text)["exact"]


def solved(text: str) -> float:
    return verify_sudoku(PUZZLE, GRID, "exact", text)["reward"]


# ---- Countdown: the formats -----------------------------------------------------------------------------------------

WRAPPERS = [
    "{}",
    "<answer>{}</answer>",
    "<answer>\n\\boxed{{{}}}\n</answer>",  # 295 of 296 right answers of LLaDA look like this
    "\\boxed{{{}}}",
    "So it is \\boxed{{{}}}.",
    "<reasoning>30+93+100=223, no</reasoning>\n<answer>\n\\fbox{{{}}}\n</answer>",
    "<answer>$\\boxed {{{}}}$</answer>",
    "{}.",
    "`{}`",
    "``{}``",
    "```\n{}\n```",
    "```python\n{}\n```",
    "~~~\n{}\n~~~",
    "Here it is:\n```text\n{}\n```\nDone.",
    "${}$",
    "$${}$$",
    "\\({}\\)",
    "\\[{}\\]",
    "**{}**",
    '"{}"',
    "<answer>`{}`.</answer>",
    "<answer>**${}$**</answer>",
    "Expression: {}",
    "<answer>Answer: {}</answer>",
    "\\boxed{{{0}}} and again \\boxed{{{0}}}",
    "<answer>{0}</answer> or <answer>{0}</answer>",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_expression_is_read_wherever_models_put_it(wrapper):
    assert exact(wrapper.format(RIGHT)) == 1
    wrong = verify_countdown(NUMBERS, TARGET, 0.1, wrapper.format("93-30+100"))
    assert (wrong["exact"], wrong["format"], wrong["reward"]) == (0, 1, 0.1)


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("3 \\times 7 + 2", (3, 7, 2), 23),
        ("3\\cdot7+2", (3, 7, 2), 23),
        ("3 \\ast 7+2", (3, 7, 2), 23),
        ("8 \\div 2 + 3", (8, 2, 3), 7),
        ("\\frac{8}{2} + 3", (8, 2, 3), 7),
        ("\\dfrac{8 + 2}{5}", (8, 2, 5), 2),
        ("\\frac{\\frac{8}{2}}{4}", (8, 2, 4), 1),
        ("\\left(8 - 2\\right) \\times 3", (8, 2, 3), 18),
        ("(8\\,-\\;2)\\ \\times\\quad 3", (8, 2, 3), 18),
        ("\\{8-2\\} \\cdot 3", (8, 2, 3), 18),
        ("[8-2]*3", (8, 2, 3), 18),
        ("{8-2}*3", (8, 2, 3), 18),
        ("[(8)-{2}]*3", (8, 2, 3), 18),
        ("（8－2）＊3", (8, 2, 3), 18),
        ("［8－2］×3", (8, 2, 3), 18),
        ("3＋8／2", (8, 2, 3), 7),
        ("3 x 7 + 2", (3, 7, 2), 23),
        ("3X7+2", (3, 7, 2), 23),
        ("(3)x(7)+2", (3, 7, 2), 23),
        ("3 · 7 + 2", (3, 7, 2), 23),
        ("3∗7 + 2", (3, 7, 2), 23),
        ("8 – 2 – 3", (8, 2, 3), 3),
        ("8 — 2 ‑ 3", (8, 2, 3), 3),
        ("8 ∕ 2 + 3", (8, 2, 3), 7),
    ],
)
def test_notations_of_print_and_latex(text, numbers, target):
    assert evaluate(text, numbers) == target
    assert exact(f"<answer>\\boxed{{{text}}}</answer>", numbers, target) == 1
    assert exact(text, numbers, target + 1) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[93+30)-100",  # brackets that do not match
        "(93+30]-100",
        "93+30-100]",
        "93+30-100..",
        "93+30-100...",
        "93+30-100,",
        "93+30-100 = 23",
        "x93+30-100",
        "93+30-100x",
        "93 plus 30 minus 100",
        "\\boxed{93+30-100",  # a box that never closes holds nothing
        "\\foo{93}+30-100",
        "93+30-１００",  # digits are ASCII only
        "\\sqrt{93}+30-100",
    ],
)
def test_what_is_still_no_expression(text):
    assert verify_countdown(NUMBERS, TARGET, 0.1, text)["reward"] == 0


@pytest.mark.parametrize(
    "text", ["-3+2*4", "+2*4-3", "2*4--3", "2*4+-3", "2*(4)-(-3)", "(-3)+2*4", "2*-4/-3", "−3+2×4"]
)
def test_one_rule_for_signs(text):
    """A sign is no operation, and -3 none of the numbers: no value, wherever it stands. Published, it has one."""
    numbers = (2, 3, 4)
    assert evaluate(text, numbers) is None
    value = arithmetic(text.replace("−", "-").replace("×", "*"))
    verdict = verify_countdown(numbers, int(value), 0.1, text) if value.denominator == 1 else {"reward": 0.0}
    assert verdict["reward"] == 0


WRONG = "93-30+100"


@pytest.mark.parametrize("order", [(RIGHT, WRONG), (WRONG, RIGHT)])
@pytest.mark.parametrize(
    "joined",
    [
        "{} or {}",
        "{}, {}",
        "{}\n{}",
        "{} = {}",
        "<answer>{} or {}</answer>",
        "<answer>{}</answer> or <answer>{}</answer>",
        "<answer>{}</answer>, <answer>{}</answer>",
        "<answer>{}</answer> and\n<answer>{}</answer>",
        "\\boxed{{{}}} or \\boxed{{{}}}",
        "\\boxed{{{}}}, \\boxed{{{}}}",
        "<answer>\\boxed{{{}}} \\boxed{{{}}}</answer>",
        "<answer>{} or \\boxed{{{}}}</answer>",
        "<answer>\\boxed{{{}}} or {}</answer>",
        "```\n{}\n```\nor\n```\n{}\n```",
        "`{}` or `{}`",
        "\\boxed{{{} \\text{{ or }} {}}}",
        "<answer>{}, \\boxed{{{}}}</answer>",
        "\\boxed{{{}}} / {}",
        "```\n{}\n```\n{}",
    ],
)
def test_two_expressions_are_a_hedge(joined, order):
    assert verify_countdown(NUMBERS, TARGET, 0.1, joined.format(*order))["reward"] == 0


def test_a_later_tag_corrects_an_earlier_one():
    assert exact(f"<answer>{WRONG}</answer> No, wait. <answer>{RIGHT}</answer>") == 1
    assert exact(f"<answer>{RIGHT}</answer> No, wait. <answer>{WRONG}</answer>") == 0


def test_keyboard_leaves_plain_expressions_alone():
    for text in ("93+30-100", " (8 - 2) * 3 ", "8/2+3"):
        assert keyboard(text) == text


def test_reachable_is_what_expressions_equal():
    for numbers in ((1, 2, 3), (4, 4, 7), (2, 3, 5, 7)):
        values = reachable(tuple(map(evaluate, map(str, numbers), [(n,) for n in numbers])))
        for signs in product("+-*/", repeat=len(numbers) - 1):
            flat = str(numbers[0]) + "".join(s + str(n) for s, n in zip(signs, numbers[1:]))
            assert evaluate(flat, numbers) in values
    assert item_of({"input": "2,3,5,7", "output": 210}) == ((2, 3, 5, 7), 210)
    assert item_of({"input": " 1, 1", "output": "0"}) == ((1, 1), 0)


# ---- Sudoku: the formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"Row {i}: {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"Row {i}: {row}" for i, row in enumerate(ROWS, 1)),
        "\n".join(f"row {i} {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"**Row {i}:** {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"- Row {i}: {', '.join(row)}" for i, row in enumerate(ROWS, 1)),
        "\n".join(f"Line #{i} = {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"R{i}: {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"{i}. {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"{i}) {row}" for i, row in enumerate(ROWS, 1)),
        "\n".join(f"({i}) {row}" for i, row in enumerate(SPACED, 1)),
        "\n".join(f"{i}: {row}" for i, row in enumerate(ROWS, 1)),
        "Row 1: 2 4 3 1, Row 2: 3 1 2 4, Row 3: 1 2 4 3, Row 4: 4 3 1 2",
        "Row 1: 2431; Row 2: 3124; Row 3: 1243; Row 4: 4312",
        "The 4x4 grid:\n" + "\n".join(SPACED),
        "The solved grid in 3 steps:\n" + "\n".join(ROWS),
        "\n".join(f"| {' | '.join(row)} |" for row in ROWS),
        "2 4 | 3 1\n3 1 | 2 4\n----+----\n1 2 | 4 3\n4 3 | 1 2",
        "[[2, 4, 3, 1], [3, 1, 2, 4], [1, 2, 4, 3], [4, 3, 1, 2]]",
        "\\begin{bmatrix} 2 & 4 & 3 & 1 \\\\ 3 & 1 & 2 & 4 \\\\ 1 & 2 & 4 & 3 \\\\ 4 & 3 & 1 & 2 \\end{bmatrix}",
        f"\\boxed{{{GRID}}}",
        f"Row 1 needs 2 and 4, so it is 2431; in the end \\boxed{{{GRID}}}",
        f"```\n{GRID}\n```",
        "First 12 cells are easy.\n```\n" + "\n".join(SPACED) + "\n```\nAll 16 are filled.",
        f"`{GRID}`",
        f"**{GRID}**.",
        f"{GRID[:8]}\n{GRID[8:]}",
    ],
)
def test_a_grid_is_read_in_any_layout(text):
    assert parse_grid(text) == GRID
    assert solved(text) == solved(f"<answer>\n{text}\n</answer>") == 1


OTHER_ROWS = [OTHER[i : i + 4] for i in range(0, 16, 4)]


@pytest.mark.parametrize("order", [(GRID, OTHER), (OTHER, GRID)])
@pytest.mark.parametrize("first", ["{}", "rows", "spaced", "\\boxed{{{}}}", "labelled"])
@pytest.mark.parametrize("second", ["{}", "rows", "spaced", "\\boxed{{{}}}"])
@pytest.mark.parametrize("joiner", [" or ", "\nor\n", ", ", "\n\n", " / "])
def test_two_grids_are_a_hedge(order, first, second, joiner):
    def shown(form: str, grid: str) -> str:
        rows = [grid[i : i + 4] for i in range(0, 16, 4)]
        if form == "rows":
            return "\n".join(rows)
        if form == "labelled":
            return "\n".join(f"Row {i}: {row}" for i, row in enumerate(rows, 1))
        return "\n".join(map(" ".join, rows)) if form == "spaced" else form.format(grid)

    text = joiner.join([shown(first, order[0]), shown(second, order[1])])
    assert verify_sudoku(PUZZLE, GRID, "cell", text)["reward"] == 0
    assert verify_sudoku(PUZZLE, GRID, "cell", f"<answer>{text}</answer>")["reward"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "\n".join([*SPACED, "4 3 2 1"]),
        "\n".join(ROWS) + "\nor the last row is 4321",
        "\n".join(ROWS) + "\nor the last row is 4 3 2 1",
        "\n".join(f"{i}. {row}" for i, row in enumerate(SPACED, 2)),  # another numbering: five digits a row
        "\n".join(f"{i}. {row}" for i, row in enumerate(reversed(SPACED))),
        f"<answer>{GRID}</answer> or <answer>{OTHER}</answer>",
        f"<answer>{OTHER}</answer>, <answer>{GRID}</answer>",
        f"{GRID[:15]}",
        f"{GRID}1",
        "Row 1: 2431, Row 2: 3124, Row 3: 1243",
    ],
)
def test_what_is_no_grid(text):
    assert parse_grid(text) is None


# ---- the published reading ------------------------------------------------------------------------------------------


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
