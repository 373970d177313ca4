"""Own prompts and own verifiers: JSONL rows, functions by import path, as a user brings them."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from espo_lightning.tasks import Rows

PROMPTS = """\
{"prompt": "Capital of France?", "capital": "paris"}
{"prompt": "Capital of Italy?", "capital": "rome"}
{"prompt": [{"role": "user", "content": "Capital of Peru?"}], "capital": "lima", "answer": "Lima"}
{"prompt": "Capital of Norway?", "capital": "oslo"}
"""
VERIFIERS = """\
def capital(row, text):
    named = row["capital"] in text.lower()
    return {"reward": float(named), "exact": float(text.strip().lower() == row["capital"])}


def polite(text):
    return {"reward": float("please" in text)}
"""
CONFIG = """\
data:
  batch_size: 2
  batches: 1
  eval_problems: 2
  eval_batch_size: 2
  task:
    class_path: espo_lightning.tasks.Weighted
    init_args:
      task:
        class_path: espo_lightning.tasks.Rows
        init_args:
          path: capitals.jsonl
          held_out: 0.5
          verifier: my_rewards.capital
      weight: 1.0
      extra:
        my_rewards.polite: 0.1
        espo_lightning.tasks.rewards.brevity: 0.05
model:
  group_size: 2
trainer:
  accelerator: cpu
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
        ('{"question": "?"}', 'has no "prompt", only .question.'),
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


def test_own_prompts_and_verifiers_train_from_yaml(tmp_path, capitals):
    """The example of the documentation, as a user runs it: every reward is logged under its own name."""
    (tmp_path / "my_rewards.py").write_text(VERIFIERS)
    (tmp_path / "own.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "espo_lightning.fit", "--config=own.yaml", "--run_dir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {f"reward/{name}/reward" for name in ("task", "polite", "brevity")}
    assert expected | {"reward/exact", "reward/task/exact", "reward/failed", "reward/timeout"} <= set(columns)
    assert Path(tmp_path / "run" / "policy").is_dir()
