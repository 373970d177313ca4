"""A program chooses how many threads of a CPU it computes with, says so, and keeps to it when it goes on."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from run_cases import SFT, checkpoint, ends, refused, tiny_fixture  # noqa: F401

import espo_lightning
from espo_lightning import evaluate, fit, new_policy, sft
from espo_lightning.training.run_checkpoint import RECORD
from espo_lightning.training.threads import ENVIRONMENT, LARGE, choose_threads, computing_with, threads_for

pytestmark = pytest.mark.usefixtures("global_generators_untouched", "threads_as_they_were")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture
def threads_as_they_were(monkeypatch):
    """No environment, and threads that are counted but not had: on a busy machine two of them are slow."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    numbers = [1]
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    yield
    assert numbers[-1] == 1  # every program gives back what it changed


@pytest.fixture
def small():
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24)


def totals(row: dict, clock: str) -> dict[str, float]:
    """Seconds of rollout and updates together, by the number of threads."""
    return {n: sum(row[n][phase][clock]["median"] for phase in ("rollout", "update")) for n in ("1", "2")}


def test_a_small_policy_has_one_thread_and_a_large_one_all_of_them():
    assert [threads_for(n, 16) for n in (100, LARGE - 1, LARGE, 10**10)] == [1, 1, 16, 16]
    assert threads_for(10**10, 1) == 1


def test_the_numbers_that_the_choice_rests_on_are_the_stored_ones():
    """On a busy machine two threads that spin never paid; those that sleep cost little, and at last nothing."""
    spinning, sleeping = (
        {row["size"]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
        for name in ("threads", "threads_passive")
    )
    ratios = {
        kind: {size: (cpu := totals(row, "cpu"))["2"] / cpu["1"] for size, row in rows.items()}
        for kind, rows in (("spinning", spinning), ("sleeping", sleeping))
    }
    assert round(ratios["spinning"]["0.46M"]) == 39
    assert int(ratios["spinning"]["135M"]) == 7
    assert min(ratios["spinning"].values()) > 7
    assert max(ratios["sleeping"].values()) < 1.25
    large = [size for size, row in sleeping.items() if row["parameters"] >= LARGE]
    assert large
    assert all(ratios["sleeping"][size] < 1.1 for size in large)


def test_the_table_of_the_notes_has_the_stored_numbers():
    notes = (RESULTS.parent / "NOTES.md").read_text().split("## Threads")[1]
    stored = {
        name: json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in ("threads", "threads_passive")
    }
    found = {m[1]: m[2].split("|") for m in re.finditer(r"^\| ([\d.]+M) \| (.*) \|$", notes, re.MULTILINE)}
    assert list(found) == [row["size"] for row in stored["threads"]]
    for column, (name, clock) in enumerate(product(stored, ("cpu", "wall"))):
        ratios = {row["size"]: (took := totals(row, clock))["2"] / took["1"] for row in stored[name]}
        told = {size: float(cells[column]) for size, cells in found.items() if cells[column].strip()}
        assert told.keys() == ratios.keys()
        assert all(
            told[size] == pytest.approx(ratio, abs=0.6 if ratio > 10 else 0.06) for size, ratio in ratios.items()
        )


def test_a_user_and_the_environment_come_first_then_the_run_so_far(small, monkeypatch):
    with computing_with(4):
        assert choose_threads(None, small) == 1
        assert choose_threads(3, small) == 3
        assert choose_threads(None, small, earlier=2) == 2
        assert choose_threads(3, small, earlier=2) == 3
        monkeypatch.setattr("espo_lightning.training.threads.LARGE", 1)
        assert choose_threads(None, small) == 4
        assert choose_threads(None, small, processes=2) == 2
        assert choose_threads(None, small, processes=8) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "4")  # which torch has read when it was loaded
        assert choose_threads(None, small, processes=2, earlier=2) == 4
        assert choose_threads(3, small) == 3


def test_fit_says_it_and_a_resume_keeps_it_or_says_what_changed(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert ends(fit, *tiny, "--data.batches=2", "--checkpoint_every=1", "--threads=2", f"--run_dir={run_dir}") == 0
    assert "computing with 2 threads of the CPU" in capsys.readouterr().out
    assert json.loads((run_dir / "summary.json").read_text())["threads"] == 2
    assert torch.load(checkpoint(run_dir, 1), weights_only=True)[RECORD]["threads"] == 2

    assert ends(fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--data.batches=3") == 0
    printed = capsys.readouterr().out
    assert "computing with 2 threads" in printed
    assert "round differently" not in printed
    assert json.loads((run_dir / "summary.json").read_text())["resumed"][-1]["changed"] == {"data.batches": [2, 3]}

    assert ends(fit, f"--ckpt_path={checkpoint(run_dir, 3)}", "--data.batches=4", "--threads=1") == 0
    assert "computing with 1 thread of the CPU (--threads=N for another number); it was 2" in capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["resumed"][-1]["changed"] == {"data.batches": [3, 4], "threads": [2, 1]}
    assert summary["threads"] == 1


def test_one_thread_asked_for_where_one_was_chosen_is_no_change(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    fit.main([*tiny, "--data.batches=1", f"--run_dir={run_dir}"])
    fit.main([f"--ckpt_path={checkpoint(run_dir, 1)}", "--data.batches=2", "--threads=1"])
    assert "round differently" not in capsys.readouterr().out
    assert json.loads((run_dir / "summary.json").read_text())["resumed"][-1]["changed"] == {"data.batches": [1, 2]}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "nan"])
@pytest.mark.parametrize("program", [fit, sft, evaluate])
def test_no_number_of_threads_is_refused(program, value, tmp_path, capsys):
    path = tmp_path / "out"
    where = f"--output={path}" if program is evaluate else f"--run_dir={path}"
    assert "threads" in refused(capsys, program, where, f"--threads={value}")
    assert not path.exists()


def test_sft_and_evaluate_choose_too(tmp_path, capsys):
    sft.main([*SFT, "--data.batches=1", "--threads=2", f"--run_dir={tmp_path / 'run'}"])
    assert "computing with 2 threads of the CPU" in capsys.readouterr().out
    flags = ["--problems=2", "--task=failing_tasks.Failing", f"--policy.path={tmp_path / 'run' / 'policy'}"]
    flags += ["--decoding.length=4", "--decoding.block_length=4", "--decoding.steps=4", "--device=cpu"]
    for number in (1, 2):
        evaluate.main([*flags, f"--output={tmp_path / f'{number}.json'}", *(["--threads=2"] if number == 2 else [])])
        assert json.loads((tmp_path / f"{number}.json").read_text())["threads"] == number
        assert f"2 problems, {number} thread" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "given", "found"),
    [(["-m"], None, "passive"), (["-m"], "active", "active"), (["train.py"], None, None), ([""], None, None)],
)
def test_threads_of_a_program_sleep_while_they_wait_and_an_import_changes_nothing(argv, given, found, monkeypatch):
    """While Python looks for a program, ``python -m espo_lightning.fit``, argv begins with -m; never after."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    before_torch = Path(espo_lightning.__file__).read_text().split("# What is public", 1)[0]
    exec(before_torch, {})
    assert os.environ.pop("OMP_WAIT_POLICY", None) == found


@pytest.mark.slow
def test_it_does_so_in_a_process_of_its_own(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import espo_lightning.ranges\n")  # as one of ours is begun
    (tmp_path / "program" / "__main__.py").write_text("import os; print(os.environ['OMP_WAIT_POLICY'])\n")
    kept = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    kept["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "program"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=kept).stdout == "passive\n"
