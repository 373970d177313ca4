"""Countdown: its problems and its verifier."""

import json
import random
import re
import time
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_cases import DATA, assert_share, strict, value_of

from espo_lightning.tasks import Countdown
from espo_lightning.tasks.countdown import evaluate, shapes
from espo_lightning.tasks.countdown import verify as verify_countdown


def expressions(numbers):
    return [shape.format(*numbers) for shape in shapes(len(numbers))]


# ---- Countdown: problems --------------------------------------------------------------------------------------------


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
