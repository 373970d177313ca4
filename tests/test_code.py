"""Code tasks: references pass, nothing else does, prompts and formats."""

import gzip
import json
import os
import pickle
import random
import time
from collections import Counter

import datasets
import pytest
from processes import command, descendants, resident, scheduled
from program_cases import HUMANEVAL, ISOLATED, MBPP_ROWS

from espo_lightning.tasks.checks import needed_names
from espo_lightning.tasks.code import MBPP, AceCode, HumanEval, judge
from espo_lightning.tasks.programs import extract_code
from espo_lightning.tasks.sandbox import run as sandbox


def verdict(verify, text: str) -> dict[str, float]:
    """The verdict; on a host without isolation the test checks that code is refused instead, and says so."""
    if ISOLATED:
        return verify(text)
    with pytest.raises(sandbox.SandboxUnavailable):
        verify(text)
    return pytest.skip("no isolation on this host: the refusal was checked instead")


def problems(task):
    return [task.problem("test", 0, index) for index in range(len(task.rows("test")))]


@pytest.mark.parametrize("index", range(40))
def test_humaneval(index):
    problem = HUMANEVAL.problem("test", 0, index)
    right = verdict(problem.verify, problem.answer)
    assert right == {"reward": 1.0, "exact": 1.0, "passed": 1.0, "format": 1.0, "failed": 0.0, "timeout": 0.0}
    head = problem.verify.keywords["head"]
    body = problem.answer.removeprefix(f"```python\n{head}").removesuffix("```")
    assert problem.verify(body)["exact"] == 1.0  # the bare continuation, as base models write it
    for wrong in ("    pass\n", f"```python\n{head}    pass\n```", ""):
        scored = problem.verify(wrong)
        assert scored["exact"] == 0.0
        assert scored["reward"] < 1.0


@pytest.mark.parametrize("index", range(60))
def test_mbpp(index):
    problem = MBPP_ROWS.problem("test", 0, index)
    right = verdict(problem.verify, f"Some thoughts.\n{problem.answer}")
    assert right == {"reward": 1.0, "exact": 1.0, "passed": 1.0, "format": 1.0, "failed": 0.0, "timeout": 0.0}
    assert problem.verify("```python\npass\n```")["reward"] == 0.0


def test_every_row_once_per_epoch_in_an_order_by_seed():
    prompts = [[json.dumps(MBPP_ROWS.problem("test", seed, i).prompt) for i in range(120)] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(set(prompts[0][:60])) == 60
    assert sorted(prompts[0][:60]) == sorted(prompts[0][60:]) == sorted(prompts[2][:60])
    assert prompts[0][:60] != prompts[0][60:]


def test_prompts():
    system, user = HUMANEVAL.problem("test", 0, 0).prompt
    assert system["role"] == "system"
    assert "last part" in system["content"]
    assert user["content"].count("```") == 2
    system, user = MBPP_ROWS.problem("test", 0, 0).prompt
    assert user["content"].count("assert ") == 1  # the first test only


def test_problems_pickle():
    for task in (HUMANEVAL, MBPP_ROWS):
        problem = pickle.loads(pickle.dumps(task.problem("test", 0, 0)))
        assert verdict(problem.verify, problem.answer)["reward"] == 1.0


ACE = {
    "id": "x",
    "source": "s",
    "question": "Write `double(x)`.",
    "test_cases": ["assert double(1) == 2", "assert double(2) == 4", "assert double('a') == 'aa'", "assert double(("],
}


@pytest.fixture
def ace(tmp_path):
    path = tmp_path / "ace.jsonl.gz"
    rows = [ACE, ACE | {"test_cases": ["assert (("]}, *[ACE | {"question": f"Q{i}"} for i in range(9)]]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    return str(path)


def test_acecode(ace):
    task = AceCode(path=ace)
    assert (len(task.rows("train")), len(task.rows("test"))) == (9, 1)  # a row without one valid test is left out
    problem = task.problem("train", 0, 0)
    assert len(problem.verify.keywords["tests"]) == 3
    assert verdict(problem.verify, "```python\ndef double(x): return x * 2\n```")["reward"] == 1.0
    partly = problem.verify("```python\ndef double(x): return int(x) * 2\n```")
    assert partly["reward"] == pytest.approx(2 / 3)
    assert partly["exact"] == 0.0


def test_format_gate(ace):
    verify = AceCode(path=ace, format_gate=True).problem("train", 0, 0).verify
    good = "def double(x): return x * 2"
    scores = {
        f"```python\n{good}\n```": (2.0, 1.0),
        good: (0.0, 0.0),  # right, but no fence: not even executed
        f"```python\n{good}": (0.0, 0.0),  # never closed
        "```python\ndef double(x: return\n```": (0.5, 0.5),
        "```python\nimport os; os._exit(0)\n```": (1.0, 1.0),
    }
    for text, (reward, form) in scores.items():
        scored = verdict(verify, text)
        assert (scored["reward"], scored["format"]) == (reward, form), text


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("def double(x):\n    while True: pass", 1.0),
        ("import os\nos._exit(0)", 1.0),
        ("def double(x): return x", 0.0),
        ("raise SystemExit", 0.0),
        ("def double(x): return '\ud800'", 0.0),
        ("\0", 0.0),
    ],
)
def test_failures_are_counted(ace, code, failed):
    verify = AceCode(path=ace, timeout=1.0).problem("train", 0, 0).verify
    scored = verdict(verify, f"```python\n{code}\n```")
    assert (scored["reward"], scored["failed"]) == (0.0, failed)


PLUS_TEST = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match
"""
LOOP = """
inputs = [[1.0], [2.0], [3.0]]
results = [1.0 / 3, 2.0 / 3, 1.0]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion({name}(*inp), exp, 0)
"""


def indent(text: str) -> str:
    return text.replace("\n", "\n    ")


def test_humaneval_plus_format(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'def third(x: float) -> float:\n    """ A third """\n',
        "entry_point": "third",
        "canonical_solution": "    return x / 3\n",
        "test": PLUS_TEST + "\ndef check(candidate):" + indent(LOOP.format(name="candidate")),
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    problem = HumanEval(path=str(tmp_path / "plus.jsonl")).problem("test", 0, 0)
    assert verdict(problem.verify, problem.answer)["exact"] == 1.0
    assert problem.verify("    return x * 0.33333333333333\n")["exact"] == 1.0  # within 1e-6
    assert problem.verify("    return x * 0.333\n")["exact"] == 0.0


def test_mbpp_plus_format(tmp_path):
    row = {
        "task_id": 1,
        "prompt": "Write a function to find a third.",
        "code": "def third(x):\n  return x / 3",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(third(3), 1)"],
        "test": PLUS_TEST + LOOP.format(name="third"),
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    problem = MBPP(path=str(tmp_path / "plus.jsonl"), held_out=1.0).problem("test", 0, 0)
    assert "find a third" in problem.prompt[1]["content"]
    assert verdict(problem.verify, problem.answer)["exact"] == 1.0
    assert problem.verify("```python\ndef third(x): return x\n```")["exact"] == 0.0


def test_a_completion_cannot_replace_what_the_tests_rely_on():
    """HumanEval/32 checks with ``poly``, a helper of its prompt; others with ``math`` or ``all``."""
    row = next(row for row in HUMANEVAL.rows("test") if row["task_id"] == "HumanEval/32")
    _, _, test = HUMANEVAL.parts(row)
    cheat = "```python\ndef poly(xs, x): return 0\ndef find_zero(xs): return 0.0\n```"
    assert verdict(lambda text: judge(text, **test), cheat)["exact"] == 0.0
    exports, modules = needed_names(["assert all(math.isclose(f(x), 1) for x in xs)"], "def f(x): pass")
    assert (exports, modules) == (("f", "xs"), ("math",))
    assert needed_names(["assert sum(1, 2) == 3"], "def sum(a, b): return a + b") == (("sum",), ())
    cheat = "class math: isclose = staticmethod(lambda a, b: True)\nall = lambda *a: True\ndef f(x): return 0"
    test = dict(tests=("assert all([math.isclose(f(1), 1)])",), exports=("f",), modules=("math",))
    assert judge(f"```python\n{cheat}\n```", **test)["reward"] == 0.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n``` and ```python\nb\n```", "b\n"),
        ("```python\r\na\r\n```", "a\n"),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("", None),
        ("```" * 9, None),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_wrong_splits_are_named():
    with pytest.raises(ValueError, match="no 'train' rows"):
        HUMANEVAL.problem("train", 0, 0)
    with pytest.raises(ValueError, match="split must be"):
        HUMANEVAL.problem("validation", 0, 0)


def test_acecode_from_the_hub(monkeypatch):
    """It has one split and columns of gigabytes."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs))
        return datasets.Dataset.from_list([ACE | {"inferences": "large"}] * 10)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ace = AceCode()
    assert (ace.size("train"), ace.size("test")) == (9, 1)
    assert set(ace.rows("train")[0]) == {"question", "test_cases"}
    assert asked == [("TIGER-Lab/AceCode-87K", None, {"split": "train"})] * 2


NOISE = ["```python\n", "```", "def double(x):", "\n    ", "return x*2", "\0", "\ud800", "(" * 50, "'''", "λ", "pass"]
LINES = [
    *("def double(x):", "    return x * 2", "    return x + x", "    return double(x)", "    pass", "x = 'a' * 10**9"),
    *(
        "print('x' * 10**6)",
        "import os",
        "os._exit(0)",
        "raise KeyError",
        "raise SystemExit",
        "double = str",
        "x = [0]",
    ),
    *("class double(int): pass", "open('f', 'w').write('x' * 10**7)", "1 / 0", "del double", "def double(x, y): yield"),
]


def garbage(draw: random.Random) -> str:
    """Noise of program and format; or lines of a program in a fence, 1 of 70 with a loop that has no end."""
    if draw.random() < 0.3:
        return "".join(draw.choices(NOISE, k=draw.randint(0, 30)))
    lines = draw.choices(LINES, k=draw.randint(0, 3))
    lines[1:1] = LINES[:2] if draw.random() < 0.5 else ["while True: pass"] if draw.random() < 0.04 else []
    return "```python\n" + "\n".join(lines) + "\n```"


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_fuzz(ace, count):
    """No exception, no call over 2 s at a time limit of 1 s, no growth of memory, here or in the runners."""
    verify = AceCode(path=ace, format_gate=True, timeout=1.0).problem("train", 0, 0).verify
    draw, seen, slowest, memory = random.Random(0), Counter(), 0.0, []
    for index in range(count):
        text = garbage(draw)
        start, waited = time.perf_counter(), scheduled()[1]
        scored = verdict(verify, text)
        slowest = max(slowest, time.perf_counter() - start - (scheduled()[1] - waited))
        assert set(scored) == {"reward", "exact", "passed", "format", "failed", "timeout"}, text
        assert 0.0 <= scored["reward"] <= 2.0
        seen.update(key for key, value in scored.items() if value)
        if (index + 1) % (count // 6) == 0:
            runners = [resident(pid) for pid in descendants(os.getpid()) if b"sandbox/inner.py" in command(pid)]
            memory.append((resident(), max(runners), len(runners)))
            print(index + 1, slowest, memory[-1], dict(seen))  # with -s, the long run reports its progress
    assert slowest < 2.0
    for held in zip(*memory):  # KiB, KiB, processes
        assert max(held[3:]) - max(held[:3]) < 20_000
    assert min(seen[key] for key in ("reward", "exact", "failed")) > 0
