"""Code: HumanEval, MBPP (both also in their EvalPlus form) and AceCode, judged by tests in the sandbox.

Prompt and reward of the code recipe of the paper: a system turn that asks for one fenced block, the question with its
first test, and as reward the share of tests passed, optionally after a gate on the format (see `judge`).
HumanEval: Chen et al. 2021; MBPP: Austin et al. 2021; the plus forms: Liu et al. 2023; AceCode: Zeng et al. 2025.
"""

import ast
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.tasks.base import Messages, Problem, Verdict
from espo_lightning.tasks.checks import asserts, needed_names, split_tests, trusted_setup
from espo_lightning.tasks.files import Line, Row, checked_lines
from espo_lightning.tasks.programs import assemble, bare_code, extract_code
from espo_lightning.tasks.rows import RowTask
from espo_lightning.tasks.sandbox import run as sandbox

SYSTEM = (
    "You are an expert Python programmer. Think first if you need to, then give your whole solution as the last part "
    "of your answer, in exactly one fenced block:\n```python\n# your code\n```"
)
NOTHING_TIMEOUT = 10.0  # seconds for the program that does nothing: tests may compute what they expect


def judge(
    text: str,
    *,
    tests: tuple[str, ...],
    setup: str = "",
    exports: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
    entry_point: str = "",
    head: str = "",
    format_gate: bool = False,
    timeout: float = 5.0,
    memory_mb: int = 512,
    allow_unsafe: bool = False,
) -> Verdict:
    """Run a completion against tests.

    passed: share of the tests passed, without those that a program that does nothing passes (`counting_tests`). exact:
    all passed. format: 0 no closed fence, 0.5 a fence whose code does not compile, 1 a fence that does. failed: 1 if a
    limit, a crash or the sandbox itself ended the run, timeout: 1 if that was the time limit; tests that were passed
    before it still count. reward: ``passed``; with ``format_gate`` it is format + passed, and without a fence nothing
    is executed (the paper's reward, in [0, 2]). Without the gate, text without a fence is code as it is.

    Raises:
        SandboxUnavailable: this host cannot isolate programs; no text of a model can cause it.
    """
    code = extract_code(text, (entry_point,) if entry_point else exports)
    if code is None and format_gate:
        return dict.fromkeys(("reward", "exact", "passed", "format", "failed", "timeout"), 0.0)
    source = assemble(head, entry_point, bare_code(text) if code is None else code)
    fixed = dict(setup=setup, exports=exports, modules=modules, entry_point=entry_point)
    result = sandbox.shared(allow_unsafe).test(source, tests, **fixed, timeout=timeout, memory_mb=memory_mb)
    passed = 0.0
    if any(result.passed):
        counts = counting_tests(tests, *fixed.values(), allow_unsafe)
        passed = sum(p for p, counted in zip(result.passed, counts) if counted) / max(1, sum(counts))
    form = 0.0 if code is None else 0.5 if result.status == "syntax" else 1.0
    return {
        "reward": passed + (form if format_gate else 0.0),
        "exact": float(all(result.passed)),
        "passed": passed,
        "format": form,
        "failed": float(result.failed),
        "timeout": float(result.status == "timeout"),
    }


@lru_cache(maxsize=100_000)
def counting_tests(
    tests: tuple[str, ...],
    setup: str,
    exports: tuple[str, ...],
    modules: tuple[str, ...],
    entry_point: str,
    unsafe: bool,
) -> tuple[bool, ...]:
    """Which tests a program that does nothing fails: functions that take anything and return None. Run once."""
    source = "".join(f"def {name}(*args, **kwargs): pass\n" for name in {*exports, entry_point} - {""})
    result = sandbox.shared(unsafe).test(
        source, tests, setup=setup, exports=exports, modules=modules, entry_point=entry_point, timeout=NOTHING_TIMEOUT
    )
    return tuple(not passed for passed in result.passed)


@dataclass(frozen=True)
class CodeTask(RowTask):
    """format_gate, timeout, memory_mb, allow_unsafe: see `judge` and `sandbox`."""

    format_gate: bool = False
    timeout: float = 15.0  # the slowest reference solution of MBPP needs about 5
    memory_mb: int = 512
    allow_unsafe: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_numbers("(0, inf)", timeout=self.timeout)
        check_counts(1, memory_mb=self.memory_mb)

    def check_host(self) -> None:
        sandbox.choose_backend(self.allow_unsafe)

    def problem_of(self, row: Row) -> Problem:
        question, answer, test = self.parts(row)
        prompt: Messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        options = {key: getattr(self, key) for key in ("format_gate", "timeout", "memory_mb", "allow_unsafe")}
        return Problem(prompt, partial(judge, **test, **options), f"```python\n{answer}\n```" if answer else "")

    def parts(self, row: Row) -> tuple[str, str, dict]:
        """(question, reference code, the arguments of `judge` that describe the tests)."""
        raise NotImplementedError


@dataclass(frozen=True)
class HumanEval(CodeTask):
    """HumanEval and HumanEval+: complete a function. All rows are test rows. Arguments: `RowTask`, `CodeTask`.

    The tests run with the helpers of the *prompt*, never with the completion's: a completion cannot redefine ``poly``.
    """

    held_out: float = 1.0
    NEEDED = ("prompt", "entry_point", "test", "canonical_solution")
    HUB = MappingProxyType({"test": ("openai/openai_humaneval", None, "test")})

    def parts(self, row: Row) -> tuple[str, str, dict]:
        head, entry_point = str(row["prompt"]), str(row["entry_point"])
        module = ast.parse(str(row["test"]))
        (check,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check")
        tests = split_tests(check.body, module.body)
        if any(isinstance(node, ast.Return) for node in ast.walk(check)) or not tests:
            tests = ("check(candidate)",)  # cannot be taken apart
        test = dict(
            tests=tests,
            setup=f"{head}\n    pass\n\n{ast.unparse(module)}",
            entry_point=entry_point,
            head=head,
        )
        question = f"Complete the following Python function.\n\n```python\n{head.rstrip()}\n```"
        return question, head + str(row["canonical_solution"]), test


@dataclass(frozen=True)
class MBPP(CodeTask):
    """MBPP and MBPP+: a sentence and assertions. Arguments: `RowTask`, `CodeTask`."""

    NEEDED = ("code", "test_list", "text|prompt")
    LISTS = ("test_list",)
    HUB = MappingProxyType({split: ("google-research-datasets/mbpp", "full", split) for split in ("train", "test")})

    def parts(self, row: Row) -> tuple[str, str, dict]:
        code = str(row["code"]).replace("\r\n", "\n")
        shown = list(row["test_list"])
        setup = "\n".join([*row.get("test_imports", ()), str(row.get("test_setup_code") or "")])
        tests = split_tests(ast.parse(str(row["test"])).body) if row.get("test") else ()  # MBPP+ has a script
        tests = tests or tuple(filter(asserts, shown)) or tuple(shown)
        exports, modules = needed_names([setup, *tests], code)
        setup = f"{trusted_setup([setup, *tests], code)}\n{setup}".lstrip("\n")
        test = dict(tests=tests, setup=setup, exports=exports, modules=modules)
        return with_test(str(row.get("text") or row["prompt"]), shown), code, test


@dataclass(frozen=True)
class AceCode(CodeTask):
    """AceCode-87K: a question and about 16 generated assertions, the paper's training set for code. No reference code.

    The last ``held_out`` share of the rows is "test", for the hub too, which has a "train" split only. The paper trains
    on its harder part; a local file of those rows does the same.
    """

    HUB = MappingProxyType({"train": ("TIGER-Lab/AceCode-87K", None, "train")})
    NEEDED = COLUMNS = ("question", "test_cases")  # the recorded completions beside them are 5 GB
    LISTS = ("test_cases",)

    def _load(self, split: str) -> list[Line]:
        lines = super()._load(split if self.path else "train")
        lines = checked_lines(lines if self.path else self._held_out(split, lines), self.check_row)
        return [line for line in lines if line.row is None or any(map(asserts, line.row["test_cases"]))]

    def parts(self, row: Row) -> tuple[str, str, dict]:
        tests = tuple(filter(asserts, row["test_cases"]))
        exports, modules = needed_names(tests)
        test = dict(tests=tests, setup=trusted_setup(tests), exports=exports, modules=modules)
        return with_test(str(row["question"]), list(tests)), "", test


def with_test(question: str, tests: list[str]) -> str:
    """The question with its first test, which fixes the function's name; not if the question already shows code."""
    return (
        question if "```" in question else f"{question}\n\nYour code should pass this test:\n```python\n{tests[0]}\n```"
    )
