"""Rows that are fine: columns, chat messages, the same problem in both splits."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from data_cases import GRID, PUZZLE, folder_fixture, gsm8k, lines, policy_fixture, says_a, start  # noqa: F401

from espo_lightning import Countdown, Sudoku
from espo_lightning.tasks import GSM8K, MATH, MBPP, AceCode, HumanEval, Rows
from espo_lightning.tasks.files import read
from espo_lightning.tasks.messages import prompt_of
from espo_lightning.training.data_check import check_data, shared_problems

DATA = Path(__file__).parent / "data"


# ---- what is wrong with a row ---------------------------------------------------------------------------------------

MESSAGE = {"role": "user", "content": "Hi"}


# ---- what is fine ---------------------------------------------------------------------------------------------------


def test_byte_order_marks_are_skipped(tmp_path):
    (tmp_path / "s.csv").write_text(f"Puzzle,Solution\n{PUZZLE},{GRID}\n", encoding="utf-8-sig")
    problem = Sudoku(path=str(tmp_path / "s.csv")).problem("test", 0, 0)
    assert (problem.prompt, problem.answer) == (PUZZLE, GRID)
    (tmp_path / "g.jsonl").write_text(lines(gsm8k(1)), encoding="utf-8-sig")
    assert GSM8K(path=str(tmp_path / "g.jsonl"), held_out=0).problem("train", 0, 0).prompt.startswith("What is 1 + 1?")


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.csv.gz", "rows"])
def test_the_formats_hold_the_same_rows(name, tmp_path):
    rows = [gsm8k(n) for n in range(3)]
    path = tmp_path / name
    if ".parquet" in name:
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        separator = {"csv": ",", "tsv": "\t"}.get(name.split(".")[-1 - name.endswith(".gz")])
        quoted = [separator.join(f'"{value}"' for value in row.values()) for row in rows] if separator else []
        text = "\n".join([separator.join(rows[0]), *quoted]) + "\n" if separator else lines(*rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert [line.row for line in read(str(path))] == rows
    task = GSM8K(path=str(path), held_out=0)
    assert sorted(task.problem("train", 0, i).verify.keywords["gold"] for i in range(3)) == ["1", "2", "3"]


def test_a_parquet_file_keeps_lists_and_messages(tmp_path):
    rows = [{"prompt": [MESSAGE], "answer": "Ho", "tests": ["a", "b"]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    problem = Rows(path=str(tmp_path / "rows.parquet"), held_out=0, verifier=says_a).problem("train", 0, 0)
    assert (problem.prompt, problem.verify.args[0]["tests"]) == ([MESSAGE], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(lines(*[gsm8k(n) for n in range(99)]).encode())[:-40], "is cut off or damaged"),
        ("not.jsonl.gz", b'{"question": "?"}', "cannot be read: Not a gzipped file"),
        ("latin.jsonl", "{'question': 'Où?'}".encode("latin-1"), "is no text in UTF-8"),
        ("wide.csv", "Puzzle,Solution\n".encode("utf-16"), "is no text in UTF-8"),
        ("rows.xlsx", b"PK", "is a .xlsx file, which is not read: write it as JSONL, CSV or Parquet"),
        ("rows.arrow", b"ARROW1", "is a .arrow file, which is not read"),
        ("rows.parquet", b"PAR1 no", "is no Parquet file"),
        ("rows.csv", b'question,answer\n"\0,' + b"x" * 200_000, "is no CSV file"),
        ("array.json", b'[\n {"question": "?", "answer": "#### 1"}\n]\n', "is one JSON array over several lines"),
        ("empty.jsonl", b"", "no 'train' rows"),
        ("empty.csv", b"", "no 'train' rows"),
        ("header.csv", b"question,answer\n", "no 'train' rows"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        GSM8K(path=str(tmp_path / name), held_out=0).problem("train", 0, 0)
    assert name in str(error.value)


@pytest.mark.parametrize("held_out", [1.5, -0.1, float("nan"), float("inf")])
def test_held_out_is_a_share(held_out):
    for make in (GSM8K, MATH, HumanEval, MBPP, AceCode, lambda **x: Rows(verifier=says_a, **x)):
        with pytest.raises(ValueError, match="held_out is a share of the rows between 0 and 1, got"):
            make(path="rows.jsonl", held_out=held_out)


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": 0, "solution": "\\boxed{5}"}, "0"),
        ({"answer": 0.5, "solution": "\\boxed{5}"}, "0.5"),
        ({"answer": "", "solution": "\\boxed{5}"}, "5"),
        ({"answer": None, "solution": "\\boxed{5}"}, "5"),
        ({"solution": "\\boxed{4}, no: \\boxed{5}"}, "5"),
        ({"solution": "So the answer is $\\boxed 2$."}, "2"),
        ({"solution": "So the answer is $\\boxed2$"}, "2"),
        ({"solution": "So the answer is $\\fbox 2$"}, "2"),
    ],
)
def test_the_gold_answer_of_a_math_row(row, gold, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines({"problem": "?", **row}))
    problem = MATH(path=str(tmp_path / "rows.jsonl"), held_out=0).problem("train", 0, 0)
    assert problem.verify.keywords["gold"] == gold


def test_published_rows_have_no_faults(policy):
    for kind, name in [(GSM8K, "gsm8k_60"), (MATH, "math500_84"), (HumanEval, "humaneval_40"), (MBPP, "mbpp_60")]:
        task = kind(path=str(DATA / f"{name}.jsonl"), held_out=0.5)
        check_data(task, policy, ("train", "test"), max_prompt_length=4000, answer_length=4000)
    for task in (Sudoku(path=str(DATA / "sudoku_12.csv")), Countdown(path=str(DATA / "countdown_12.jsonl"))):
        check_data(task, policy, ("test",), max_prompt_length=100, answer_length=100)


# ---- chat messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", "Hi"),
        ([MESSAGE], [MESSAGE]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [MESSAGE]),
        ([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], [MESSAGE]),
        ([{"role": "user", "content": [{"text": "a"}, "b"]}], [{"role": "user", "content": "a\nb"}]),
        ([{"role": "user", "content": "Hi", "name": "Ann", "tool_calls": None}], [MESSAGE]),
        ([{"role": "system", "content": ""}, MESSAGE], [{"role": "system", "content": ""}, MESSAGE]),
        ([MESSAGE, {"role": "assistant", "content": "Ho"}, MESSAGE],) * 2,
    ],
)
def test_usual_chat_messages(prompt, expected):
    assert prompt_of(prompt) == expected
    assert prompt_of(expected) == expected


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "has a 'prompt' that is null"),
        (7, "has a 'prompt' that is an int"),
        ({"messages": [MESSAGE]}, "has a 'prompt' that is a dict"),
        ("", "has an empty 'prompt'"),
        ([], "has a 'prompt' without a message"),
        (["Hi"], "whose message 1 is a str, not an object"),
        ([{"from": "human", "value": "Hi"}], "has no 'role', only 'from', 'value' (ShareGPT's names"),
        ([{"role": "user"}], "whose message 1 has no 'content', only 'role'"),
        ([{"role": "user", "content": None}], "has null as its 'content', not a text"),
        ([{"role": "user", "content": 3}], "has an int as its 'content'"),
        ([{"role": "user", "content": " "}], "message 1 has an empty 'content'"),
        ([{"role": "user", "content": []}], "message 1 has an empty 'content'"),
        ([MESSAGE, {"role": "human", "content": "Hi"}], "message 2 has the role 'human', not one of system"),
        ([{"role": "user", "content": [IMAGE]}], "has a part of the type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a part without 'text', only 'type'"),
        ([{"role": "user", "content": [None]}], "has a part of its content that is null"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}, MESSAGE], "carries 'tool_calls'"),
        ([MESSAGE, {"role": "assistant", "content": "Ho"}], "ends with a message of the assistant"),
    ],
)
def test_other_messages_are_refused_by_name(prompt, reason, tmp_path):
    with pytest.raises(ValueError) as error:
        prompt_of(prompt)
    assert reason in str(error.value)
    (tmp_path / "rows.jsonl").write_text(lines({"prompt": prompt}))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1, has a"):
        Rows(path=str(tmp_path / "rows.jsonl"), held_out=0, verifier=says_a).problem("train", 0, 0)


def test_parts_reach_the_policy_as_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": f"Number {n}"}]}]} for n in range(8)]
    Path("rows.jsonl").write_text(lines(*rows))
    start("fit", folder, "--TASK=Rows --TASK.path=rows.jsonl --TASK.verifier=test_data.says_a --TASK.held_out=0.25")
    assert "Number" in capsys.readouterr().out  # in the table of samples
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert all(sample["prompt"][0]["content"].startswith("Number ") for sample in samples)


# ---- the same problem in both splits --------------------------------------------------------------------------------


def test_problems_in_both_splits_are_counted_and_told(policy, tmp_path):
    rows = [{"prompt": f"Number {n % 6}?"} for n in range(10)]
    rows[9]["prompt"] = " number 1? "
    (tmp_path / "rows.jsonl").write_text(lines(*rows))
    task = Rows(path=str(tmp_path / "rows.jsonl"), held_out=0.5, verifier=says_a)
    with pytest.warns(UserWarning, match="4 of 5 test problems of Rows are training problems, too"):
        check_data(task, policy, ("train", "test"))
    assert shared_problems(["a", "b"], ["A ", "c", "b", "b"]) == 3
    with pytest.warns(UserWarning, match="12 of 12 test problems of Countdown"):
        check_data(Countdown(path=str(DATA / "countdown_12.jsonl")), policy, ("train", "test"))
