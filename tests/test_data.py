"""Data are looked at before anything is written: every row, every shape that people store, one message."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest

from espo_lightning import Countdown, Problem, Sudoku, Task, evaluate, fit, load_policy, new_policy, sft
from espo_lightning.tasks import GSM8K, MATH, MBPP, AceCode, HumanEval, Rows, Weighted
from espo_lightning.tasks.files import BadRows, read
from espo_lightning.tasks.messages import prompt_of
from espo_lightning.training.data_check import check_data, shared_problems

DATA = Path(__file__).parent / "data"
GRID, PUZZLE = "2431312412434312", "0401002010030310"


def says_a(row, text):
    return {"reward": text.count("a") / 4}


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def gsm8k(n: int, **changes) -> dict:
    return {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(path)
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)


SMALL = ["--data.batches=1", "--data.batch_size=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL_FIT = [*SMALL, "--data.eval_problems=2", "--data.eval_batch_size=2", "--model.group_size=2"]
SHORT = ["--decoding.length=4", "--decoding.block_length=4", "--decoding.steps=2", "--device=cpu"]
PROGRAMS = {
    "fit": (fit.main, "data.task", "model.policy", [*SMALL_FIT, "--run_dir=run"]),
    "sft": (sft.main, "data.task", "model.policy", [*SMALL, "--run_dir=run"]),
    "evaluate": (evaluate.main, "task", "policy", [*SHORT, "--output=result.json"]),
}


def start(program: str, folder: Path, flags: str, *more: str) -> None:
    """Run a program on a task that ``flags`` describe, with TASK for the name of its argument."""
    main, task, policy, rest = PROGRAMS[program]
    loaded = [f"--{policy}=espo_lightning.load_policy", f"--{policy}.path={folder}"]
    main([*loaded, *flags.replace("TASK", task).split(), *rest, *more])


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
MESSAGE = {"role": "user", "content": "Hi"}
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
