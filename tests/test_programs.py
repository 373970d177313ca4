"""Programs in texts: which block is the program, what tests are, where names come from."""

import json

import pytest
from conftest import assert_linear
from program_cases import (
    HUMANEVAL,
    MBPP_ROWS,
    box_fixture,  # noqa: F401
    isolated,
)

from espo_lightning.tasks.checks import asserts, needed_names, split_tests, trusted_setup
from espo_lightning.tasks.code import MBPP, AceCode, HumanEval, counting_tests, judge
from espo_lightning.tasks.programs import assemble, extract_code

GOOD = "def f(x):\n    return x + 1\n"
F, W, Q = "```", "~~~", '"""'


def indented(text: str, by: str) -> str:
    return "".join(by + line for line in text.splitlines(keepends=True))


FENCED = {
    **{f"label {label!r}": f"{F}{label}\n{GOOD}{F}" for label in ("Python", "python3", "PYTHON", "py", "Py3", "")},
    "attributes": f'{F}python title="a.py"\n{GOOD}{F}',
    "attributes in braces": f"{F}{{.python .numberLines}}\n{GOOD}{F}",
    "file name": f"{F}python:a.py\n{GOOD}{F}",
    "space before the label": f"{F} python\n{GOOD}{F}",
    "tildes": f"{W}python\n{GOOD}{W}",
    "tildes without a label": f"{W}\n{GOOD}{W}",
    "four backticks": f"{F}`python\n{GOOD}{F}`",
    "list item": f"1. Here:\n   {F}python\n{indented(GOOD, '   ')}   {F}",
    "list item with a bullet": f"- So:\n\n  {F}python\n{indented(GOOD, '  ')}  {F}\n- done",
    "nested list": f"- a\n  - b\n    {F}python\n{indented(GOOD, '    ')}    {F}",
    "indented by three": f"   {F}python\n{indented(GOOD, '   ')}   {F}",
    "indented by four": f"    {F}python\n{indented(GOOD, '    ')}    {F}",
    "quoted": f"> {F}python\n{indented(GOOD, '> ')}> {F}",
    "in a tag": f"<answer>\n{F}python\n{GOOD}{F}\n</answer>",
    "example after it": f"{F}python\n{GOOD}{F}\nIt works:\n{F}python\nprint(f(1))  # 2\n{F}",
    "example before it": f"{F}python\nprint(f(1))\n{F}\n{F}python\n{GOOD}{F}",
    "output after it": f"{F}python\n{GOOD}{F}\nprints\n{F}text\n2\n{F}",
    "output without a label after it": f"{F}python\n{GOOD}{F}\nprints\n{F}\n2\n{F}",
    "text before it": f"{F}text\nwhat we want\n{F}\nso we write\n{F}python\n{GOOD}{F}",
    "shell before it": f"{F}bash\npip install x\n{F}\nand then\n{F}\n{GOOD}{F}",
    "another language after it": f"{F}python\n{GOOD}{F}\n{F}java\nint f(int x);\n{F}",
    "a wrong version before it": f"{F}python\ndef f(x): return 0\n{F}\nNo:\n{F}python\n{GOOD}{F}",
    "byte-order mark": f"\ufeff{F}python\n\ufeff{GOOD}{F}",
    "Windows lines": f"{F}python\n{GOOD}{F}".replace("\n", "\r\n"),
    "old Macintosh lines": f"{F}python\n{GOOD}{F}".replace("\n", "\r"),
    "text before the opening": f"Here it is: {F}python\n{GOOD}{F}",
    "text after the closing": f"{F}python\n{GOOD}{F} That is all.",
    "a full stop after the closing": f"{F}python\n{GOOD}{F}.",
    "closing on the last line of code": f"{F}python\n{GOOD.rstrip()}{F}",
    "docstring with a fence": (
        f"{F}python\ndef f(x):\n    {Q}\n    {F}python\n    f(1)\n    {F}\n    {Q}\n    return x + 1\n{F}"
    ),
    "docstring with a fence, two spaces": (
        f"{F}python\ndef f(x):\n  '''\n  {F}\n  f(1)\n  {F}\n  '''\n  return x + 1\n{F}"
    ),
    "module docstring with a fence": f'{F}python\n"""\n{F}\nf(1)\n{F}\n"""\n{GOOD}{F}\nbye',
    "docstring with a fence in a list": (
        f"1. so\n   {F}python\n   def f(x):\n     {Q}\n     {F}\n     f(1)\n     {F}\n     {Q}\n"
        f"     return x + 1\n   {F}"
    ),
    "a class that is not asked for": f"{F}python\n{GOOD}{F}\n{F}python\nclass Test:\n    pass\n{F}",
    "an unclosed block after it": f"{F}python\n{GOOD}{F}\n{F}python\nprint(",
}


@isolated
@pytest.mark.parametrize("text", FENCED.values(), ids=FENCED)
def test_the_block_that_defines_what_the_tests_call(text):
    tests = ("assert f(1) == 2",)
    for gate in (False, True):
        scored = judge(text, tests=tests, exports=("f",), format_gate=gate)
        assert scored["exact"] == 1.0, extract_code(text, ("f",))
        assert scored["format"] == 1.0


BARE = {
    "nothing around it": GOOD,
    "a closing fence alone": f"{GOOD}{F}",
    "a closing fence and a line": f"{GOOD}{F}\n\n",
    "closing tildes": f"{GOOD}{W}\n",
    "byte-order mark": f"\ufeff{GOOD}",
}


@isolated
@pytest.mark.parametrize("text", BARE.values(), ids=BARE)
def test_code_without_a_block(text):
    assert judge(text, tests=("assert f(1) == 2",), exports=("f",))["exact"] == 1.0
    assert judge(text, tests=("assert f(1) == 2",), exports=("f",), format_gate=True)["reward"] == 0.0


@pytest.mark.parametrize(
    "text", [f"{F}java\n{GOOD}{F}", f"{F}python\n{GOOD}", "", "no code", f"{F}{F}{F}", f"{F}text\n{F}"]
)
def test_what_is_no_program(text):
    assert extract_code(text, ("f",)) is None


@isolated
def test_future_imports_of_a_completion_come_first():
    problem = HUMANEVAL.problem("test", 0, 0)
    head = problem.verify.keywords["head"]
    code = problem.answer.removeprefix("```python\n").removesuffix("\n```")
    assert head in code
    for line in ("from __future__ import annotations\n", "from __future__ import (\n    annotations,\n)\n"):
        assert problem.verify(f"```python\n{line}{code}\n```")["exact"] == 1.0
    assert assemble("", "f", f"from __future__ import annotations\n{GOOD}").startswith("from __future__")


@pytest.mark.parametrize(
    "text",
    [
        *("> " * 50_000, "- " * 50_000 + F, "1. " * 30_000 + F, f"{F}\n" * 25_000, "'''" * 30_000 + F),
        f"a{F}\n" * 15_000,
        *("`" * 100_000, "* a\n  " * 20_000 + F, f"{F}python\n'''\n{F}\n" * 5_000, "from __future__ import " * 4_000),
        *("[" * 99_000 + F, "<a\n" * 30_000 + F),
    ],
    ids=lambda text: repr(text[:9]),
)  # fmt: skip
def test_any_text_is_read_in_linear_time(text):
    def read(text: str) -> None:
        extract_code(text, ("f", "g"))
        assemble("def f(x):", "f", text)

    assert_linear(read, text)


# ---- what tests are, and where their names come from --------------------------------------------------------------


def split(source: str) -> tuple[str, ...]:
    import ast

    return split_tests(ast.parse(source).body)


def test_bare_statements_are_no_tests():
    source = "print('x')\nassert f(1) == 2\nprint(f(3))\nf(4)\nx = f(5)\nassert x == 6\nprint('end')\nf(7)"
    assert [test.count("assert") for test in split(source)] == [1, 1]
    assert split("def same(a, b):\n    assert a == b\nsame(f(1), 2)\nsame(f(2), 3)")[1] == "same(f(2), 3)"
    assert len(split("for x in [1]:\n    assert f(x)\nnp.testing.assert_allclose(f(1), 1)")) == 2
    assert split("print(1)\nf(2)\nassert True") == ()
    assert [asserts(test) for test in ("assert f(1)", "f(1)", "print(f(1))", "assert ((", "assert True", "")] == [
        True,
        *[False] * 5,
    ]


@isolated
def test_a_program_that_raises_passes_no_bare_statement(tmp_path):
    row = {"task_id": "x", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n"}
    row["test"] = (
        "def check(candidate):\n    print('a')\n    assert candidate(1) == 1\n    candidate(2)\n    print(3)\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    problem = HumanEval(path=str(tmp_path / "rows.jsonl")).problem("test", 0, 0)
    assert problem.verify("    raise ValueError\n")["reward"] == 0.0
    assert problem.verify(problem.answer)["reward"] == 1.0


@isolated
@pytest.mark.parametrize(
    "text", ["", "pass", "    pass", "    return None\n", "```python\npass\n```", "    ...", "\n\n", "# nothing"]
)
def test_doing_nothing_earns_nothing(text):
    """Also where a test holds for None, as in these rows, which pay for nothing if such tests count."""
    names = {"correct_bracketing", "below_threshold", "prod_signs", "longest", "first_non_repeating_character"}
    found = set()
    for task, count in ((HUMANEVAL, 40), (MBPP_ROWS, 60)):
        for problem in (task.problem("test", 0, index) for index in range(count)):
            test = problem.verify.keywords
            if name := names & {test.get("entry_point"), *test.get("exports", ())}:
                found |= name
                assert problem.verify(text)["reward"] == 0.0
                assert problem.verify(problem.answer)["reward"] == 1.0
    assert found == names


@isolated
def test_a_test_that_doing_nothing_passes_does_not_count():
    test = dict(
        tests=("assert not f(0)", "assert f(1) == 2", "assert f(2) is None", "assert f(3) == 4"), exports=("f",)
    )
    assert counting_tests(test["tests"], "", ("f",), (), "", False) == (False, True, False, True)
    assert judge("def f(x): return x + 1 if x % 2 else None", **test)["reward"] == 1.0
    assert judge("def f(x): return 2", **test)["reward"] == 0.5
    assert judge("def f(x): pass", **test)["reward"] == 0.0
    assert judge("def f(x): pass", tests=("assert f(1) is None",), exports=("f",))["reward"] == 0.0


def test_names_of_the_tests_are_not_the_programs():
    assert needed_names(["assert np.allclose(f(1), 1)"]) == (("f",), ("np",))
    assert needed_names(["assert is_close(f(1), 0.5)"]) == (("f",), ())
    assert needed_names(["assert isclose(f(1), 0.5, rel_tol=1e-3)"], "def f(x): pass") == (("f",), ())
    assert needed_names(["assert decode(encode('a')) == 'a'"])[0] == ("decode", "encode")
    assert needed_names(["assert are_equal(1, 2)", "assert f(1)"])[0] == ("are_equal", "f")
    assert needed_names(["assert check(f(1), 2)", "assert check(1, 2)"])[0] == ("check", "f")
    assert trusted_setup(["assert isclose(f(1), 0.5)"]) == "from math import isclose"


@isolated
def test_a_fake_comparison_passes_nothing_and_sees_nothing(tmp_path):
    code = "def is_close(a, b):\n    return abs(a - b) < 1e-6\ndef f(x):\n    return x / 3"
    row = {
        "task_id": 1,
        "text": "A third.",
        "code": code,
        "test_list": ["assert is_close(f(1), 0.333333333)", "assert np.allclose(f(6), 2)"],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    problem = MBPP(path=str(tmp_path / "rows.jsonl"), held_out=1.0).problem("test", 0, 0)
    assert problem.verify(problem.answer)["reward"] == 1.0
    fake = (
        "class np:\n    allclose = staticmethod(lambda *a: True)\ndef is_close(a, b): return True\ndef f(x): return 0"
    )
    assert problem.verify(f"```python\n{fake}\n```")["reward"] == 0.0
    assert problem.verify("```python\ndef f(x): return x / 3\n```")["reward"] == 1.0
    ace = tmp_path / "ace.jsonl"
    ace.write_text(
        json.dumps(
            {
                "question": "A third.",
                "test_cases": ["assert isclose(f(1), 1/3)", "print(f(1))", "assert np.isclose(f(3), 1)"],
            }
        )
    )
    problem = AceCode(path=str(ace), held_out=0.0).problem("train", 0, 0)
    assert len(problem.verify.keywords["tests"]) == 2
    assert problem.verify("def isclose(*a): return True\ndef f(x): return 0")["reward"] == 0.0
    assert problem.verify("def f(x): return x / 3")["reward"] == 1.0


@isolated
@pytest.mark.parametrize(
    ("arguments", "close"),
    [
        ("1.0, float('inf')", 0), ("float('inf'), 1.0", 0), ("float('inf'), float('inf')", 1),
        ("float('inf'), -float('inf')", 0),
        ("float('nan'), float('nan')", 0), ("float('nan'), float('nan'), equal_nan=True", 1),
        ("[1.0, 2.0], [1.0, float('inf')]", 0),
        ("[1, 2], [1, 2 + 1e-9]", 1), ("[1, 2], [1, 3]", 0), ("[1, 1], 1", 1), ("1, [1, 2]", 0),
        ("[[1], [2]], [[1], [2]]", 1),
        ("1+1j, 1+1j", 1),
        ("0.0, 1e-9", 1), ("0.0, 1e-7", 0),
    ],
)  # fmt: skip
def test_allclose_means_what_numpy_means(box, arguments, close):
    import numpy as np

    nan, inf = float("nan"), float("inf")
    assert bool(eval(f"np.allclose({arguments})", {"np": np, "float": float, "nan": nan, "inf": inf})) == bool(close)
    result = box.test("x = 1", (f"assert np.allclose({arguments})",), setup="import numpy as np")
    assert result.passed == (bool(close),)
