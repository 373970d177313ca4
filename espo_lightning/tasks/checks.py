"""The tests of code tasks: what counts as one, and which of its names come from the program."""

import ast
import builtins
import re
import sys
from collections.abc import Iterable, Sequence

MODULES = {"np": "numpy"}  # names that tests use for modules without an import
_COMPARES = re.compile(r"close|approx|almost|equal|same|equiv|compare|match|check|assert", re.IGNORECASE)


def split_tests(body: list[ast.stmt], defined: Sequence[ast.stmt] = ()) -> tuple[str, ...]:
    """Statements as separate tests; what only prepares goes with the next test.

    A test asserts something, itself or by a function of ``defined`` or of its own that does; a ``print`` or a bare call
    does not. Assertions of a constant are left out: some HumanEval tests hold ``assert True``, which all programs pass.
    """
    tests, pending, asserting = [], [], asserting_functions([*defined, *body])
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant):
            continue
        pending.append(ast.unparse(statement))
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef) and _asserts(statement, asserting):
            tests.append("\n".join(pending))
            pending = []
    return tuple(tests)


def asserting_functions(body: Sequence[ast.stmt]) -> set[str]:
    """Names of the functions that assert or raise, or that call one that does."""
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    found: set[str] = set()
    while more := {name for name, node in functions.items() if name not in found and _asserts(node, found)}:
        found |= more
    return found


def _asserts(node: ast.AST, asserting: set[str]) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.Assert | ast.Raise):
            return True
        if isinstance(part, ast.Call):
            name = part.func.id if isinstance(part.func, ast.Name) else getattr(part.func, "attr", "")
            if name in asserting or (isinstance(part.func, ast.Attribute) and name.startswith("assert")):
                return True
    return False


def asserts(test: str) -> bool:
    """Is it Python that asserts something? Generated test sets hold a few that are neither."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError):
        return False
    return bool(split_tests(tree.body)) and len(tree.body) > 0


def needed_names(scripts: Sequence[str], defined: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(exports, modules): names that the scripts must take from the program, and modules that they use.

    Built-ins and modules are never taken from a program, or it could replace ``all`` or ``np.allclose``; except that a
    top-level name of the reference solution ``defined`` may shadow a built-in (MBPP asks for a function ``sum``). Nor
    is what compares a result with the expected value, see `comparing_names`.
    """
    used, called, bound = set(), set(), set()
    for node in ast.walk(ast.parse("\n".join(scripts))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    reference = {node.name for node in ast.parse(defined).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    free = (used - bound - set(dir(builtins))) | (used & reference)
    modules = {n for n in free if n in sys.stdlib_module_names or n in MODULES or n in MODULES.values()}
    modules -= {n for n in called if n not in MODULES} | reference
    return tuple(sorted(free - modules - comparing_names(scripts))), tuple(sorted(modules))


def comparing_names(scripts: Iterable[str]) -> set[str]:
    """Free functions that judge a result, as ``is_close(f(1), 0.5)`` does: by their name, and as every call shows.

    Taken from the program they would let it pass everything, and would show it the expected values.
    """
    judged, other = set(), set()
    tree = ast.parse("\n".join(scripts))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        inner = {
            part.func.id
            for argument in node.args
            for part in ast.walk(argument)
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id != node.func.id
        }
        judges = bool(inner - set(dir(builtins))) and len(node.args) + len(node.keywords) > 1
        (judged if judges and _COMPARES.search(node.func.id) else other).add(node.func.id)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return judged - other - defined


def trusted_setup(scripts: Sequence[str], defined: str = "") -> str:
    """Code that gives the tests their `comparing_names`: of the reference solution, else of ``math`` if it has them."""
    names, lines = comparing_names(scripts), []
    reference = {node.name for node in ast.parse(defined).body if isinstance(node, ast.FunctionDef)}
    if names & reference:
        lines.append(defined)  # whole, as the function may need others; what the program exports replaces its namesakes
    lines += [f"from math import {name}" for name in sorted(names - reference) if name == "isclose"]
    return "\n".join(lines)
