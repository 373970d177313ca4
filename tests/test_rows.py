"""Own prompts and own verifiers: JSONL rows, functions by import path, as a user brings them."""

import json
import pickle
from pathlib import Path

import datasets
import pytest

from espo_lightning import evaluate, fit
from espo_lightning.tasks import GSM8K, MATH, MBPP, HumanEval, Rows

PROMPTS = """\
{"prompt": "Capital of France?", "capital": "paris"}
{"prompt": "Capital of Italy?", "capital": "rome"}
{"prompt": [{"role": "user", "content": "Capital of Peru?"}], "capital": "lima", "answer": "Lima"}
{"prompt": "Capital of Norway?", "capital": "oslo"}
"""


def capital(row, text):
    return {"reward": float(row["capital"] in text.lower())}


@pytest.fixture
def capitals(tmp_path) -> str:
    (tmp_path / "capitals.jsonl").write_text(PROMPTS)
    return str(tmp_path / "capitals.jsonl")


def test_rows_become_problems(capitals):
    task = Rows(path=capitals, held_out=0.25, verifier=capital)
    problems = [pickle.loads(pickle.dumps(task.problem("train", 0, i))) for i in range(3)]
    assert {json.dumps(p.prompt) for p in problems} == {
        json.dumps(json.loads(x)["prompt"]) for x in PROMPTS.split("\n")[:3]
    }
    assert sorted(p.answer for p in problems) == ["", "", "Lima"]
    norway = task.problem("test", 0, 0)
    assert [norway.verify(text)["reward"] for text in ("It is Oslo.", "Bergen", "")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "?"}', "has no .prompt., which Rows needs, only .question."),
        ('{"prompt": "a"}\n{"prompt": ', "line 2, is not JSON"),
        ("[1]", "line 1, is a list"),
        ("", "no 'train' rows"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Rows(path=str(tmp_path / "rows.jsonl"), held_out=0.0, verifier=capital).problem("train", 0, 0)
    assert "rows.jsonl" in str(error.value)


ROWS = "--TASK=Rows --TASK.path=capitals.jsonl --TASK.verifier=test_rows.capital"

WEIGHTED = "--TASK=Weighted --TASK.task=Countdown --TASK.extra="


@pytest.mark.parametrize(("main", "task"), [(fit.main, "data.task"), (evaluate.main, "task")], ids=["fit", "evaluate"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ROWS.replace("capitals", "nowhere"), "path nowhere.jsonl of Rows cannot be read: No such file"),
        (ROWS.replace("test_rows.capital", "test_rows.nothing"), "no attribute 'nothing'"),
        ("--TASK=GSM8K --TASK.path=capitals.jsonl", "line 1, has no 'question', which GSM8K needs, only 'prompt'"),
        ("--TASK=MATH", "No hub. Set path of MATH to a JSONL file with the columns problem, solution instead"),
        (WEIGHTED + '{"test_rows.nothing":1}', "'test_rows.nothing' is no import path of a verifier"),
        (WEIGHTED + '{"a.b":1,"c.b":2}', "two rewards share a name"),
    ],
)
def test_data_that_cannot_be_used_is_one_message_before_anything_is_written(
    main, task, flags, message, capitals, tmp_path, monkeypatch, capsys
):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("No hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SystemExit) as error:
        main([*flags.replace("TASK", task).split(), "--run_dir=run" if main is fit.main else "--output=result.json"])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["capitals.jsonl"]


def test_no_problem_counts_twice(capitals, tmp_path, monkeypatch, capsys):
    """Of fewer test rows than they were asked for, `evaluate` and `fit` take all; `fit` says so."""
    monkeypatch.chdir(tmp_path)
    short = ["--decoding.length=4", "--decoding.block_length=4", "--decoding.steps=2"]
    evaluate.main([*ROWS.replace("TASK", "task").split(), "--task.held_out=0.75", *short, "--output=result.json"])
    result = json.loads(Path("result.json").read_text())
    assert (result["n"], result["problems"], result["settings"]["problems"]) == (3, 3, 256)
    assert len({json.dumps(sample["prompt"]) for sample in result["samples"]}) == 3
    small = ["--data.batches=1", "--data.batch_size=1", "--model.group_size=2", "--trainer.accelerator=cpu"]
    with pytest.warns(UserWarning, match="data.eval_problems 256: Rows has 3 test problems, all are taken"):
        fit.main([*ROWS.replace("TASK", "data.task").split(), "--data.task.held_out=0.75", "--run_dir=run", *small])
    assert json.loads(Path("run/summary.json").read_text())["after"]["n"] == 3


@pytest.mark.parametrize(
    ("rows", "held_out", "test"), [(4, 0.1, 1), (4, 0.9, 3), (4, 0.0, 0), (4, 1.0, 4), (1, 0.1, 0)]
)
def test_of_few_rows_either_split_has_one(tmp_path, rows, held_out, test):
    (tmp_path / "few.jsonl").write_text('{"prompt": "a"}\n' * rows)
    task = Rows(path=str(tmp_path / "few.jsonl"), held_out=held_out, verifier=capital)
    assert task.size("test") == test
    assert task.size("train") == rows - test


@pytest.mark.parametrize(
    ("task", "rows", "split", "asked"),
    [
        (GSM8K, "gsm8k_60.jsonl", "train", ("openai/gsm8k", "main", "train")),
        (GSM8K, "gsm8k_60.jsonl", "test", ("openai/gsm8k", "main", "test")),
        (MATH, "math500_84.jsonl", "train", ("ankner/math-500", None, "train")),
        (MATH, "math500_84.jsonl", "test", ("HuggingFaceH4/MATH-500", None, "test")),
        (HumanEval, "humaneval_40.jsonl", "test", ("openai/openai_humaneval", None, "test")),
        (MBPP, "mbpp_60.jsonl", "train", ("google-research-datasets/mbpp", "full", "train")),
        (MBPP, "mbpp_60.jsonl", "test", ("google-research-datasets/mbpp", "full", "test")),
    ],
)
def test_rows_from_the_hub_and_from_a_file_are_the_same(task, rows, split, asked, monkeypatch):
    """Rows of the published sets, once as JSONL and once as the data set that the hub's loader would return."""
    requests = []
    path = str(Path(__file__).parent / "data" / rows)

    def load_dataset(*args, **kwargs):
        requests.append((*args, kwargs))
        return datasets.Dataset.from_json(path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub, local = task(), task(path=path, held_out=float(split == "test"))
    assert hub.size(split) == local.size(split)
    for index in range(3):
        problem, other = hub.problem(split, 1, index), local.problem(split, 1, index)
        assert (problem.prompt, problem.answer) == (other.prompt, other.answer)
        assert problem.verify.keywords == other.verify.keywords
    assert requests == [(*asked[:2], {"split": asked[2]})]
