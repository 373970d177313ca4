"""Which module may import which: the layering that keeps the pure parts pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "espo_lightning"
ALLOWED = {
    "masking": set(),
    "loss": set(),
    "formats": set(),
    "policy": set(),
    "likelihood": {"masking"},
    "sampler": {"masking"},
    "autoregressive": {"masking", "sampler"},
    "exact": {"masking"},
    "gradients": {"exact", "likelihood", "masking"},
    "plots": set(),
    "notebooks": {"cli"},
    "scratch": {"policy"},
    "adaptation": set(),
    "checkpoint": {"adaptation", "formats", "policy", "strategies"},
    "verdicts": {"tasks"},
    "flops": {"masking", "policy", "sampler"},
    "cost": {"checkpoint", "cli", "flops", "formats", "likelihood", "masking", "policy", "sampler"},
    "data": {"tasks"},
    "zero": set(),
    "strategies": {"zero"},
    "runs": {"policy", "strategies"},
    "cli": {"runs", "strategies"},
    "lm_eval_adapter": {"likelihood", "masking", "policy", "sampler"},
    "export": {"checkpoint", "formats", "cli"},
    "shards": set(),
    "protocols": {"sampler"},
    "evaluate": {"cli", "masking", "policy", "protocols", "sampler", "shards", "strategies", "tasks", "verdicts"},
    "module": {
        "checkpoint",
        "likelihood",
        "loss",
        "masking",
        "policy",
        "runs",
        "sampler",
        "strategies",
        "tasks",
        "verdicts",
    },
    "sft": {"cli", "data", "likelihood", "masking", "policy", "runs", "strategies", "tasks"},
    "fit": {"cli", "data", "module", "runs"},
}


STUDIES = {  # what any of them may import, beside each other
    "autoregressive", "checkpoint", "cost", "data", "evaluate", "exact", "flops", "gradients", "likelihood", "loss",
    "masking", "module", "policy", "sampler", "sft", "studies", "tasks",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {node.module} if node.module != "espo_lightning" else {f"espo_lightning.{a.name}" for a in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_modules_import_only_what_lies_below_them(path):
    if path.stem == "__init__":
        return
    own = {name.split(".")[1] for name in imports(path) if name.startswith("espo_lightning.")}
    assert own <= ALLOWED[path.stem]


def test_studies_lie_above_everything_but_the_runner():
    for path in (PACKAGE / "studies").glob("*.py"):
        own = {name.split(".")[1] for name in imports(path) if name.startswith("espo_lightning.")}
        assert own <= STUDIES, path
    for path in PACKAGE.glob("*.py"):
        assert not any(name.startswith("espo_lightning.studies") for name in imports(path)), path


def test_tasks_and_pure_modules_import_nothing_heavy():
    heavy = {"torch", "lightning", "transformers", "numpy", "peft"}
    for path in (PACKAGE / "tasks").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & heavy, path
    for name in ("loss", "masking", "likelihood", "sampler", "autoregressive", "adaptation"):
        roots = {found.split(".")[0] for found in imports(PACKAGE / f"{name}.py")}
        assert roots & heavy <= {"torch", "numpy"}, name


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


def test_line_counts_stay_readable():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}
