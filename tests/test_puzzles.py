"""Where an answer to a puzzle stands: the formats of Countdown and Sudoku."""

from itertools import product

import pytest
from puzzle_cases import GRID, NUMBERS, OTHER, PUZZLE, RIGHT, ROWS, TARGET

from espo_lightning.tasks.countdown import evaluate, item_of, keyboard, reachable
from espo_lightning.tasks.countdown import verify as verify_countdown
from espo_lightning.tasks.published import arithmetic
from espo_lightning.tasks.sudoku import parse_grid
from espo_lightning.tasks.sudoku import verify as verify_sudoku

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
