"""All tasks: streams, splits, verifiers that are total."""

import os
import pickle
import random
import re
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_cases import PUZZLE, SOLUTION, value_of

import espo_lightning
from espo_lightning.tasks import Countdown, Sudoku
from espo_lightning.tasks.base import answer_part
from espo_lightning.tasks.countdown import verify as verify_countdown
from espo_lightning.tasks.sudoku import parse_grid
from espo_lightning.tasks.sudoku import verify as verify_sudoku

TASKS = [
    Sudoku(),
    Sudoku(empty=4, prompt="instruct", reward="exact", right=0.5, habit="random"),
    Countdown(),
    Countdown(largest=9, largest_target=30, prompt="instruct", format_reward=0.0, right=0.5),
]


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
