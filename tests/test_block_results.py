"""The tables of docs/block_policies.md are what benchmarks/results holds."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("name", ["blocks", "block_quality"])
def test_the_tables_are_those_of_the_results(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for module in ("measure", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    results = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    table = import_module(name).table(results)
    assert table in (ROOT / "docs" / "block_policies.md").read_text(), f"python benchmarks/{name}.py --table"


def test_a_best_rate_at_the_edge_is_no_choice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quality = import_module("block_quality")
    runs = {
        f"full, lr {rate:g}, seed {quality.TUNING_SEED}": [(0.0, 0.0), (float(n), quality.TARGET)]
        for n, rate in enumerate(quality.RATES, 1)
    }
    with pytest.raises(ValueError, match=r"full: learning rate 0\.0001 is the smallest"):
        quality.chosen(runs, "full")
    runs[f"full, lr {quality.RATES[1]:g}, seed {quality.TUNING_SEED}"] = [(0.0, 0.0), (0.5, 1.0)]
    assert quality.chosen(runs, "full") == quality.RATES[1]
