"""What is wrong with a row of data is said before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from data_cases import GRID, PROGRAMS, PUZZLE, folder_fixture, gsm8k, lines, policy_fixture, says_a, start  # noqa: F401

from espo_lightning import Countdown, Problem, Sudoku, Task, load_policy
from espo_lightning.tasks import GSM8K, MATH, MBPP, AceCode, Weighted
from espo_lightning.tasks.files import BadRows
from espo_lightning.training.data_check import check_data


def refused(program, folder, flags, tmp_path, capsys, *more) -> str:
    """The message of a program that refuses its data: exit code 2, no traceback, nothing written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        start(program, folder, flags, *more)
    printed = capsys.readouterr().err
    assert error.value.code == 2
    assert "Traceback" not in printed
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file()] == []
    return printed


# ---- what is wrong with a row ---------------------------------------------------------------------------------------


GOOD_MBPP = {"text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}
BAD_ROWS = [
    (GSM8K, gsm8k(1, question=None), "has null as 'question', which GSM8K needs"),
    (GSM8K, gsm8k(1, question=""), "has an empty 'question'"),
    (GSM8K, gsm8k(1, question="  \n"), "has an empty 'question'"),
    (GSM8K, gsm8k(1, question=["x"]), "has a column 'question' that is a list, not a text"),
    (GSM8K, gsm8k(1, answer=2), "has a column 'answer' that is an int, not a text"),
    (GSM8K, gsm8k(1, answer="It is 2."), "has an 'answer' without a number after '####'"),
    (GSM8K, gsm8k(1, answer="It is 2. ####"), "has an 'answer' without a number after '####'"),
    (GSM8K, {"problem": "?", "solution": "!"}, "has no 'question', which GSM8K needs, only 'problem', 'solution'"),
    (GSM8K, {}, "has no 'question', which GSM8K needs, only nothing"),
    (GSM8K, '{"question": "?", ', "is not JSON"),
    (GSM8K, "[1, 2]", "is a list, a whole array"),
    (GSM8K, '"text"', "is a str, no object"),
    (MATH, {"problem": "?", "solution": "It is 2."}, "has no 'answer', and no box in its 'solution'"),
    (MATH, {"problem": "?", "solution": "It is \\boxed{}."}, "has no 'answer', and no box"),
    (MATH, {"problem": "?", "solution": None, "answer": "2"}, "has null as 'solution'"),
    (MBPP, {**GOOD_MBPP, "text": None}, "has null as 'text', which MBPP needs"),
    (MBPP, {k: v for k, v in GOOD_MBPP.items() if k != "text"}, "has no 'text' or 'prompt', which MBPP needs"),
    (MBPP, {**GOOD_MBPP, "test_list": []}, "has a column 'test_list' that is no list of texts: []"),
    (MBPP, {**GOOD_MBPP, "test_list": "assert f(1) == 2"}, "has a column 'test_list' that is no list of texts"),
    (MBPP, {**GOOD_MBPP, "test_list": ["assert f(1) =="]}, "makes no problem of MBPP: SyntaxError"),
    (AceCode, {"question": "?", "test_cases": [None]}, "has a column 'test_cases' that is no list of texts"),
    (Countdown, {"nums": [1, 2, 3], "target": 6}, "has no 'input', which Countdown needs, only 'nums', 'target'"),
    (Countdown, {"input": "1,2,x", "output": "6"}, "has an 'input' that is no list of numbers such as"),
    (Countdown, {"input": "1,2,3", "output": "six"}, "has an 'output' that is no whole number"),
    (Countdown, {"input": "1,2,3", "output": None}, "has null as 'output'"),
    (Countdown, {"input": "1,2,3", "output": "77"}, "has an 'output' that no expression of its numbers equals"),
]


def task_of(kind, path: Path) -> Task:
    return kind(path=str(path)) if kind in (Sudoku, Countdown) else kind(path=str(path), held_out=0.0)


@pytest.mark.parametrize(("kind", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(kind, row, reason, tmp_path, policy):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + lines(row))
    with pytest.raises(ValueError) as error:
        check_data(task_of(kind, path), policy, ("train",))
    assert f"{path}, line 2, {reason}" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "place", "reason"),
    [
        (["0401002010030310"], "line 2", "has 1 values for 2 columns"),
        ([f"{PUZZLE},{GRID},x"], "line 2", "has 3 values for 2 columns"),
        (
            [f"{PUZZLE},{GRID}", f"0401002010030311,{GRID}"],
            "line 3",
            "whose givens contradict its 'Solution', first in row 4",
        ),
        ([f"{PUZZLE},{GRID[:15]}1"], "line 2", "has a 'Solution' that is no solved grid"),
        ([f"{PUZZLE},{GRID[:15]}"], "line 2", "has a 'Solution' that is no solved grid"),
        ([f"9{PUZZLE[1:]},{GRID}"], "line 2", "has a 'Puzzle' that is no 16 digits from 0 to 4"),
        ([f"1{PUZZLE},{GRID}"], "line 2", "has a 'Puzzle' that is no 16 digits from 0 to 4"),
        ([f"4.01002E+14,{GRID}"], "line 2", "has a 'Puzzle' that is no 16 digits from 0 to 4"),
        ([f",{GRID}"], "line 2", "has an empty 'Puzzle'"),
        ([f"{'0' * 16},{GRID}"], "line 2", "has a 'Puzzle' without givens"),
    ],
)
def test_bad_rows_of_a_puzzle_file(rows, place, reason, tmp_path, policy):
    path = tmp_path / "sudoku.csv"
    path.write_text("\n".join(["Puzzle,Solution", *rows]) + "\n")
    with pytest.raises(ValueError) as error:
        check_data(Sudoku(path=str(path)), policy, ("test",))
    assert str(error.value).startswith(f"{path}, {place}, ")
    assert reason in str(error.value)
    with pytest.raises(ValueError, match=place):  # from Python too
        Sudoku(path=str(path)).problem("test", 0, 0)


def test_other_columns_of_a_puzzle_file_are_named(tmp_path):
    (tmp_path / "other.csv").write_text(f"quizzes;solutions\n{PUZZLE};{GRID}\n")
    with pytest.raises(ValueError, match="has no 'Puzzle', which Sudoku needs, only 'quizzes;solutions'"):
        Sudoku(path=str(tmp_path / "other.csv")).problem("test", 0, 0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_ten_bad_rows_of_a_file_are_one_message_before_anything_is_written(
    program, folder, tmp_path, monkeypatch, capsys
):
    """Of each kind: no JSON, no column, no gold, a prompt that is too long; in the order of the file."""
    monkeypatch.chdir(tmp_path)
    rows = [gsm8k(n) for n in range(40)]
    for n in range(8, 20):
        rows[n] = gsm8k(n, answer="none")
    rows[9], rows[11] = "{", gsm8k(11, question=None)
    Path("bad.jsonl").write_text(lines(*rows))
    flags = "--TASK=GSM8K --TASK.path=bad.jsonl --TASK.held_out=" + ("1.0" if program == "evaluate" else "0.25")
    printed = refused(program, folder, flags, tmp_path, capsys, *["--model.length=64"] * (program == "sft"))
    assert "12 rows cannot be used:" in printed
    places = [line.split(", ")[1] for line in printed.splitlines() if line.startswith("  bad.jsonl")]
    assert places == [f"line {n + 1}" for n in range(8, 18)]
    assert "line 10, is not JSON" in printed
    assert "line 12, has null as 'question'" in printed
    assert "and 2 more" in printed


@pytest.mark.parametrize("program", ["fit", "sft"])
def test_prompts_longer_than_the_limit_are_found_down_the_file(program, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Number {n}?", "answer": "aaaa"} for n in range(600)]
    rows[577]["prompt"] = "a" * 600
    rows[33]["prompt"] = [{"role": "user", "content": "b" * 700}]
    Path("rows.jsonl").write_text(lines(*rows))
    flags = "--TASK=Rows --TASK.path=rows.jsonl --TASK.verifier=test_data.says_a"
    printed = refused(program, folder, flags, tmp_path, capsys)
    assert "rows.jsonl, line 34, a prompt has 70" in printed
    assert ("rows.jsonl, line 578, a prompt has 60" in printed) == (program == "fit")  # a test row
    assert "more than max_prompt_length=512" in printed


def test_answers_that_do_not_fit_on_the_canvas(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = ["aaaa", "a" * 16, "a" * 17, None, " "]
    rows = [{"prompt": f"Number {n}?", "answer": answer} for n, answer in enumerate(answers)]
    Path("rows.jsonl").write_text(lines(*rows, {"prompt": "?", "completion": "a"}))
    flags = "--TASK=Rows --TASK.path=rows.jsonl --TASK.held_out=0 --TASK.verifier=test_data.says_a"
    printed = refused("sft", folder, flags, tmp_path, capsys)
    assert "4 rows cannot be used" in printed
    assert "line 3, an answer has 17 tokens, more than length=16" in printed
    assert [f"line {n}, has no 'answer' to learn from" in printed for n in (4, 5, 6)] == [True] * 3
    Path("ok.jsonl").write_text(lines(*rows[:2]))
    start("sft", folder, flags.replace("rows.jsonl", "ok.jsonl"))


def test_a_task_without_demonstrations_teaches_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("ace.jsonl").write_text(lines({"question": "Add.", "test_cases": ["assert f(1) == 2"]}))
    flags = "--TASK=AceCode --TASK.path=ace.jsonl --TASK.held_out=0 --TASK.allow_unsafe=true"
    assert "has no answer to learn from" in refused("sft", folder, flags, tmp_path, capsys)


@pytest.mark.parametrize("program", ["fit", "evaluate"])
def test_a_chat_template_that_refuses_a_role_is_told_before_anything(program, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    strict = load_policy(folder)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    strict.tokenizer.chat_template = refuse + strict.tokenizer.chat_template
    strict.save("strict")
    rows = [{"prompt": f"Number {n}?"} for n in range(300)]
    rows[270] = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    Path("rows.jsonl").write_text(lines(*rows))
    flags = "--TASK=Rows --TASK.path=rows.jsonl --TASK.verifier=test_data.says_a --TASK.held_out=0.1"
    printed = refused(program, tmp_path / "strict", flags, tmp_path, capsys)
    assert "rows.jsonl, line 271, is refused by the policy's chat template: System role not supported" in printed


def test_the_first_problem_of_a_drawn_task_is_tried(policy):
    @dataclass(frozen=True)
    class Long(Task):
        prompt: object

        def problem(self, split, seed, index):
            return Problem(self.prompt, says_a, "")

    check_data(Long("short"), policy, ("train", "test"), max_prompt_length=20)
    with pytest.raises(ValueError, match=r"train problem 0, a prompt has .* tokens, more than max_prompt_length=20"):
        check_data(Long("x" * 30), policy, ("train",), max_prompt_length=20)
    with pytest.raises(ValueError, match="train problem 0, has a 'prompt' in parts"):
        check_data(Long([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]), policy, ("train",))


def test_a_finite_task_of_a_user_is_looked_at_as_a_whole(policy):
    class Finite(Task):
        def size(self, split):
            return 30

        def problem(self, split, seed, index):
            if index % 10 == 7:
                raise KeyError(index)
            return Problem(f"{split} {index}", says_a, "a")

    for task in (Finite(), Weighted(Finite())):
        with pytest.raises(BadRows, match=r"train problem 7, makes no problem of .*: KeyError: 7") as error:
            check_data(task, policy, ("train", "test"))
        places = [f"{split} problem {i}" for split in ("train", "test") for i in (7, 17, 27)]
        assert [place for place, _ in error.value.faults] == places
