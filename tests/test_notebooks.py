"""The runner, and what every committed notebook must be. Running them at reduced scale is a slow test."""

import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image, ImageChops

from espo_lightning import notebooks
from espo_lightning.lab.plots import COLOURS, legend, line, panels, save
from espo_lightning.notebooks import (
    SETTINGS,
    check_result,
    execute,
    main,
    notebook_parameters,
    over_arms,
    over_seeds,
    save_result,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
REDUCED = yaml.safe_load((FOLDER / "reduced.yaml").read_text())
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

# ---- committed notebooks ---------------------------------------------------------------------------------


def read(path: Path):
    return nbformat.read(path, as_version=4)


def texts(output) -> list[str]:
    return [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]


@each
def test_was_executed_in_order_and_without_errors(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output
            assert len(json.dumps(output)) < 300_000


@each
def test_reads_like_a_notebook(path):
    cells = read(path).cells
    title = cells[0].source.splitlines()[0]
    assert re.fullmatch(rf"# {path.stem[:2]} · .*\?", title), "the title is a question"
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("**Cost**", "**Regenerate**", "## What to expect", "## What it means", "$$"):
        assert part in prose, part
    tags = [cell.metadata.get("tags", []) for cell in cells]
    assert [t for t in tags if t] == [["parameters"]]
    assert read(path).metadata.kernelspec.name == "python3"


@each
def test_names_no_folder_of_a_machine(path):
    notebook = read(path)
    shown = [text for cell in notebook.cells for output in cell.get("outputs", []) for text in texts(output)]
    metadata = [json.dumps(notebook.metadata), *(json.dumps(cell.metadata) for cell in notebook.cells)]
    for text in [*(cell.source for cell in notebook.cells), *shown, *metadata]:
        assert not re.search(r"(?<![\w.:/])/(?:[a-z]+/)+", text, re.IGNORECASE), text[:200]


@each
def test_result_belongs_to_the_notebook(path):
    folder = FOLDER / "results" / path.stem
    result = json.loads((folder / "result.json").read_text())
    check_result(result)
    assert result["name"] == path.stem
    assert result["parameters"] == {k: v for k, v in notebook_parameters(path).items() if k not in SETTINGS}
    assert [row["seed"] for row in result["per_seed"]] == list(range(result["parameters"]["seeds"]))
    images = [o for cell in read(path).cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(list(folder.glob("*.png"))) == len(images) > 0
    printed = "".join(text for cell in read(path).cells for output in cell.get("outputs", []) for text in texts(output))
    for statement, held in result["findings"].items():
        assert ("yes   " if held else "NO    ") + statement in printed


@each
def test_reduced_values_are_parameters(path):
    known = notebook_parameters(path)
    reduced = REDUCED[path.stem]
    assert set(reduced) <= set(known) - set(SETTINGS)
    assert all(type(value) is type(known[key]) for key, value in reduced.items())
    assert reduced["seeds"] > 1  # one seed hides mistakes in what is drawn over seeds


def test_reduced_names_no_other_notebook():
    assert set(REDUCED) == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
def test_all_run_at_reduced_scale(tmp_path):
    before = {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    done = execute(reduced=True, folder=str(FOLDER), output_dir=str(tmp_path))
    assert [path.name for path in done] == [path.name for path in NOTEBOOKS]
    for path in done:
        check_result(json.loads((tmp_path / "results" / path.stem / "result.json").read_text()))
    assert {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_every_control_of_the_form_draws_a_picture():
    """As in a browser: a new value of any control runs the form again."""
    path = FOLDER / "07_gradient_noise.ipynb"
    values = {k: v for k, v in (notebook_parameters(path) | REDUCED[path.stem]).items() if k not in SETTINGS}
    lines = [
        *(f"{key} = {value!r}" for key, value in values.items()),
        "from espo_lightning import ELBO, sequence_ratio",
        "from espo_lightning.lab.plots import BLUE, GREY, ORANGE, panels",
        "from espo_lightning.lab.studies import points",
    ]
    moves = """
def choices(control):
    if hasattr(control, "options"):
        return control.options
    return (control.min, control.max) if hasattr(control, "min") else (True, False)

shown = {}
for control in form.widget.children[:-1]:
    for value in choices(control):
        control.value = value
        shown[f"{control.description} = {value}"] = [list(o.get("data", o)) for o in form.widget.out.outputs]
import json
print(json.dumps(shown))
"""
    sources = ["\n".join(lines), read(path).cells[-1].source, moves]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = json.loads(notebook.cells[-1].outputs[-1].text)
    assert {name.split(" =")[0] for name in shown} > {"puzzle", "after_updates", "M", "coupled", "clip_nats", "batch"}
    assert all(len(outputs) == 1 and "image/png" in outputs[0] for outputs in shown.values()), shown


# ---- the runner ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one small notebook, as the working directory's ``notebooks``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_code_cell('a: int = 1\nresults: str = "results"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("from pathlib import Path\nb = 6 / a\nprint(b)"),
        nbformat.v4.new_code_cell(
            'Path(results, "01_it").mkdir(parents=True, exist_ok=True)\nPath(results, "01_it", "b").write_text(str(b));'
        ),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "01_it.ipynb")
    (tmp_path / "notebooks" / "reduced.yaml").write_text("01_it: {a: 2}\n")
    return tmp_path / "notebooks"


def test_runner(folder, tmp_path, capsys):
    def printed(path: Path) -> str:
        return read(path).cells[-2].outputs[0].text.strip()

    main([])  # as committed: in place
    assert printed(folder / "01_it.ipynb") == "6.0"
    assert (folder / "results" / "01_it" / "b").read_text() == "6.0"
    assert "papermill" not in (folder / "01_it.ipynb").read_text()
    main(["--name=01", "--reduced=true"])  # anything else: beside it
    assert printed(tmp_path / "build" / "notebooks" / "01_it.ipynb") == "3.0"
    assert (tmp_path / "build" / "notebooks" / "results" / "01_it" / "b").read_text() == "3.0"
    assert (folder / "results" / "01_it" / "b").read_text() == "6.0"
    main(["--reduced=true", "--parameters.a=3", "--output_dir=out"])  # the command line wins
    assert printed(tmp_path / "out" / "01_it.ipynb") == "2.0"
    committed = (folder / "01_it.ipynb").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(parameters={"a": 0}, output_dir="notebooks")
    assert (folder / "01_it.ipynb").read_bytes() == committed  # a failed run costs nothing
    assert execute(name="01") == [Path("notebooks/01_it.ipynb")]  # and what it left is no notebook
    assert capsys.readouterr().out.count("01_it.ipynb") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": {"aa": 3}}, "notebook 01_it has no parameter aa; it has: a, results"),
        ({"seeds": 3}, "has no parameter seeds"),
        ({"name": "02"}, "no notebook in notebooks starts with '02'; there are: 01_it"),
        ({"folder": "elsewhere"}, "name theirs with --folder, or leave it out for those of the package"),
    ],
)
def test_runner_refuses(folder, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        execute(**arguments)
    assert not Path("build").exists()


def test_command_line_refuses_in_one_sentence(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--parameters.aa=3"])
    assert stopped.value.code == 2
    assert "has no parameter aa" in capsys.readouterr().err


# ---- what a notebook calls -------------------------------------------------------------------------------


def study(seed: int, *, log: str, power: int = 2, arms: str = "") -> dict:
    if seed == 13:
        raise RuntimeError("thirteen")
    with open(log, "a") as file:
        file.write(f"{seed}\n")
    return {"value": seed**power}


class Inline:
    """An executor without processes."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except RuntimeError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options):
        pass


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
        "findings": {"it holds": True},
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
    assert notebooks._commit() == (None, None)


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
