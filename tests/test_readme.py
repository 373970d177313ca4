"""What the README and the pages that it leads to promise by example."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import espo_lightning
from espo_lightning import evaluate, fit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def test_the_task_of_its_page_trains(tmp_path):
    """As a user would: the file in the working directory, its class by import path."""
    (code,) = re.findall(r"```python\n# my_tasks.py\n(.*?)```", PAGES["own_task"], flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_tasks.py").write_text(code)
    flags = ["--data.task=my_tasks.Reverse", "--data.batches=1", "--data.batch_size=2", "--run_dir=run"]
    small = ["--data.eval_problems=4", "--data.eval_batch_size=4", "--model.group_size=2", "--trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "espo_lightning.fit", *flags, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


SMALL = ["--data.batches=1", "--data.batch_size=2", "--model.group_size=2", "--trainer.accelerator=cpu"]


def as_in(folder: Path, monkeypatch) -> None:
    """What `python -m` makes of the working directory."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name in ("my_rewards", "my_objectives"):  # of another test's folder
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the files of docs/own_reward.md."""
    sources = {
        "capitals.jsonl": re.findall(r"```json\n(.*?)```", PAGES["own_reward"], flags=re.DOTALL),
        "my_rewards.py": re.findall(r"```python\n# my_rewards.py\n(.*?)```", PAGES["own_reward"], flags=re.DOTALL),
        "own.yaml": re.findall(r"```yaml\n# own.yaml\n(.*?)```", PAGES["own_reward"], flags=re.DOTALL),
    }
    for name, (text,) in sources.items():
        (tmp_path / name).write_text(text)
    assert sum(len(text.splitlines()) for (text,) in sources.values()) <= 40
    as_in(tmp_path, monkeypatch)
    return tmp_path


def test_the_weighted_rewards_of_their_page_train(own):
    """Every reward is logged under its own name."""
    fit.main(["--config=own.yaml", "--run_dir=run", *SMALL])
    columns = (own / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {f"reward/{name}/reward" for name in ("task", "polite", "brevity")}
    assert expected | {"reward/exact", "reward/task/exact", "reward/failed", "reward/timeout"} <= set(columns)
    assert (own / "run" / "policy").is_dir()


def test_the_rows_of_their_page_are_taken_from_flags(own):
    (flags,) = re.findall(r"`(--data.task=Rows [^`]*)`", PAGES["own_reward"])
    sizes = ["--data.task.held_out=0.5", "--data.eval_problems=2", "--data.eval_batch_size=2", "--run_dir=run", *SMALL]
    fit.main([*flags.split(), *sizes])
    assert (own / "run" / "summary.json").exists()
    short = ["--decoding.length=8", "--decoding.block_length=8", "--decoding.steps=2", "--output=result.json"]
    flags = flags.replace("data.", "")
    evaluate.main([*flags.split(), "--task.held_out=0.5", *short])
    assert json.loads((own / "result.json").read_text())["n"] == 2


def test_the_loss_of_the_readme_is_the_loss_of_the_library():
    (code,) = re.findall(r"```python\n(def sequence_ratio.*?)```", README, flags=re.DOTALL)
    assert code in PAGES["how_espo_works"]
    shown = {"torch": torch}
    exec(code, shown)
    generator = torch.Generator().manual_seed(0)
    new, old, ref, weight = torch.randn(4, 2, 5, 7, generator=generator).unbind()
    advantages = torch.randn(5, generator=generator)
    scores = espo_lightning.Scores(new, old, ref, weight.abs(), torch.full((5,), 7))
    for ratio in (shown["sequence_ratio"], espo_lightning.sequence_ratio, espo_lightning.token_ratio):
        own = espo_lightning.sequence_ratio if ratio is shown["sequence_ratio"] else ratio
        expected, _ = espo_lightning.PolicyGradient(ratio=own, clip_range=0.1, beta=0.3)(scores, advantages, 1)
        assert torch.equal(shown["losses"](scores, advantages, eps=0.1, beta=0.3, ratio=ratio), expected)
    terms = scores.terms, scores.weight * old, scores.weight * ref
    total, _ = espo_lightning.espo_loss(*terms, advantages, clip_range=0.1, beta=0.3)
    torch.testing.assert_close(total, shown["losses"](scores, advantages, eps=0.1, beta=0.3).mean())


def test_the_objective_of_its_page_is_all_it_takes(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n# my_objectives.py\n(.*?)```", PAGES["own_objective"], flags=re.DOTALL)
    assert len(code.splitlines()) <= 25
    (tmp_path / "my_objectives.py").write_text(code)
    (flags,) = re.findall(
        r"`python -m espo_lightning.fit (--model.objective=my_objectives[^`]*)`", PAGES["own_objective"]
    )
    as_in(tmp_path, monkeypatch)
    sizes = ["--data.eval_problems=2", "--data.eval_batch_size=2"]
    fit.main([*flags.split(), "--run_dir=run", *SMALL, *sizes])
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/log_ratio" in columns
    assert "train/kl" not in columns


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_files_that_a_page_names_exist(page):
    """api/ is made with the site only."""
    folder, text = (ROOT, README) if page == "README" else (ROOT / "docs", PAGES[page])
    links = [x for x in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not x.startswith(("http", "api/"))]
    configs = re.findall(r"experiments/[a-z0-9_]+\.yaml", text)
    assert links or page not in ("README", "first_run", "how_espo_works")
    assert [x for x in links if not (folder / x).exists()] == []
    assert [x for x in configs if not (ROOT / x).exists()] == []
