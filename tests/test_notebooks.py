"""The committed notebooks and their runner."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from espo_lightning.notebooks import (
    SETTINGS,
    check_result,
    execute,
    main,
    notebook_parameters,
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
    for statement, answer in result["findings"].items():
        assert f"| {statement} | {answer} |" in printed


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
