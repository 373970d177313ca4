"""A committed notebook opens as a page: unchanged by Jupyter, numbers in tables, findings that need no code."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from espo_lightning.lab.plots import Table, verdicts
from espo_lightning.notebooks import _as_opened

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
WIDTH = 110  # characters of a line that a page shows without wrapping it
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def shown(path: Path) -> list[str]:
    """Every text that the outputs of a notebook show; that of a picture or table is the name of its kind."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    return [
        output["text"] if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in outputs
        if not (output.get("data", {}).keys() & {"image/png", "text/markdown"} or is_form(output))
    ]


def is_form(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a widget, which a kernel draws."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


@each
def test_a_file_is_as_jupyter_would_write_it(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert text == nbformat.writes(notebook).rstrip("\n") + "\n"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    assert notebook.metadata.kernelspec == kernel  # as ipykernel names itself; Jupyter puts it there otherwise


@each
def test_the_runner_would_write_the_same_file(path, tmp_path):
    copy = tmp_path / path.name
    notebook = json.loads(path.read_text())
    notebook["metadata"] |= {"papermill": {"duration": 1}, "widgets": {}}
    notebook["metadata"]["kernelspec"]["display_name"] = "Python 3"
    notebook["cells"][0]["metadata"]["papermill"] = {"status": "completed"}
    copy.write_text(json.dumps(notebook))
    _as_opened(copy)
    assert copy.read_text() == path.read_text()


@each
def test_outputs_are_plain_lines_that_a_page_does_not_wrap(path):
    for text in shown(path):
        assert "\x1b" not in text
        assert max(map(len, text.splitlines()), default=0) <= WIDTH, text[:300]


@each
def test_findings_are_sentences_of_their_own(path):
    """A capital letter at the beginning, a full stop at the end, and nothing that another sentence must explain."""
    findings = json.loads((FOLDER / "results" / path.stem / "result.json").read_text())["findings"]
    for sentence in findings:
        assert re.fullmatch(r"[A-Z].*\.", sentence), sentence
        assert len(sentence.split()) > 4, sentence
        assert not re.match(r"(Nor|And|But|Or|So|Then|It|They|This|These)\b", sentence), sentence
        assert not re.search(r"\b(it|they|them)\b", sentence.split(":")[0], re.IGNORECASE), sentence


def test_a_table_is_markdown():
    table = Table(["", "M = 1"], [["token", 0.5], ["sequence", "0.250"]])
    lines = ["|  | M = 1 |", "| --- | ---: |", "| token | 0.5 |", "| sequence | 0.250 |"]
    assert table._repr_markdown_() == "\n".join(lines)
    assert "| It rains. | no |" in verdicts({"It rains.": "no"})._repr_markdown_()
