"""A tiny policy in a folder, and a finished run of it."""

from pathlib import Path

import pytest

from espo_lightning import fit, new_policy

TINY = [
    "--data.batch_size=2",
    "--data.eval_problems=8",
    "--data.eval_batch_size=8",
    "--model.group_size=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory) -> Path:
    """A tiny policy folder."""
    path = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(path)
    return path


@pytest.fixture(name="finished", scope="module")
def finished_fixture(folder, tmp_path_factory) -> Path:
    """The run folder of a short run."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={run_dir}", "--data.batches=4", "--seed=3"])
    return run_dir
