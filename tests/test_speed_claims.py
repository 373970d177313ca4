"""What the pages say about speed is what `benchmarks/results` holds, and every table names its file."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import speed_tables
from speed_tables import RESULTS, ROOT, stored

SPEED, NOTES = ROOT / "docs/speed.md", ROOT / "benchmarks/NOTES.md"


@pytest.mark.parametrize("page", speed_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_stored_files(page):
    assert "<!-- table:" in page.read_text()
    assert speed_tables.written(page) == page.read_text(), "python benchmarks/speed_tables.py"


@pytest.mark.parametrize("page", speed_tables.PAGES, ids=lambda page: page.name)
def test_the_section_of_a_table_names_its_files(page, monkeypatch):
    for section in re.split(r"(?m)^## ", page.read_text()):
        for name in re.findall(r"<!-- table: (\w+) -->", section):
            read: list[str] = []
            monkeypatch.setattr(speed_tables, "stored", lambda file, read=read: read.append(file) or stored(file))
            speed_tables.TABLES[name]()
            assert read
            assert [file for file in read if f"results/{file}.json" not in section] == [], name


def test_a_wrong_number_is_found(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(re.sub(r"\| (0\.\d\d) \[", "| 9.99 [", SPEED.read_text(), count=1))
    assert page.read_text() != SPEED.read_text()
    assert speed_tables.written(page) != page.read_text()


def tokens(file: str, one: str, other: str) -> float:
    speeds = stored(file)["tokens_per_second"]
    return speeds[one]["median"] / speeds[other]["median"]


def early_stop() -> list[str]:
    found = stored("decoding")["countdown"]["early_stop"]
    assert found["changed_texts"] == 0
    return [f"{found['passes_early']:.1f}", f"{found['passes']:.0f}"]


def eager() -> str:
    """How much faster a pass of bfloat16 trains without sdpa."""
    took = stored("one_pass")["milliseconds"]
    return f"{took['bfloat16, sdpa']['trained']['median'] / took['bfloat16, eager']['trained']['median']:.1f}"


def threshold(bar: float | None, key: str) -> float:
    rows = stored("decoding_trained")["sudoku"]["threshold_one_block"]
    return next(row[key] for row in rows if row["threshold"] == bar)


CLAIMS = [  # page, words with a place for each number, the numbers
    (NOTES, "it decodes {} times as many tokens", lambda: [f"{tokens('decoding', 'prefix_cache', 'full'):.1f}"]),
    (NOTES, "Countdown takes {} passes instead of {}, and no text changed", early_stop),
    (NOTES, "bfloat16 trains {} times faster with", lambda: [eager()]),
    (ROOT / "docs/commands.md", "eager trains {} times faster", lambda: [eager()]),
    (SPEED, "a trained Sudoku policy with a head of {:,} tokens", lambda: [stored("wide_vocabulary")["vocabulary"]]),
    (
        ROOT / "docs/real_checkpoints.md",
        "it decoded {} times faster on a long canvas",
        lambda: [f"{tokens('decoding', 'prefix_cache', 'full'):.1f}"],
    ),
    (
        ROOT / "docs/real_checkpoints.md",
        "took {} instead of {} passes, for {} instead of {}",
        lambda: [
            *(f"{threshold(bar, 'passes'):.{digits}f}" for bar, digits in ((0.99, 1), (None, 0))),
            *(f"{threshold(bar, 'exact'):.3f}" for bar in (0.99, None)),
        ],
    ),
]


@pytest.mark.parametrize(("page", "words", "numbers"), CLAIMS, ids=[words for _, words, _ in CLAIMS])
def test_a_number_in_prose_is_the_stored_one(page, words, numbers):
    prose = " ".join(page.read_text().split())
    assert words.format(*numbers()) in prose


def test_no_ratio_stands_in_prose_without_a_file():
    """In docs/speed.md numbers stand in tables, or are claims; so a new one must come with its file."""
    prose = " ".join(re.sub(r"<!-- table: \w+ -->\n+(?:\|.*\n)*", "", SPEED.read_text()).split())
    for page, words, numbers in CLAIMS:
        if page == SPEED:
            prose = prose.replace(words.format(*numbers()), "")
    assert re.findall(r"\d+\.\d+|\d+ %|\d+ times", prose) == []


def test_what_was_measured_beside_the_authors_trainer_says_where():
    found = json.loads((RESULTS / "authors.json").read_text())
    assert "published commit (AVX2 processor)" in found["provenance"]
    assert found["host"]["bfloat16"] == []
    for page in (SPEED, NOTES):
        prose = " ".join(page.read_text().split()).lower()
        assert "measured in one run beside the authors' trainer at its published commit" in prose
        assert "no command here" in prose


@pytest.mark.parametrize("name", ["step", "growth", "quality", "one_pass", "wide_vocabulary", "memory", "default_run"])
def test_a_timing_names_its_processor(name):
    assert {"processor", "vectors", "bfloat16", "torch"} <= stored(name)["host"].keys()


def test_the_verifiers_page_has_the_stored_speed_of_the_sandboxes():
    text = " ".join((ROOT / "docs" / "verifiers.md").read_text().split())
    speeds = [round(stored("sandbox")[kind]["per_second"]) for kind in ("bwrap", "stdlib")]
    assert "they ran {} and {} programs a second".format(*speeds) in text
