"""Countdown: reach a target with three numbers, each used once, and + - * /."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache, partial
from itertools import combinations, permutations, product
from random import Random
from typing import Literal
from zlib import crc32

from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.tasks.base import Distinct, Problem, Task, Verdict, rng
from espo_lightning.tasks.files import Line, Row, check_columns, checked_lines, good, readable
from espo_lightning.tasks.offered import offered
from espo_lightning.tasks.published import countdown_equals

INSTRUCTION = """Using all of the numbers {numbers} exactly once each, and the operations + - * / (parentheses are \
allowed), write an expression that equals {target}. Do not write an equals sign or any other number.

Example
Numbers: [2, 3, 4], target: 5
Expression: 2*4-3

Think inside <reasoning> tags, then give the expression inside <answer> tags:
<reasoning>
your reasoning
</reasoning>
<answer>
the expression
</answer>"""

# the signs of print and of full-width keyboards; digits are ASCII only
SIGNS = str.maketrans(
    {
        **dict.fromkeys("×✕✖⨯·⋅∙•∗＊", "*"),
        **dict.fromkeys("÷∕⁄／", "/"),
        **dict.fromkeys("−–—‐‑‒﹣－", "-"),
        **dict.fromkeys("＋﹢", "+"),
        **dict(zip("（）［］｛｝", "()[]{}")),
    }
)
LATEX = {
    **dict.fromkeys((r"\times", r"\cdot", r"\ast"), "*"),
    **dict.fromkeys((r"\left", r"\right", r"\big", r"\Big", r"\bigl", r"\bigr", r"\displaystyle"), ""),
    **dict.fromkeys((r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad"), " "),
    **{r"\div": "/", r"\{": "{", r"\}": "}"},
}
COMMAND = re.compile(r"\\(?:[A-Za-z]+|[^A-Za-z])")
FRACTION = re.compile(r"\\[dt]?frac\s{0,4}\{([^{}]*)\}\s{0,4}\{([^{}]*)\}")
LETTER_X = re.compile(r"(?<=[0-9)\]}])(\s*)[xX](?=\s*[0-9(\[{])")
LABEL = re.compile(r"(?:expression|answer|solution)\s{0,4}:", re.IGNORECASE)
PLAIN = re.compile(r"[0-9+\-*/()\s]*")
LONGEST = 200  # characters of an expression
OPERATORS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
CLOSING = {"(": ")", "[": "]", "{": "}"}


def keyboard(text: str) -> str:
    """An expression in the signs of the keyboard: from those of print, and from LaTeX; what is unknown stays."""
    for _ in range(3):  # fractions of fractions
        text = FRACTION.sub(r"((\1)/(\2))", text)
    text = COMMAND.sub(lambda match: LATEX.get(match[0], match[0]), text)
    return LETTER_X.sub(r"\1*", text.translate(SIGNS))


def evaluate(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """The exact value of an expression that uses each of ``numbers`` once, or None for anything else.

    The grammar is integers, binary + - * / and brackets of three kinds, in any of the notations of `keyboard`. A sign
    is no operation: -3 is not one of the numbers, so "-3+2*4" and "2*4--3" have no value. The number check comes first
    and there is no power, so the work is bounded.
    """
    if len(text) <= 2 * LONGEST and not PLAIN.fullmatch(text):
        text = keyboard(text)
    tokens = re.findall(r"[0-9]+|[-+*/()\[\]{}]", text[:LONGEST])
    if len(text) > LONGEST or len(tokens) > 8 * len(numbers) or re.sub(r"[0-9+\-*/()\[\]{}\s]", "", text):
        return None
    if sorted(int(t) for t in tokens if t.isdigit()) != sorted(numbers):
        return None
    position = 0

    def operand() -> Fraction:
        nonlocal position
        token = tokens[position]
        position += 1
        if token not in CLOSING:
            return Fraction(int(token))  # ValueError on an operator or a closing bracket
        value = expression(0)
        if tokens[position] != CLOSING[token]:
            raise ValueError
        position += 1
        return value

    def expression(level: int) -> Fraction:
        nonlocal position
        value = operand()
        while position < len(tokens) and PRECEDENCE.get(tokens[position], 0) > level:
            operator = tokens[position]
            position += 1
            value = OPERATORS[operator](value, expression(PRECEDENCE[operator]))
        return value

    try:
        value = expression(0)
    except (ValueError, IndexError, ZeroDivisionError):  # not an expression, or it divides by zero
        return None
    return value if position == len(tokens) else None


def verify(numbers: tuple[int, ...], target: int, format_reward: float, text: str) -> Verdict:
    """Score an answer: 1 if it equals the target, ``format_reward`` for a valid expression of another value, else 0.

    exact_published: whether the published evaluation counts the text as right, `countdown_equals`; never rewarded.
    """

    def value_of(answer: str) -> Fraction | None:
        label = LABEL.match(answer)
        return evaluate(answer[label.end() :] if label else answer, numbers)

    value = value_of(offered(text, value_of) or "")
    exact = value == target
    return {
        "reward": 1.0 if exact else format_reward * (value is not None),
        "exact": float(exact),
        "format": float(value is not None),
        "exact_published": float(countdown_equals(numbers, target, text)),
    }


def reachable(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value of an expression that uses each of some values once."""
    if len(values) == 1:
        return set(values)
    found = set()
    for a, b in combinations(range(len(values)), 2):
        x, y = values[a], values[b]
        rest = tuple(value for i, value in enumerate(values) if i not in (a, b))
        for value in {x + y, x - y, y - x, x * y, *([x / y] if y else []), *([y / x] if x else [])}:
            found |= reachable((value, *rest))
    return found


def item_of(row: Row) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a row. Raises ValueError with what is wrong: other columns, no numbers, out of reach."""
    row = {key: str(value) if isinstance(value, int) else value for key, value in row.items()}
    check_columns(row, ("input", "output"), (), "Countdown")
    if not re.fullmatch(r"\s*[0-9]{1,9}(\s*,\s*[0-9]{1,9}){1,7}\s*", row["input"]):
        raise ValueError(f"has an 'input' that is no list of numbers such as '30,100,93': {row['input']!r}")
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", row["output"]):
        raise ValueError(f"has an 'output' that is no whole number: {row['output']!r}")
    numbers, target = tuple(map(int, row["input"].split(","))), int(row["output"])
    if len(numbers) <= 4 and target not in reachable(tuple(map(Fraction, numbers))):  # more would take long
        raise ValueError(
            f"has an 'output' that no expression of its numbers equals: no answer can be right for {target}"
        )
    return numbers, target


@cache
def shapes(count: int) -> tuple[str, ...]:
    """Every expression over ``count`` numbers, "{0}" to "{count-1}": all orders, operators and, of three, brackets."""
    found = []
    for order in permutations(f"{{{i}}}" for i in range(count)):
        for signs in product("+-*/", repeat=count - 1):
            found.append(order[0] + "".join(s + n for s, n in zip(signs, order[1:])))
            if count == 3:
                (a, b, c), (first, second) = order, signs
                found += [f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"]
    return tuple(found)


@lru_cache(maxsize=4096)
def solutions(numbers: tuple[int, ...]) -> dict[int, str]:
    """Every whole number that an expression over ``numbers`` equals, with the first such expression of `shapes`."""
    found: dict[int, str] = {}
    for shape in shapes(len(numbers)):
        expression = shape.format(*numbers)
        value = evaluate(expression, numbers)
        if value is not None and value.denominator == 1:
            found.setdefault(int(value), expression)
    return found


@dataclass(frozen=True)
class Countdown(Task):
    """Countdown with three numbers.

    Train and test are disjoint in (numbers, target), the order of numbers aside, and test problems are all different in
    them, as long as there are different ones.

    Args:
        largest: numbers are drawn from 1..largest.
        largest_target: targets are whole numbers from 1 to this.
        prompt: "compact" ("3,7,2=13", for the tiny policies) or "instruct" (for LLaDA and Dream).
        format_reward: reward of a valid expression with another value. The authors' code gives 0.1 to any
            text in answer tags; here it takes an expression that uses every number once.
        right: share of right demonstrations for supervised training; of several solutions it is always the same one.
        habit: the wrong ones: the numbers as given, joined by "sum" (always +) or "random" operators.
        path: a file of {"input": "30,100,93", "output": "23"} rows (the published test file's format, JSONL), used for
            every split.
    """

    largest: int = 20
    largest_target: int = 99
    prompt: Literal["compact", "instruct"] = "compact"
    format_reward: float = 0.1
    right: float = 1.0
    habit: Literal["sum", "random"] = "sum"
    path: str | None = None

    def __post_init__(self):
        check_counts(1, largest=self.largest, largest_target=self.largest_target)
        check_numbers("[0, 1]", format_reward=self.format_reward)
        if self.largest < 2 or self.largest_target < 4:
            raise ValueError(
                f"largest must be at least 2 and largest_target at least 4, so that both splits have problems; "
                f"got {self.largest} and {self.largest_target}"
            )
        if not 0 <= self.right <= 1:
            raise ValueError(f"right is a share between 0 and 1, got {self.right}")

    @property
    def chance(self) -> dict[str, float]:
        """Exact expectation of the numbers as given with two random operators, over 256 test problems."""
        hits = 0
        for i in range(256):
            numbers, target = self._draw("test", 0, i)
            flats = [f"{numbers[0]}{p}{numbers[1]}{q}{numbers[2]}" for p, q in product("+-*/", repeat=2)]
            hits += sum(evaluate(e, numbers) == target for e in flats) / len(flats)
        return {"exact": hits / 256, "format": 1.0}

    @cached_property
    def _lines(self) -> list[Line]:
        lines = checked_lines(readable(self.path, "Countdown"), item_of)
        if not lines:
            raise ValueError(f"{self.path} has no rows of the form {{'input': '30,100,93', 'output': '23'}}")
        return lines

    @cached_property
    def _rows(self) -> list[tuple[tuple[int, ...], int]]:
        return [item_of(row) for row in good(self._lines)]

    def _draw(self, split: str, seed: int, index: int) -> tuple[tuple[int, ...], int]:
        """Numbers and target."""
        if self.path is not None:
            return self._rows[index % len(self._rows)]
        if split == "test":
            return _test_items(seed, self.largest, self.largest_target)[index]
        return draw_item(split, seed, self.largest, self.largest_target, index)

    def size(self, split: str) -> int | None:
        return None if self.path is None else len(self._rows)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return self._pose(*self._draw(split, seed, index), rng("countdown answer", split, seed, index))

    def inspect(self, split: str) -> Iterator[tuple[str, Problem | Exception]]:
        for place, row, fault in [] if self.path is None else self._lines:
            yield place, ValueError(fault) if row is None else self._pose(*item_of(row), rng(place))

    def _pose(self, numbers: tuple[int, ...], target: int, draw: Random) -> Problem:
        answer = solutions(numbers).get(target, "")
        if draw.random() >= self.right:
            signs = "+" * len(numbers) if self.habit == "sum" else draw.choices("+-*/", k=len(numbers) - 1)
            answer = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:]))
        given = ",".join(map(str, numbers))
        text = f"{given}={target}"
        if self.prompt == "instruct":
            text = INSTRUCTION.format(numbers=list(numbers), target=target)
        verifier = partial(verify, numbers, target, self.format_reward)
        return Problem(text, verifier, answer, cluster=repr(sorted(numbers)))


def draw_item(split: str, seed: int, largest: int, largest_target: int, index: int) -> tuple[tuple[int, ...], int]:
    """Numbers, and the value of a random expression of them; of those that belong to the split."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    draw = rng("countdown", split, seed, index, largest, largest_target)
    while True:
        numbers = tuple(draw.randint(1, largest) for _ in range(3))
        expression = draw.choice(shapes(3)).format(*numbers)
        value = evaluate(expression, numbers)
        if value is None or value.denominator != 1 or not 1 <= value <= largest_target:
            continue
        held_out = crc32(repr((sorted(numbers), int(value))).encode()) % 8 == 0
        if held_out == (split == "test"):
            return numbers, int(value)


def _same(item: tuple[tuple[int, ...], int]) -> tuple:
    return (*sorted(item[0]), item[1])


@lru_cache(maxsize=8)
def _test_items(seed: int, largest: int, largest_target: int) -> Distinct[tuple[tuple[int, ...], int]]:
    return Distinct(partial(draw_item, "test", seed, largest, largest_target), _same)
