"""What is installed and published: the wheel, the command ``espo``, and the files around the package."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import papermill
import pytest
import yaml

from espo_lightning import __main__ as console
from espo_lightning import notebooks, shipped
from espo_lightning.training.command_line import spelt_out

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "espo_lightning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSIONS = [c.rsplit(" ", 1)[1] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]


def test_all_folders_of_the_package_are_in_a_wheel():
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    elsewhere = set(PROJECT["tool"]["setuptools"]["package-dir"])
    assert listed - elsewhere == folders, "put the new folder into packages in pyproject.toml"
    assert all((ROOT / folder).is_dir() for folder in PROJECT["tool"]["setuptools"]["package-dir"].values())


# ---- the command espo --------------------------------------------------------------------------------


def test_espo_knows_every_program(capsys):
    modules = {p.stem for p in PACKAGE.glob("*.py") if re.search(r"^def main\(", p.read_text(), re.MULTILINE)}
    assert modules - {"__main__"} == set(console.PROGRAMS)
    console.main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in console.PROGRAMS)
    console.main([])
    assert capsys.readouterr().out == shown
    console.main(["--version"])
    assert capsys.readouterr().out == f"espo_lightning {version('espo-lightning')}\n"


def test_espo_hands_on_all_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        console.main(["cost", "--gpus=[3]", "--shards=2"])
    assert error.value.code == 2
    assert "every number of gpus must be a multiple of shards" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["espo", "cost", "--help"])
    with pytest.raises(SystemExit) as error:
        console.main()
    assert error.value.code == 0
    assert "python -m espo_lightning.cost" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "hint"), [("evalute", "did you mean evaluate?"), ("xyz", "there are: fit, sft,")])
def test_espo_refuses_what_is_no_program(name, hint, capsys):
    with pytest.raises(SystemExit) as error:
        console.main([name])
    assert error.value.code == 2
    assert hint in capsys.readouterr().err


# ---- experiments and notebooks -----------------------------------------------------------------------


def test_experiments_are_found_from_everywhere_and_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(shipped.shipped("experiments") / "methods" / "wd1.yaml")
    assert Path(own).is_file()
    name = "experiments/methods/wd1.yaml"
    assert spelt_out(["--config", name, f"--config={name}"]) == ["--config", own, f"--config={own}"]
    assert shipped.found("experiments/none.yaml") == "experiments/none.yaml"
    (tmp_path / "experiments" / "methods").mkdir(parents=True)
    (tmp_path / name).touch()
    assert shipped.found(name) == name


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "espo_lightning")
    assert shipped.shipped("notebooks") == tmp_path / "notebooks"
    inside = tmp_path / "espo_lightning" / "shipped" / "notebooks"
    inside.mkdir(parents=True)
    assert shipped.shipped("notebooks") == inside


def test_outside_of_a_clone_the_notebooks_of_the_package_are_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        notebooks.main(["--name=99"])
    assert list(tmp_path.iterdir()) == []  # refused before anything is written
    run = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: run.append(a) or shutil.copy(a[0], a[1]))
    notebooks.main(["--name=03"])
    assert [a[0] for a in run] == ["notebooks/03_kl_estimators.ipynb"]
    assert "copied to" in capsys.readouterr().out
    assert (tmp_path / "notebooks" / "reduced.yaml").is_file()
    assert len(list((tmp_path / "notebooks").glob("*.ipynb"))) == len(list((ROOT / "notebooks").glob("[0-9]*.ipynb")))


# ---- the files around it -----------------------------------------------------------------------------


def test_the_citation_is_complete_and_that_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    paper = citation["preferred-citation"]
    bibtex = re.sub(r"[{}]", "", (ROOT / "README.md").read_text().split("```bibtex")[1].split("```")[0])
    plain = " ".join(bibtex.split())
    assert paper["title"] in plain
    assert paper["journal"] in plain
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in plain


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first.group(1) == PROJECT["project"]["version"] == version("espo-lightning")


def test_ci_runs_the_whole_check_and_every_python_that_is_named():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in steps["check"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    whole = jobs["check"]["steps"][1]["with"]["python-version"]
    assert [whole, *jobs["versions"]["strategy"]["matrix"]["python-version"]] == VERSIONS
    assert PROJECT["project"]["requires-python"] == f">={VERSIONS[0]}"
    assert any("environment.yml" in run for run in steps["conda"])
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    extras = re.search(r"\[(.*)\]", packages[1]).group(1).split(",")
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()


def test_hooks_before_commits_run_what_make_lint_does():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["entry"].removesuffix(" --fix") for hook in repository["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert entries == {
        line.strip().replace("$(BIN)", ".venv/bin").split(" --check")[0].removesuffix(" .")
        for line in lint.splitlines()
    }


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="decides on Linux only")
@pytest.mark.parametrize(
    ("tools", "settings", "flags", "index"),
    [
        ([], {}, [], "https://download.pytorch.org/whl/cpu"),
        (["nvidia-smi"], {}, [], ""),
        ([], {"PIP_INDEX_URL": "https://example.org/simple"}, [], ""),
        ([], {"PIP_FIND_LINKS": "/wheels"}, [], ""),
        ([], {}, ["TORCH_INDEX="], ""),
        (["nvidia-smi"], {}, ["TORCH_INDEX=https://example.org/rocm"], "https://example.org/rocm"),
    ],
)
def test_make_takes_a_cpu_build_of_torch_where_there_is_no_gpu(tools, settings, flags, index, tmp_path):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    folders = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvidia-smi").exists()]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PATH": os.pathsep.join([str(tmp_path), *folders]), **settings}
    command = ["make", "-n", "env", f"PYTHON={sys.executable}", "VENV=nowhere", *flags]
    said = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    torch = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    assert (f"--index-url {index} {torch} " in said) == bool(index)
    assert ("--index-url" in said) == bool(index)
    assert f'echo "torch: from {index or "pip"}' in said


# ---- the wheel ---------------------------------------------------------------------------------------


def alone():
    """An environment in which nothing leads to this checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel, and with this environment's packages behind its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, env=alone())
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    Path(own.stdout.strip(), "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return wheel, python


@pytest.mark.slow
def test_a_wheel_holds_all_that_its_programs_need(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    here = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert here - names == set()
    for folder in ("experiments", "notebooks"):
        for path in [*(ROOT / folder).rglob("*.yaml"), *(ROOT / folder).glob("[0-9]*.ipynb")]:
            assert f"espo_lightning/shipped/{path.relative_to(ROOT).as_posix()}" in names
    assert {name.split("/")[0] for name in names if not name.startswith("espo_lightning-")} == {"espo_lightning"}


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_clone(installed, tmp_path):
    python = installed[1]
    espo = python.with_name("espo")
    clean = alone()

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    where = run(python, "-c", "import espo_lightning; print(espo_lightning.__file__)").strip()
    assert Path(where).is_relative_to(python.parents[1])
    assert run(espo, "--version") == f"espo_lightning {PROJECT['project']['version']}\n"
    assert "after RL" in run(espo, "sample", "--html=page.html")
    assert (tmp_path / "page.html").stat().st_size > 5000
    config = yaml.safe_load(run(espo, "fit", "--config", "experiments/countdown_tiny.yaml", "--print_config"))
    assert config["data"]["task"]["class_path"] == "espo_lightning.Countdown"
    small = ["--data.batches=1", "--data.batch_size=2", "--data.eval_problems=4", "--run_dir=run"]
    assert "held-out" in run(espo, "fit", "--config=experiments/methods/wd1.yaml", *small)
    run(python, "-m", "espo_lightning.evaluate", "--policy.path=run/policy", "--problems=4", "--output=e.json")
    run(espo, "push", "--run=run", "--evaluations=[e.json]")
    assert "model-index" in (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "B parameters" in run(espo, "cost")
    done = subprocess.run([espo, "notebooks", "--name=99"], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 2
    assert "01_elbo_tightness" in done.stderr
    names = ast.literal_eval(run(python, "-c", "import espo_lightning; print(espo_lightning.__all__)"))
    assert "ESPOModule" in names
