"""Rows of code tasks, and a pool that runs programs where this host isolates them."""

from pathlib import Path

import pytest

from espo_lightning.tasks.code import MBPP, HumanEval
from espo_lightning.tasks.sandbox import run as sandbox

DATA = Path(__file__).parent / "data"
HUMANEVAL = HumanEval(path=str(DATA / "humaneval_40.jsonl"))
MBPP_ROWS = MBPP(path=str(DATA / "mbpp_60.jsonl"), held_out=1.0)
ISOLATED = any(not sandbox.probe(backend) for backend in sandbox.BACKENDS)
isolated = pytest.mark.skipif(not ISOLATED, reason="no isolation on this host: test_code checks the refusal")


@pytest.fixture(name="box", scope="module")
def box_fixture():
    pool = sandbox.Sandbox(1)
    yield pool
    pool.close()
