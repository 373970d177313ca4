"""Runs of the command line on one process and on several."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_policy
from two_processes import ENVIRONMENT

from espo_lightning import fit, load_policy

TINY = [
    "--data.task=failing_tasks.Failing",  # which does not, unless told to
    "--data.batch_size=2",
    "--data.eval_problems=8",
    "--data.eval_batch_size=8",
    "--model.group_size=4",
    "--model.optimizer.lr=0.01",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]
FIT = [sys.executable, "-m", "espo_lightning.fit", *TINY]


@pytest.fixture(name="tiny", scope="module")
def tiny_fixture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    small_policy().save(path)
    return f"--model.policy.path={path}"


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tiny, tmp_path_factory) -> Path:
    """A run on one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    fit.main([*TINY, tiny, f"--run_dir={run_dir}", "--data.batches=6", "--trainer.val_check_interval=2"])
    base = small_policy().state_dict()
    assert max((w - base[k]).abs().max() for k, w in weights(run_dir).items()) > 0.05  # there is something to compare
    return run_dir


def weights(run_dir: Path) -> dict:
    return load_policy(run_dir / "policy").state_dict()


def start(arguments, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen([*FIT, *map(str, arguments)], **pipes | options)


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, *map(str, arguments)])
    assert error.value.code == 2
    return capsys.readouterr().err
