"""What numbers show: yes, no, or not shown; a finding needs an interval that excludes its opposite."""

import ast
import json
import random
import re
from itertools import product
from pathlib import Path

import nbformat
import pytest

from espo_lightning.lab.evidence import (
    ANSWERS,
    above,
    all_of,
    any_of,
    below,
    correlation_interval,
    interval,
    opposite,
    paired,
    seen,
    within,
)
from espo_lightning.lab.studies import rank_correlation

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))


def test_an_answer_needs_an_interval_that_excludes_the_opposite():
    assert above((0.1, 0.3)) == "yes"
    assert above((-0.3, -0.1)) == "no"
    assert above((-0.1, 0.3)) == "not shown"
    assert above((0.0, 0.3)) == "not shown"  # zero itself is not excluded
    assert [below(x, 0.2) for x in ((0.0, 0.1), (0.3, 0.4), (0.1, 0.3))] == ["yes", "no", "not shown"]
    assert [within(x, -0.1, 0.1) for x in ((-0.05, 0.05), (0.2, 0.3), (-0.05, 0.2))] == ["yes", "no", "not shown"]
    assert [seen(True), seen(False)] == ["yes", "no"]


def test_answers_combine_as_their_statements_do():
    for answers in product(ANSWERS, repeat=2):
        expected = "no" if "no" in answers else "not shown" if "not shown" in answers else "yes"
        assert all_of(answers) == expected
        assert any_of(answers) == opposite(all_of(map(opposite, answers)))
    assert (all_of([]), any_of([])) == ("yes", "no")
    assert [opposite(answer) for answer in ANSWERS] == ["no", "yes", "not shown"]


def test_intervals_of_few_values():
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9629, 3 + 1.9629), abs=1e-3)  # 2.776 sqrt(2.5 / 5)
    assert paired([1.1, 5.1, 9.1], [1.0, 5.0, 9.0]) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="from 2 to 16 values, got 1"):
        interval([1.0])
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("n", [8, 15, 40])
def test_intervals_of_rank_correlations_cover_the_truth(n):
    """Pairs without any relation: 95 % of the intervals hold 0, give or take what 400 trials say."""
    draw, covered = random.Random(n), 0
    for _ in range(400):
        pairs = [(draw.random(), draw.random()) for _ in range(n)]
        low, high = correlation_interval(rank_correlation(*zip(*pairs)), n)
        covered += low <= 0 <= high
    assert 0.91 < covered / 400 < 0.99
    assert correlation_interval(0.9, 3) == (-1.0, 1.0)
    assert correlation_interval(1.0, 20)[0] > 0.99


def test_the_correlation_that_was_called_a_finding_is_not_shown():
    """-0.10 over 15 pairs, of which a "yes" was once made."""
    low, high = correlation_interval(-0.10, 15)
    assert (round(low, 1), round(high, 1)) == (-0.6, 0.4)
    assert below((low, high)) == "not shown"


# ---- the notebooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_findings_are_answers_of_one_rule(path):
    """Every value of a notebook's findings is a call of this module; none is a comparison of two medians."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = {name for cell in cells for name in imported(cell)}
    values = [value for cell in cells for value in answers(ast.parse(cell))]
    assert len(values) > 3
    for value in values:
        assert isinstance(value, ast.Call), ast.unparse(value)
        assert ast.unparse(value.func) in names, ast.unparse(value)
        assert not re.match(r"seen\(.*\b(median|mean)\(", ast.unparse(value)), "what is seen is no average"
    result = json.loads((FOLDER / "results" / path.stem / "result.json").read_text())
    assert set(result["findings"].values()) <= set(ANSWERS)


def imported(source: str) -> list[str]:
    """What a cell imports from this module."""
    return [
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "espo_lightning.lab.evidence"
        for alias in node.names
    ]


def answers(tree: ast.Module) -> list[ast.expr]:
    """The values that a cell assigns to statements: ``findings = {...}`` and ``findings[...] = ...``."""
    found = []
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "findings")
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if ast.unparse(target) == "findings":
                    found += node.value.values
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == "findings":
                    found.append(node.value)
    return found
