"""Every number that a program takes itself, beside those of the objects that it makes, refuses nonsense by name."""

import inspect
import math
from typing import get_type_hints

import pytest
from range_cases import ONE, SEED, Real, numbers_of
from run_cases import SFT, TINY, refused

from espo_lightning import evaluate, export, fit, notebooks, sft
from espo_lightning.training.signals import Signals

TRAINING = {
    "seed": SEED,
    "checkpoint_every": ONE,
    "keep_checkpoints": ONE,
    "timeout": Real("(0, 1e9]"),
    "threads": ONE,
}
FLAGS = {fit: [*TINY, "--data.batches=1"], sft: [*SFT, "--data.batches=1"]}
# the functions behind the other programs; test_ranges.py has those of evaluate and cost
FUNCTIONS = {export.export: set(), notebooks.execute: {"seeds", "processes"}}


@pytest.mark.parametrize("program", FLAGS)
def test_every_number_of_a_training_program_has_its_range_here(program, tmp_path):
    cli = program.make([*FLAGS[program], "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}"], Signals())
    numbers = {
        action.dest
        for action in cli.parser._actions
        if "." not in action.dest and isinstance(cli.config.get(action.dest), int | float) and action.dest != "threads"
    } - {"seed_everything"}
    cli.close()
    assert numbers | {"threads"} == set(TRAINING)  # which is null by default


@pytest.mark.parametrize("program", FLAGS)
@pytest.mark.parametrize("name", TRAINING)
def test_nonsense_is_refused_and_named(program, name, tmp_path, capsys):
    """Infinity, NaN, fractions of counts, what is below and beyond the range: one message, and nothing is written."""
    for value in TRAINING[name].nonsense:
        given = str(value).replace("nan", ".nan").replace("inf", ".inf")
        for text in {given, str(value)}:
            message = refused(capsys, program, *FLAGS[program], f"--run_dir={tmp_path / 'run'}", f"--{name}={text}")
            assert name in message, message
            assert not (tmp_path / "run").exists()


def test_every_number_of_the_other_programs_has_its_range():
    for function, ranges in FUNCTIONS.items():
        assert numbers_of(function) == ranges, function
        assert set(get_type_hints(function)) >= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", ["seeds", "processes"])
def test_the_notebooks_program_refuses_numbers_that_make_no_sense(name, tmp_path, capsys):
    for value in [0, -1, -(2**40), 2**63, 1.5, math.nan, math.inf]:
        with pytest.raises(SystemExit) as error:
            notebooks.main([f"--{name}={value}", f"--output_dir={tmp_path / 'out'}"])
        assert error.value.code == 2
        assert name in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_evaluate_refuses_threads_that_make_no_sense(value, tmp_path, capsys):
    message = refused(capsys, evaluate, f"--threads={value}", f"--output={tmp_path / 'o.json'}", "--device=cpu")
    assert "threads must be" in message
