"""Files of rows, and what is said about them."""

import json
from pathlib import Path

import pytest

from espo_lightning import evaluate, fit, load_policy, new_policy, sft

GRID, PUZZLE = "2431312412434312", "0401002010030310"


def says_a(row, text):
    return {"reward": text.count("a") / 4}


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def gsm8k(n: int, **changes) -> dict:
    return {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} | changes


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(path)
    return path


@pytest.fixture(name="policy", scope="module")
def policy_fixture(folder):
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
