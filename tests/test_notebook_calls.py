"""What notebooks call: studies over seeds in processes of their own, results, figures."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from study_cases import Inline

from espo_lightning import notebooks
from espo_lightning.lab.plots import COLOURS, legend, line, panels, save
from espo_lightning.notebooks import (
    check_result,
    over_arms,
    over_seeds,
    save_result,
)

ROOT = Path(__file__).parents[1]


# ---- what a notebook calls -------------------------------------------------------------------------------


def study(seed: int, *, log: str, power: int = 2, arms: str = "") -> dict:
    if seed == 13:
        raise RuntimeError("thirteen")
    with open(log, "a") as file:
        file.write(f"{seed}\n")
    return {"value": seed**power}


def test_over_seeds_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ProcessPoolExecutor", Inline)
    log = tmp_path / "log"
    settings = {"cache": tmp_path / "cache", "log": str(log), "power": 3}
    with pytest.raises(RuntimeError, match="thirteen"):
        over_seeds(study, [4, 13, 2], **settings)
    rows = over_seeds(study, [2, 5, 4], **settings)
    assert [(row["seed"], row["value"]) for row in rows] == [(2, 8), (5, 125), (4, 64)]
    assert log.read_text().split() == ["4", "2", "5"]  # neither 2 nor 4 again
    assert [row["value"] for row in over_seeds(study, [2], **(settings | {"power": 1}))] == [2]  # other settings
    assert [row["value"] for row in over_seeds(study, [2], **(settings | {"cache": None}))] == [8]
    assert log.read_text().split() == ["4", "2", "5", "2", "2"]


def test_over_arms_keeps_every_arm_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ProcessPoolExecutor", Inline)
    log = tmp_path / "log"
    settings = {"cache": tmp_path / "cache", "log": str(log)}
    arms = {"square": {}, "cube": {"power": 3}}
    rows = over_arms(study, arms, [3, 2], **settings)
    assert {name: [row["value"] for row in found] for name, found in rows.items()} == {
        "square": [9, 4],
        "cube": [27, 8],
    }
    assert len(list((tmp_path / "cache").rglob("seed_*.json"))) == 4
    more = over_arms(study, arms | {"fourth": {"power": 4}}, [2, 3], **settings)
    assert [row["value"] for row in more["fourth"]] == [16, 81]
    assert len(log.read_text().split()) == 6  # only the new arm
    assert over_seeds(study, [2], power=3, **settings) == [rows["cube"][1]]
    assert over_seeds(study, [2], arms="a setting of the study", **settings)[0]["value"] == 4


@pytest.mark.slow
def test_over_seeds_in_processes_of_one_thread(tmp_path):
    rows = over_seeds(threads, [3, 1], processes=2, cache=tmp_path)
    assert [row["seed"] for row in rows] == [3, 1]
    assert [row["threads"] for row in rows] == [1, 1]
    assert os.getpid() not in {row["process"] for row in rows}


def threads(seed: int) -> dict:
    return {"threads": torch.get_num_threads(), "process": os.getpid()}


@pytest.mark.slow
def test_a_failure_ends_the_others(tmp_path):
    with pytest.raises(RuntimeError, match="thirteen"):
        over_seeds(slow, [13, *range(100, 160)], processes=1, cache=tmp_path)
    assert len(list(tmp_path.rglob("seed_*.json"))) < 10  # those under way; all would take a minute


def slow(seed: int) -> dict:
    time.sleep(1)
    return study(seed, log=os.devnull)


@pytest.mark.slow
def test_workers_end_with_their_kernel(tmp_path):
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time\n"
        "def study(seed):\n"
        "    pathlib.Path('pid.part').write_text(str(os.getpid()))\n"
        "    pathlib.Path('pid.part').rename('pid')\n"
        "    time.sleep(600)\n"
    )
    call = "import endless; from espo_lightning.notebooks import over_seeds; over_seeds(endless.study, [0], cache=None)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    kernel = subprocess.Popen([sys.executable, "-c", call], cwd=tmp_path, env=environment)
    wait_until((tmp_path / "pid").exists)
    kernel.kill()
    kernel.wait()
    worker = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    wait_until(lambda: not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.1)


def good(**changes) -> dict:
    return {
        "parameters": {"seeds": 1},
        "per_seed": [{"seed": 0, "x": [1.0], "seconds": 0.5}],
        "summary": {"x": 1.0},
        "findings": {"it holds": "yes"},
    } | changes


def test_save_result(tmp_path):
    result = save_result(tmp_path, "it", **good())
    assert json.loads((tmp_path / "it" / "result.json").read_text()) == result
    assert result["seconds"] == 0.5
    assert result["versions"]["torch"]
    commit = (ROOT / ".git").exists()
    assert bool(result["commit"]) == commit
    assert isinstance(result["modified"], bool) == commit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary": {"x": [0.0, math.nan]}}, r"\['x'\]\[1\] is nan"),
        ({"per_seed": [{"seed": 0, "x": math.inf, "seconds": 1.0}]}, "is inf"),
        ({"parameters": {"seeds": 2}}, "parameters name 2 seeds, got 1"),
        ({"summary": [1.0]}, "field summary"),
        ({"findings": {"it holds": True}}, "must be one of yes, no, not shown, got {'it holds': True}"),
    ],
)
def test_results_are_checked_before_they_are_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_result(tmp_path, "it", **good(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_result_has_all_fields(tmp_path):
    result = save_result(tmp_path, "it", **good())
    del result["commit"]
    with pytest.raises(ValueError, match="a result has the fields"):
        check_result(result)


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "__file__", str(tmp_path / "notebooks.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert notebooks._commit("it") == (None, None)


def test_numbers_are_rounded(tmp_path):
    result = save_result(tmp_path, "it", **good(summary={"x": [1 / 3, (2e-9 / 3,)], "n": 12345678, "is": True}))
    assert result["summary"] == {"x": [0.333333, [6.66667e-10]], "n": 12345678, "is": True}


def test_a_saved_figure_shows_what_was_written(tmp_path):
    figure, (left, right) = panels("left", "right")
    methods = ("k1", "k1 + score", "k2", "k2_u", "k3", "d1 + k2", "none")
    for i, method in enumerate(methods):
        line(left, [0, 1, 2], [[i, i + 2, 3], [3, i, i + 1]], method)
        line(right, [0, 1], [[0, i]], method)
    legend(figure, columns=4)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(methods)  # each once
    figure.savefig(tmp_path / "all_colours.png")
    picture = save(figure, tmp_path, "01_it", "lines")
    assert picture._repr_png_() == (tmp_path / "01_it" / "lines.png").read_bytes()
    assert str([picture]) == "[lines.png]"
    with Image.open(tmp_path / "all_colours.png") as full, Image.open(picture.path) as small:
        difference = ImageChops.difference(full.convert("RGB"), small.convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 16  # of 255: a palette keeps every method's colour


def test_lines_over_seeds():
    _, (axes, other) = panels("few", "many")
    line(axes, [0, 1], [[1, 2], [3, 6], [2, 4]], "token")
    assert [x.get_ydata().tolist() for x in axes.lines] == [[1, 2], [3, 6], [2, 4], [2, 4]]  # seeds, then the median
    assert {x.get_color() for x in axes.lines} == {COLOURS["token"]}
    line(other, [0], [[v] for v in range(6)], "sequence")
    assert [x.get_ydata().tolist() for x in other.lines] == [[2.5]]


def test_a_kept_result_is_of_the_same_source_assets_and_versions(tmp_path, monkeypatch):
    (tmp_path / "assets" / "policy").mkdir(parents=True)
    for name in ("loss.py", "notebooks.py", "assets/policy/model.safetensors"):
        (tmp_path / name).write_text("one")
    digests = [notebooks.made_of(tmp_path).hexdigest()]
    (tmp_path / "notebooks.py").write_text("two")
    assert notebooks.made_of(tmp_path).hexdigest() == digests[0]
    for name in ("loss.py", "assets/policy/model.safetensors"):
        (tmp_path / name).write_text("two")
        digests.append(notebooks.made_of(tmp_path).hexdigest())
    monkeypatch.setattr(notebooks, "version", lambda package: "0.0")
    digests.append(notebooks.made_of(tmp_path).hexdigest())
    assert len(set(digests)) == 4
