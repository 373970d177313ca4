"""The front door: the README's size, five lines, numbers and picture; pages of commands and metrics; public names."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import espo_lightning
from espo_lightning import tasks
from espo_lightning.__main__ import PROGRAMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "website"))

import commands  # noqa: E402
import graph  # noqa: E402
import picture  # noqa: E402
import results  # noqa: E402


def test_the_readme_takes_ten_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 10_240
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        assert paragraph.startswith("|") or len(paragraph.splitlines()) <= 5, paragraph
    assert max(map(len, re.sub(r"(?m)^\|.*$", "", README).splitlines())) <= 120


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_python_train(tmp_path, monkeypatch):
    """The README's, which those of the first run begin with; one small rollout in the place of ten."""
    monkeypatch.chdir(tmp_path)
    (five,) = re.findall(r"```python\n(from lightning .*?)```", README, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(from lightning .*?)```", (DOCS / "first_run.md").read_text(), flags=re.DOTALL)
    assert len([line for line in five.splitlines() if line]) <= 5
    assert code.startswith(five)
    names: dict = {}
    exec(code.replace("batches=10", "batches=1, batch_size=2"), names)
    assert espo_lightning.load_policy("my_policy").mask_id == names["module"].policy.mask_id
    before = espo_lightning.load_policy("bundled:sudoku").state_dict()
    after = names["module"].policy.state_dict()
    assert names["module"].rollouts == 1
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_tables_of_results_are_those_of_the_kept_runs(page):
    assert results.written(page) == page.read_text(), "python website/results.py"
    assert page.read_text().count("<!-- results: ") in (1, 3)


def test_the_picture_is_what_the_decoder_returns():
    stored = json.loads((DOCS / "unmasking.json").read_text())
    assert picture.record() == stored, "python website/picture.py"
    assert picture.picture(stored) == (DOCS / "unmasking.svg").read_text()
    assert (stored["before"]["verdict"]["exact"], stored["after"]["verdict"]["exact"]) == (0.0, 1.0)


# ---- commands and metrics -------------------------------------------------------------------------------------------


def test_the_page_of_commands_is_current():
    assert (DOCS / "commands.md").read_text() == commands.page(), "python website/commands.py > docs/commands.md"


HIDDEN = {
    "--help",
    "--print_config",
    "--seed_everything",
    "--trainer",
    "--model",
    "--data",
    "--data.seed",
    "--model.seed",
}


@pytest.mark.slow
@pytest.mark.parametrize("module", [f"espo_lightning.{name}" for name in PROGRAMS])
def test_every_flag_of_help_is_on_the_page(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"(?m)^ +(?:-\w[ ,\w]*)?(--[\w.]+)", shown))
    page = (DOCS / "commands.md").read_text()
    (section,) = re.findall(rf"## `python -m {module}`\n(.*?)(?=\n## )", page, flags=re.DOTALL)
    wanted = {f for f in flags - HIDDEN if not f.endswith(".help") and not f.startswith("--trainer.")}
    assert wanted
    missing = {flag for flag in wanted if f"`{flag}`" not in (page if "." in flag else section)}
    assert missing == set()


def objectives() -> list[espo_lightning.Objective]:
    found = [getattr(espo_lightning, name) for name in espo_lightning.__all__]
    classes = [thing for thing in found if inspect.isclass(thing) and issubclass(thing, espo_lightning.Objective)]
    return [cls() for cls in classes if not inspect.isabstract(cls)]


def test_the_dictionary_has_what_every_objective_logs():
    explained = (DOCS / "metrics.md").read_text()
    values = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    scores = espo_lightning.Scores(*values, torch.ones(2, 4, 5), torch.full((4,), 5))
    for objective in objectives():
        _, statistics = objective(scores, torch.tensor([1.0, -1.0, 0.5, -0.5]), 2)
        assert statistics
        for name in statistics:
            assert f"`train/{name}`" in explained, name


# ---- public names ---------------------------------------------------------------------------------------------------

PUBLIC = {
    name: thing
    for package in (espo_lightning, tasks)
    for name in package.__all__
    if inspect.isclass(thing := getattr(package, name)) or inspect.isfunction(thing)
}
LIGHTNING = {"FSDP", "FSDP2", "DeepSpeed", "ESPOModule", "PromptDataModule"}  # whose methods are Lightning's hooks


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_is(name):
    thing = PUBLIC[name]
    words = inspect.getdoc(thing)
    assert words
    assert not words.startswith(f"{name}("), "what dataclass writes by itself"
    first = words.split("\n\n")[0].split("\n    ")[0].rstrip()
    assert first.endswith((".", ":", ";")) or words.count("\n"), first
    if inspect.isclass(thing) and name not in LIGHTNING:
        for method, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not method.startswith("_") and inspect.isfunction(function):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_every_argument_of_a_public_class_is_explained(name):
    thing = PUBLIC[name]
    own = [cls.__doc__ or "" for cls in thing.__mro__ if cls.__module__.startswith("espo_lightning")]
    explained = commands.described(thing)
    if name in ("FSDP", "FSDP2"):  # which pass Lightning's on, and say so
        return
    for argument in inspect.signature(thing).parameters:
        assert argument in explained or any(re.search(rf"\b{argument}\b", text) for text in own), argument


def test_the_site_draws_every_arrow_of_the_rooms():
    """graph.py does it, as Mermaid's script would come from another server."""
    (mermaid,) = re.findall(r"```mermaid\n(.*?)```", (DOCS / "structure.md").read_text(), flags=re.DOTALL)
    arrows = re.findall(r"(\w+) --> (\w+)", mermaid)
    level = {name: i for i, row in enumerate(graph.layers(arrows)) for name in row}
    assert all(level[above] < level[below] for above, below in arrows)
    svg = graph.drawing(mermaid)
    assert svg.count("marker-end") == len(arrows)
    assert all(f">{name}</text>" in svg for name in level)
