"""The suite itself: its workers agree on what there is to do, and its files can be read."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_says_what_it_checks_and_can_be_read_at_once(path):
    """What tests share has a home of its own, so that each of their files can change alone."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name and name.startswith("test_")]


MARKED = """
import pytest
def test_plain(): pass
@pytest.mark.slow
def test_long(): pass
@pytest.mark.gpu
def test_card(): pass
@pytest.mark.gpu
@pytest.mark.slow
def test_long_card(): pass
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("slow", {"long"}),
        ("not slow", {"plain"}),
        ("", {"plain", "long"}),
        ("gpu", {"card", "long_card"}),
        ("slow and gpu", {"long_card"}),
        ("slow or gpu", {"long", "card", "long_card"}),
        ("not slow and not gpu", {"plain"}),
    ],
)
def test_tests_for_a_gpu_run_only_where_the_expression_speaks_of_it(expression, chosen, tmp_path, capsys):
    (tmp_path / "test_marked.py").write_text(MARKED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    alone = ["-c", str(tmp_path / "pytest.ini"), "-p", "no:xdist", "--import-mode=importlib", "--collect-only", "-q"]
    assert pytest.main([*alone, "-m", expression, str(tmp_path)], plugins=[conftest]) == 0
    assert set(re.findall(r"::test_(\w+)", capsys.readouterr().out)) == chosen


@pytest.mark.slow
def test_tests_have_the_same_names_in_every_process():
    """Neither addresses nor the order of a set, or workers could not share the tests."""

    def collected(seed: str) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-m",
            "",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
        ]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    names = collected("1")
    assert len(names) > 1000
    assert names == collected("2")
