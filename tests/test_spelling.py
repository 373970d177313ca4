"""Misspelt flags and keys: refused by every program, with the one that may be meant, before anything is written."""

import inspect
from importlib import import_module

import pytest
from lightning.pytorch import Trainer

from espo_lightning.__main__ import PROGRAMS
from espo_lightning.training.spelling import nearest

SLIPS = {
    "fit": [
        ("--trainer.max_epoch=1", "--trainer.max_epochs"),  # no short form of a flag, but a slip
        ("--trainr.max_epoch=1", "--trainer.max_epochs"),
        ("--max_epochs=1", "--trainer.max_epochs"),
        ("--model.group_siz=3", "--model.group_size"),
        ("--model.objectiv.clip_range=1", "--model.objective.clip_range"),
        ("--model.objective.clip_rang=1", "clip_range"),
        ("--model.policy.pth=x", "path"),
        ("--sed=1 --modl.updates=2", "--seed and --model.updates"),
    ],
    "sft": [("--data.batch=1", "--data.batches")],
    "evaluate": [("--polcy.path=x", "--policy.path"), ("--task=Sudoku --task.empt=3", "empty")],
    "sample": [("--polici=x", "--policies")],
    "export": [("--ouput=x", "--output")],
    "push": [("--licens=mit", "--licence")],
    "cost": [("--hardwar=x", "--hardware")],
    "notebooks": [("--outptu_dir=x", "--output_dir")],
    "leaderboard": [("--out=x", "--output")],
}
FILES = [  # what is written, and what was meant
    ("fit", "trainer:\n  max_epoch: 1\n", "trainer.max_epochs"),
    ("fit", "model:\n  objektive:\n    beta: 1\n", "model.objective.beta"),
    ("fit", "model:\n  objective:\n    bet: 1\n", "beta"),
    ("evaluate", "polic: x\n", "policy"),
]
MOVED = "model.beta is now model.objective.beta"


def said(program: str, *flags: str, capsys) -> str:
    """What a program says as it refuses flags."""
    with pytest.raises(SystemExit) as error:
        import_module(f"espo_lightning.{program}").main(list(flags))
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "Traceback" not in printed.err
    return printed.err


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    yield
    assert sorted(path for path in tmp_path.iterdir() if path.suffix != ".yaml") == before


def test_every_program_is_walked():
    assert set(SLIPS) == set(PROGRAMS)


@pytest.mark.parametrize(("program", "flags", "flag"), [(name, *slip) for name in SLIPS for slip in SLIPS[name]])
def test_a_slip_on_the_command_line_is_told_the_flag_that_may_be_meant(program, flags, flag, capsys):
    assert f"did you mean {flag}?\n" in said(program, *flags.split(), capsys=capsys)


@pytest.mark.parametrize("program", SLIPS)
def test_a_name_far_from_all_flags_suggests_none(program, capsys):
    message = said(program, "--qqxxzz=1", capsys=capsys)
    assert "--qqxxzz" in message
    assert "did you mean" not in message


def test_what_names_share_does_not_make_them_alike(capsys):
    for flag in ("--trainer.qqxxzz=1", "--model.objective.qqxxzz=1"):
        assert "did you mean" not in said("fit", flag, capsys=capsys)


@pytest.mark.parametrize(("program", "text", "key"), FILES)
def test_a_slip_in_a_file_is_told_the_key(program, text, key, tmp_path, capsys):
    (tmp_path / "it.yaml").write_text(text)
    assert f"did you mean {key}?\n" in said(program, "--config=it.yaml", capsys=capsys)


def test_a_flag_that_moved_is_told_where_and_nothing_else(capsys):
    message = said("fit", "--model.beta=1", capsys=capsys)
    assert MOVED in message
    assert "did you mean" not in message


def test_every_flag_of_the_trainer_is_found_again_behind_a_doubled_and_a_missing_letter():
    known = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    for flag in known:
        middle = (len("trainer.") + len(flag)) // 2
        assert nearest(flag[:middle] + flag[middle] + flag[middle:], known) == flag
        assert nearest(flag[:middle] + flag[middle + 1 :], known) == flag
        assert nearest(flag.removeprefix("trainer."), known) == flag
