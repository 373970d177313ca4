"""What a program imports before it does anything: a look at ``sys.modules``, as seconds depend on the machine."""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import espo_lightning
from espo_lightning.__main__ import PROGRAMS
from espo_lightning.tasks import sudoku
from espo_lightning.training import kept_help
from espo_lightning.training.command_line import functions, spelt_out

PACKAGE = Path(espo_lightning.__file__).parent
TRAINING = ("fit", "sft")  # these parse Lightning's flags, too
LATER = ("peft", "datasets", "pandas", "accelerate", "wandb", "papermill", "math_verify", "espo_lightning.lab.plots")
WITH_LIGHTNING = ("lightning", "torchmetrics", "transformers", "matplotlib", "sympy", "torch._dynamo")
# prints, after each of some command lines, which of some modules are there
WALK = """
import contextlib, io, json, runpy, sys
commands, modules = map(json.loads, sys.argv[1:])
found = {}
for name, flags in commands:
    sys.argv, shown = ["it", *flags], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        runpy.run_module(name, run_name="__main__")
    found[" ".join([name, *flags])] = shown.getvalue(), [module for module in modules if module in sys.modules]
print(json.dumps(found))
"""


def walk(commands, modules):
    """command line -> what it printed, and which of the modules were there afterwards, all in one fresh process."""
    with tempfile.TemporaryDirectory() as folder:  # where no help is kept yet
        command = [sys.executable, "-c", WALK, json.dumps(commands), json.dumps(modules)]
        run = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": folder}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_programs_that_do_not_train_say_what_they_can_without_lightning():
    names = [name for name in PROGRAMS if name not in TRAINING]
    commands = [[f"espo_lightning.{name}", ["--help"]] for name in names]
    commands += [["espo_lightning", ["--help"]], ["espo_lightning.evaluate", ["--polcy.path=x"]]]
    named = ["--decoding=AutoregressiveDecoding", "--task=Countdown", "--print_config"]
    commands += [["espo_lightning.evaluate", named]]
    found = walk(commands, [*LATER, *WITH_LIGHTNING])
    assert {command: modules for command, (_, modules) in found.items() if modules} == {}
    assert all("usage: " in text for command, (text, _) in found.items() if "--help" in command)
    assert "polcy" in found["espo_lightning.evaluate --polcy.path=x"][0]
    config = found[" ".join(["espo_lightning.evaluate", *named])][0]
    assert "class_path: espo_lightning.AutoregressiveDecoding" in config  # short names are known without Lightning, too


@pytest.mark.slow
def test_programs_that_train_leave_for_later_what_they_may_not_need():
    commands = [[f"espo_lightning.{name}", flags] for name in TRAINING for flags in (["--help"], ["--print_config"])]
    commands += [["espo_lightning.fit", ["--modle.updates=1"]]]
    found = walk([*commands], [*LATER, "transformers.models.llama.modeling_llama"])
    assert {command: modules for command, (_, modules) in found.items() if modules} == {}
    assert "--model.group_size" in found["espo_lightning.fit --help"][0]


@pytest.mark.slow
def test_help_is_the_same_the_second_time_and_waits_for_nothing(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = "import sys; from espo_lightning.__main__ import main; main(sys.argv[1:])"
    seen = "import atexit, sys; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)));"
    command = [sys.executable, "-c", seen + code, "fit", "--help"]
    first, second = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == second.stdout
    assert "--model.group_size" in first.stdout
    assert first.stderr.endswith("True")
    assert second.stderr == "False"


class Parser:
    def print_help(self, file=None):
        self.shown = True

    def format_help(self):
        return "the help"


def test_help_is_kept_for_who_asked_and_for_these_sources_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_help, "PACKAGE", tmp_path)
    monkeypatch.setattr(kept_help, "missing", set())
    (tmp_path / "module.py").write_text("one")
    kept_help.answer("it", ["--help", "--seed=1"])
    parser = kept_help.keeping(Parser(), "it")
    parser.print_help()
    assert parser.shown
    assert not (tmp_path / "cache").exists()  # nobody looked for it
    kept_help.answer("it", ["--help"])
    parser.print_help()
    with pytest.raises(SystemExit) as end:
        kept_help.answer("it", ["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "the help"
    kept_help.answer("another", ["-h"])  # has none
    monkeypatch.setenv("COLUMNS", "44")
    kept_help.answer("it", ["--help"])
    monkeypatch.delenv("COLUMNS")
    (tmp_path / "module.py").write_text("two")
    kept_help.answer("it", ["--help"])
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_to_keeps_no_help(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kept_help, "missing", set())
    kept_help.answer("it", ["--help"])
    parser = kept_help.keeping(Parser(), "it")
    parser.print_help()
    assert parser.shown


def test_the_package_itself_imports_nothing():
    code = "import sys, espo_lightning as e; dir(e); print('torch' in sys.modules, 'yaml' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_public_names_are_those_that_type_checkers_read():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    (declared,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(declared)) == espo_lightning.__all__ == sorted(espo_lightning.WHERE)
    assert ast.get_docstring(tree) == espo_lightning.__doc__
    for name in espo_lightning.__all__:
        thing = getattr(espo_lightning, name)
        assert inspect.isfunction(thing) == (name in functions()), name  # by which a command line tells them apart
        assert thing is getattr(sys.modules[espo_lightning.WHERE[name]], name)
    assert set(espo_lightning.__all__) <= set(dir(espo_lightning))
    with pytest.raises(AttributeError, match="module 'espo_lightning' has no attribute 'k4'"):
        espo_lightning.k4  # noqa: B018
    names = {}
    exec("from espo_lightning import *", names)
    assert set(espo_lightning.__all__) <= set(names)


@pytest.mark.parametrize(
    ("given", "spelt"),
    [
        (["--model.objective.kl=k3"], ["--model.objective.kl=espo_lightning.k3"]),
        (["--model.objective.kl", "k3"], ["--model.objective.kl", "espo_lightning.k3"]),
        (["--model.objective.kl=other.k3"], ["--model.objective.kl=other.k3"]),
        (["--run_dir=k3", "--run_dir", "k3", "k3"], ["--run_dir=k3", "--run_dir", "k3", "k3"]),
        (["--config=mine.yaml", "--config", "experiments/none.yaml"],) * 2,
    ],
)
def test_only_names_of_functions_where_one_is_expected_are_spelt_out(given, spelt):
    assert spelt_out(given) == spelt


def test_sudokus_grids_are_found_row_by_row(monkeypatch):
    tried, fits = [], sudoku._fits
    monkeypatch.setattr(sudoku, "_fits", lambda grid: tried.append(grid) or fits(grid))
    found = sudoku.grids.__wrapped__()
    assert len(found) == len(set(found)) == 288  # all that there are
    assert list(found) == sorted(found)
    assert all(map(sudoku.is_solved, found))
    assert len(tried) < 24**4 / 10
