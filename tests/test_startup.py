"""What a program imports before it does anything: a look at ``sys.modules``, as seconds depend on the machine."""

import ast
import inspect
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import espo_lightning
from espo_lightning.__main__ import PROGRAMS
from espo_lightning.tasks import sudoku
from espo_lightning.training.command_line import callables, spelt_out

PACKAGE = Path(espo_lightning.__file__).parent
ROOT = PACKAGE.parent
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
    command = [sys.executable, "-c", WALK, json.dumps(commands), json.dumps(modules)]
    run = subprocess.run(command, capture_output=True, text=True)
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
        assert name in callables() or not inspect.isfunction(thing), name  # which have short names on a command line
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


def test_the_table_of_start_up_times_is_that_of_its_file():
    specification = spec_from_file_location("startup", ROOT / "benchmarks" / "startup.py")
    startup = module_from_spec(specification)
    specification.loader.exec_module(startup)
    found = json.loads((ROOT / "benchmarks" / "results" / "startup.json").read_text())["cpu_seconds"]
    assert startup.table(found) in (ROOT / "benchmarks" / "README.md").read_text()
    assert set(found) == set(startup.COMMANDS)


def test_sudokus_grids_are_found_row_by_row(monkeypatch):
    tried, fits = [], sudoku._fits
    monkeypatch.setattr(sudoku, "_fits", lambda grid: tried.append(grid) or fits(grid))
    found = sudoku.grids.__wrapped__()
    assert len(found) == len(set(found)) == 288  # all that there are
    assert list(found) == sorted(found)
    assert all(map(sudoku.is_solved, found))
    assert len(tried) < 24**4 / 10
