"""The rooms of the package, and the arrows between them: imports go one way, and the pure rooms stay pure."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "espo_lightning"
# from the bottom to the top: a room imports only from rooms that stand before it
ROOMS = ("ranges", "keys", "shipped", "tasks", "objectives", "policies", "decoding", "scoring")
ROOMS += ("training", "lab", "programs")
HEAVY = {"torch", "lightning", "transformers", "numpy", "peft", "datasets", "matplotlib"}
PURE = {"ranges": set(), "shipped": set()}
PURE |= {"keys": {"torch"}, "tasks": {"datasets"}, "objectives": {"torch"}, "decoding": {"torch"}}
PURE |= {"scoring": {"torch", "numpy"}, "policies": HEAVY - {"lightning", "datasets", "matplotlib"}}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(name: str) -> str:
    """The room of a module of the package, given its dotted name or path."""
    first = name.split(".")[1]
    return first if first in ROOMS else "programs"


def imports(path: Path, *, at_the_top: bool = False) -> set[str]:
    """Dotted names of what a module imports; ``at_the_top``: only what importing it imports."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def arrows() -> set[tuple[str, str]]:
    """(from, to) for every pair of rooms of which the first imports the second."""
    pairs = {(room(dotted(p)), room(n)) for p in MODULES for n in imports(p) if n.startswith("espo_lightning.")}
    return {(a, b) for a, b in pairs if a != b}


def test_arrows_between_rooms_point_down():
    assert {(a, b) for a, b in arrows() if ROOMS.index(a) < ROOMS.index(b)} == set()


def test_no_module_imports_the_package_itself():
    """Its __init__ imports everything, so that nothing below may import from it."""
    below = [p for p in MODULES if room(dotted(p)) != "programs"]
    public = {f"espo_lightning.{p.stem}" for p in PACKAGE.iterdir() if p.stem != "__init__"}
    for path in below:
        names = {n for n in imports(path) if n.startswith("espo_lightning.")}
        assert {n for n in names if ".".join(n.split(".")[:2]) not in public} == set(), path


def test_the_drawing_shows_these_arrows():
    """docs/structure.md draws the rooms; ``python tests/test_imports.py`` draws it anew."""
    text = (ROOT / "docs" / "structure.md").read_text()
    assert drawing() in text, "run python tests/test_imports.py and put its output into docs/structure.md"


def drawing() -> str:
    """A Mermaid graph of the rooms without arrows that follow from others."""
    edges = arrows()
    above = {a: {b for x, b in edges if x == a} for a in ROOMS}

    def reached(a: str) -> set[str]:
        return above[a].union(*(reached(b) for b in above[a]))

    kept = [(a, b) for a, b in edges if not any(b in reached(c) for c in above[a] - {b})]
    order = sorted(kept, key=lambda e: (-ROOMS.index(e[0]), -ROOMS.index(e[1])))
    return "\n".join(["```mermaid", "graph TD", *(f"    {a} --> {b}" for a, b in order), "```"])


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_pure_rooms_import_nothing_heavy(path):
    where = room(dotted(path))
    if where in PURE:
        assert {n.split(".")[0] for n in imports(path)} & HEAVY <= PURE[where]


def test_lightning_is_imported_in_training_and_above_only():
    users = {room(dotted(p)) for p in MODULES for n in imports(p) if n.split(".")[0] == "lightning"}
    assert users <= {"training", "lab", "programs"}


@pytest.mark.parametrize("folder", sorted({p.parent for p in MODULES} - {PACKAGE}), ids=dotted)
def test_every_room_says_what_lives_there(folder):
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert doc
    assert len(doc.splitlines()) <= 6


def test_verifiers_run_without_torch():
    code = """
import sys, types
package = types.ModuleType("espo_lightning")
package.__path__ = [sys.argv[1]]
sys.modules["espo_lightning"] = package
import espo_lightning.tasks
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(PACKAGE)], check=True)


def code_lines(node: ast.AST) -> int:
    """Lines of a function without its docstring, which may be as long as it is useful."""
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def test_files_and_functions_read_in_one_sitting():
    files = [*MODULES, *(ROOT / "benchmarks").glob("*.py")]
    assert {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 350} == {}
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(p, n) for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, functions)]
    assert {f"{p.name}:{n.name}": code_lines(n) for p, n in found if code_lines(n) > 60} == {}
    module = (PACKAGE / "training" / "module.py").read_text().splitlines()
    assert len(module) < 300


def test_no_module_has_an_unfinished_docstring():
    for path in MODULES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, path
        assert not re.match("todo", doc, re.IGNORECASE), path


if __name__ == "__main__":
    sys.stdout.write(drawing() + "\n")
