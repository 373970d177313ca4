"""What the README promises by example."""

import re
import subprocess
import sys
from pathlib import Path

import torch

import espo_lightning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_task_of_the_readme_trains(tmp_path):
    """As a user would: the file in the working directory, its class by import path."""
    (code,) = re.findall(r"```python\n# my_tasks.py\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_tasks.py").write_text(code)
    flags = ["--data.task=my_tasks.Reverse", "--data.batches=1", "--data.batch_size=2", "--run_dir=run"]
    small = ["--data.eval_problems=4", "--data.eval_batch_size=4", "--model.group_size=2", "--trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "espo_lightning.fit", *flags, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_loss_of_the_readme_is_the_loss_of_the_library():
    (code,) = re.findall(r"```python\n(def sequence_ratio.*?)```", README, flags=re.DOTALL)
    shown = {"torch": torch}
    exec(code, shown)
    generator = torch.Generator().manual_seed(0)
    terms, old, ref = torch.randn(3, 2, 5, 7, generator=generator).unbind()
    advantages = torch.randn(5, generator=generator)
    for ratio in ("sequence_ratio", "token_ratio"):
        settings = {"clip_range": 0.1, "beta": 0.3, "ratio": getattr(espo_lightning, ratio)}
        expected, _ = espo_lightning.espo_loss(terms, old, ref, advantages, **settings)
        assert torch.equal(shown["espo_loss"](terms, old, ref, advantages, **settings), expected)
    assert torch.equal(shown["sequence_ratio"](terms, old), espo_lightning.sequence_ratio(terms, old))


def test_files_named_in_the_readme_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    configs = re.findall(r"experiments/[a-z0-9_]+\.yaml", README)
    assert links
    assert configs
    assert [p for p in [*links, *configs] if not (ROOT / p).exists()] == []
