"""Numbers in the prose of notebooks are numbers that the same notebook prints."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
DECIMAL = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?![\w.])")


@pytest.mark.parametrize("name", ["10_modes", "11_horizon", "12_bound", "13_length", "14_collapse", "15_arms"])
def test_every_decimal_is_one_of_the_outputs(name):
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    printed = " ".join(
        value
        for cell in cells
        for output in cell.get("outputs", [])
        for value in [output.get("text", ""), *output.get("data", {}).values()]
        if isinstance(value, str)
    )
    digits = {found.lstrip("+-") for found in DECIMAL.findall(printed)}
    prose = next(cell.source for cell in cells if cell.source.startswith("## What it means"))
    said = {found.lstrip("+-") for found in DECIMAL.findall(prose)}
    assert len(said) > 10
    # a number may be said with a digit less than it is printed with
    rounded = digits | {f"{float(x):.{n}f}" for x in digits for n in (1, 2) if len(x.split(".")[1]) > n}
    assert said <= rounded, said - rounded
