"""No text is right for two different gold answers, nor by copying the question."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answer_cases import BOXES

from espo_lightning.tasks.answers import copies, locate
from espo_lightning.tasks.grammar import read
from espo_lightning.tasks.maths import MATH, verify_math
from espo_lightning.tasks.trees import exact

DATA = Path(__file__).parent / "data"


# ---- no text is right for two different answers -------------------------------------------------------------------


# fmt: off
GOLDS = (
    "7", "9", "12", "42", "-3", "3.5", "0.25", "1000", "x", "y", "2x+1", "x^2", "\\pi", "2\\pi", "\\sqrt{3}",
    "\\frac{1}{3}", "\\frac{3}{4}", "(3,4)", "(1,2)", "[2,5]", "(3,\\infty)", "\\{1,2\\}", "\\{3,4\\}", "1,2",
    "3,5,7", "\\text{even}", "\\text{odd}", "\\text{Monday}", "30^\\circ", "37\\%", "52_8", "y=-2x", "x=5",
    "x\\in[-2,7]", "1+2i", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "8\\text{cm}", "\\emptyset", "AB", "1:2", "x\\le3",
    "\\text{(C)}", "A", "1\\frac{1}{2}", "\\binom{5}{2}",
)
JOINERS = (
    " or ", ", or ", ", ", ",", " and ", "; ", ":", " | ", " \\vee ", " \\lor ", " \\cup ", " \\ne ", " \\approx ",
    "\n", " \\equiv ", " \\to ", " \\text{ or } ", " \\text{ and } ", " \\quad ", "\\ ", "\\,", " maybe ",
    " perhaps ", "~", "\n\n", " instead of ", " not ", " but ", " versus ", " vs. ", " to ", "\\text{ maybe }",
    "\\text{ if not }", " & ", "? ", ". ", " \\\\ ", " \\le ", " < ", "\\%", "' ", " \\mid ", "\\;", "...",
    " \\ldots ", " \\land ", " xor ", " then ", "", " ", " alternatively ", "\\text{ units } ", "}{", "$ or $",
    "$, $", "} or \\boxed{", "} \\boxed{", "}, \\boxed{", "}\\boxed{", "} maybe \\boxed{", " (or ", " (", " [",
    "\\text{", "\\mbox{", " \\text{(or }", " possibly ", " / maybe ", ", else ",
)
# fmt: on
CLOSING = {"\\text{": "}", "\\mbox{": "}", " (": ")", " (or ": ")", " [": "]", " \\text{(or }": "\\text{)}"}
FORMS = (
    "\\boxed{%s}",
    "The answer is %s.",
    "#### %s",
    "Answer: $%s$",
    "<answer>%s</answer>",
    "**Answer:** %s",
)


def test_no_text_is_right_for_one_of_two_joined_guesses():
    """3,000 pairs of different guesses over 66 joiners: none earns anything, for either gold answer."""
    draw, paid, judged = random.Random(0), [], 0
    while judged < 3000:
        guesses, joiner = draw.sample(GOLDS, 2), draw.choice(JOINERS)
        body = guesses[0] + joiner + guesses[1] + CLOSING.get(joiner, "")
        if body in GOLDS or exact(read(body) or ("words",)) is not None:  # 7 and 9 side by side are 79
            continue
        text, numbers = draw.choice(FORMS).replace("%s", body), draw.random() < 0.5
        judged += 1
        paid += [(text, gold, numbers) for gold in guesses if verify_math(text, gold, numbers)["reward"]]
    assert paid == []


def test_an_answer_is_right_for_one_gold_only():
    """Every gold answer as a completion, for every other. (A set and a list of the same values are one answer.)"""
    same = [{"\\{1,2\\}", "1,2"}, {"7", "x=7"}, {"(1,2)", "x\\in(1,2)"}]
    for gold in GOLDS:
        right = {other for other in GOLDS if verify_math(f"\\boxed{{{gold}}}", other)["reward"]}
        assert right == {gold} or right in same, gold


def test_equal_verdicts_from_any_thread():
    table = [row for found in BOXES.values() for row in found][::7]
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda row: verify_math(f"\\boxed{{{row[0]}}}", row[1])["reward"], table))
    assert verdicts == [row[2] for row in table]


# ---- copies -------------------------------------------------------------------------------------------------------


QUESTION = "What is $54 \\times 46$? "
QUESTION += "If $f(x) = \\frac{x^2-1}{x-1}$ and $a = \\sqrt{49} - 2^{3}$, note that $\\frac{1}{2} > 0.3$."


@pytest.mark.parametrize(
    ("answer", "gold", "copied"),
    [
        ("54 \\times 46", "2484", 1), ("54 \\cdot 46", "2484", 1), ("54*46", "2484", 1),
        ("(54 \\times 46)", "2484", 1), ("x = 54 \\times 46", "2484", 1), ("54\\times46", "2484", 1),
        ("\\sqrt{49} - 2^{3}", "-1", 1), ("2^{3}", "8", 1), ("\\dfrac{x^2-1}{x-1}", "x+1", 1), ("54 × 46", "2484", 1),
        ("2484", "2484", 0), ("54 \\times 46 = 2484", "2484", 0), ("4 \\times 46", "184", 0),
        ("\\frac{1}{2}", "0.5", 0), ("0.3", "\\frac{3}{10}", 0), ("x", "x", 0), ("54 \\times 46", "54 \\times 46", 0),
        ("1/2", "0.5", 0), ("46 \\times 54", "2484", 0), ("\\foo 54 \\times 46", "2484", 0), ("", "1", 0),
    ],
)  # fmt: skip
def test_copies_of_the_question(answer, gold, copied):
    text = f"\\boxed{{{answer}}}"
    assert copies(answer, QUESTION, gold) == bool(copied)
    plain, strict = (verify_math(text, gold, question=QUESTION, copied=worth) for worth in (1.0, 0.0))
    assert plain["copied"] == strict["copied"] == copied
    assert plain["exact"] == strict["exact"] == plain["reward"]
    assert strict["reward"] == (0.0 if copied else plain["reward"])


def test_always_copying_earns_nothing():
    """The last formula of every problem of the MATH fixture, as a policy that reads nothing would answer."""
    task = MATH(path=str(DATA / "math500_84.jsonl"), held_out=1.0, copied=0.0)
    paid, paid_before = [], []
    for row in task.rows("test"):
        formulas = re.findall(r"\$([^$]+)\$", row["problem"])
        if not formulas:
            continue
        gold = row.get("answer")
        text = f"\\boxed{{{formulas[-1].strip(' .,?')}}}"
        paid += [text] if verify_math(text, gold, question=row["problem"], copied=0.0)["reward"] else []
        paid_before += [text] if verify_math(text, gold)["reward"] else []
    assert len(paid_before) == 7
    assert paid == ["\\boxed{\\frac{3}{20}}"]  # for 0.15: a value, with nothing left to work out


def test_where_the_answer_stands():
    assert locate("so \\boxed{7}", False) == "7"
    assert locate("so it is 7", False) is None
    assert locate("so it is 7", True) == "7"
    assert locate("\\boxed{7} or \\boxed{8}", False) == "7, 8"
