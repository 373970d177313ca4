"""Every experiment file parses against the real signatures and runs one small batch."""

from pathlib import Path

import pytest

from espo_lightning import fit, sft

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
SMALL = ["--data.batches=1", "--data.batch_size=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may depend on the working directory
    flags = ["--config", str(path), "--run_dir=run", *SMALL]
    if path.stem.endswith("_base"):
        sft.main(flags)
    else:
        fit.main([*flags, "--data.eval_problems=4", "--data.eval_batch_size=4", "--model.group_size=2"])
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
