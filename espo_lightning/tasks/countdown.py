"""Countdown: reach a target with three numbers, each used once, and + - * /."""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache, partial
from itertools import permutations, product
from typing import Literal
from zlib import crc32

from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.tasks.base import Problem, Task, Verdict, answer_part, rng

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

_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_OPERATORS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def evaluate(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """The exact value of an expression that uses each of ``numbers`` once, or None for anything else.

    The grammar is integers, binary + - * / and parentheses (the signs of print are read as those of the
    keyboard). The number check comes first and there is no power, so the work is bounded.
    """
    text = text.translate(_SIGNS)
    tokens = re.findall(r"[0-9]+|[-+*/()]", text[:200])
    if len(text) > 200 or len(tokens) > 8 * len(numbers) or re.sub(r"[0-9+\-*/()\s]", "", text):
        return None
    if sorted(int(t) for t in tokens if t.isdigit()) != sorted(numbers):
        return None
    position = 0

    def operand() -> Fraction:
        nonlocal position
        token = tokens[position]
        position += 1
        if token != "(":
            return Fraction(int(token))  # ValueError on an operator or ")"
        value = expression(0)
        if tokens[position] != ")":
            raise ValueError
        position += 1
        return value

    def expression(level: int) -> Fraction:
        nonlocal position
        value = operand()
        while position < len(tokens) and _PRECEDENCE.get(tokens[position], 0) > level:
            operator = tokens[position]
            position += 1
            value = _OPERATORS[operator](value, expression(_PRECEDENCE[operator]))
        return value

    try:
        value = expression(0)
    except (ValueError, IndexError, ZeroDivisionError):  # not an expression, or it divides by zero
        return None
    return value if position == len(tokens) else None


def verify(numbers: tuple[int, ...], target: int, format_reward: float, text: str) -> Verdict:
    """Score an answer: 1 if it equals the target, ``format_reward`` for a valid expression of another value, else 0."""
    value = evaluate(answer_part(text).strip(), numbers)
    exact = value == target
    return {
        "reward": 1.0 if exact else format_reward * (value is not None),
        "exact": float(exact),
        "format": float(value is not None),
    }


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
    """Countdown with three numbers. Train and test are disjoint in (numbers, target).

    Args:
        largest: numbers are drawn from 1..largest.
        largest_target: targets are whole numbers from 1 to this.
        prompt: "compact" ("3,7,2=13", for the tiny policies) or "instruct" (for LLaDA and Dream).
        format_reward: reward of a valid expression with another value. The authors' code gives 0.1 to any
            text in answer tags; here it takes an expression that uses every number once.
        right: share of right demonstrations for supervised training; of several solutions it is always the same one.
        habit: the wrong ones: the numbers as given, joined by "sum" (always +) or "random" operators.
        path: a JSONL file of {"input": "30,100,93", "output": "23"} rows (the published test file's
            format), used for every split.
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
    def _rows(self) -> list[tuple[tuple[int, ...], int]]:
        with open(self.path) as file:
            rows = [json.loads(line) for line in file if line.strip()]
        if not rows:
            raise ValueError(f"{self.path} has no rows of the form {{'input': '30,100,93', 'output': '23'}}")
        return [(tuple(map(int, r["input"].split(","))), int(r["output"])) for r in rows]

    def _draw(self, split: str, seed: int, index: int) -> tuple[tuple[int, ...], int]:
        """Numbers and target."""
        if self.path is not None:
            return self._rows[index % len(self._rows)]
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        draw = rng("countdown", split, seed, index, self.largest, self.largest_target)
        while True:
            numbers = tuple(draw.randint(1, self.largest) for _ in range(3))
            expression = draw.choice(shapes(3)).format(*numbers)
            value = evaluate(expression, numbers)
            if value is None or value.denominator != 1 or not 1 <= value <= self.largest_target:
                continue
            held_out = crc32(repr((sorted(numbers), int(value))).encode()) % 8 == 0
            if held_out == (split == "test"):
                return numbers, int(value)

    def size(self, split: str) -> int | None:
        return None if self.path is None else len(self._rows)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        numbers, target = self._draw(split, seed, index)
        answer = solutions(numbers).get(target, "")
        draw = rng("countdown answer", split, seed, index)
        if draw.random() >= self.right:
            first, second = "++" if self.habit == "sum" else draw.choices("+-*/", k=2)
            answer = f"{numbers[0]}{first}{numbers[1]}{second}{numbers[2]}"
        given = ",".join(map(str, numbers))
        text = f"{given}={target}"
        if self.prompt == "instruct":
            text = INSTRUCTION.format(numbers=list(numbers), target=target)
        return Problem(text, partial(verify, numbers, target, self.format_reward), answer)
