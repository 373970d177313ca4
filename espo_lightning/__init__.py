"""ESPO (arXiv:2512.03759): reinforcement learning for diffusion language models, on PyTorch Lightning."""

import ast
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

if Path((sys.argv or [""])[0]).name in ("-m", "espo"):  # a program, whose threads sleep while they wait: see threads.py
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What is public, and where it is: the imports of `__init__.pyi`, which type checkers and editors read as well. A name
# is imported when it is first used, so that a program without training does not wait for Lightning.
WHERE = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = sorted(WHERE)


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = thing = getattr(import_module(WHERE[name]), name)
    return thing


def __dir__() -> list[str]:
    return sorted({*globals(), *WHERE})
