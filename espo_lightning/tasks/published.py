"""How the published evaluation reads answers to puzzles, so that numbers compare with those of d1, wd1, SPG and ESPO.

Written anew after the description of their parser (``eval/parse_and_get_acc.py`` of d1 and ESPO), which is another than
their training reward. It is laxer than the verifiers here: these metrics are reported, and never rewarded.
"""

import ast
import re
from collections.abc import Callable
from fractions import Fraction

ENDS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
ANSWER_ENDS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
EXPRESSION = re.compile(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]+)=[0-9. ]")
LONGEST = 200  # characters of an expression
LARGEST_BITS, LARGEST_POWER = 4096, 64


def sudoku_cells(puzzle: str, solution: str, text: str) -> float:
    """Share of the empty cells of a 4x4 ``puzzle`` that the first 16 characters of the answer match; 0 without any.

    Characters, not digits: only blanks are dropped. A shorter answer is filled up, a longer one cut. Their average is
    over cells, that of `summarise` over puzzles: the same where all have equally many empty cells, as in their file.
    """
    answer = re.sub(r"\s", "", _sudoku_answer(text))
    empty = [i for i, digit in enumerate(puzzle) if digit == "0"]
    return sum(answer[i : i + 1] == solution[i] for i in empty) / len(empty) if empty else 0.0


def _sudoku_answer(text: str) -> str:
    """The first that is not blank of: a fence of digits in a tag, a tag, what follows one, 16 digits before the end of
    one, 16 digits anywhere; and here, where prompts may ask for digits alone, a text of nothing else.
    """
    _, tag, inside = text.partition("<answer>")
    _, closed, behind = text.partition("</answer>")
    fence = re.search(r"```([0-9\s]+)```", inside)
    end = ANSWER_ENDS.search(inside)
    before = re.search(r"([0-9]{16})\s*</answer>", text)
    anywhere = re.search(r"\b([0-9]{16})\b", text)
    readings = (
        fence.group(1) if tag and fence else "",
        inside[: end.start()] if tag and end else "",
        ENDS.split(behind, maxsplit=1)[0] if closed else "",
        before.group(1) if before else "",
        anywhere.group(1) if anywhere else "",
        text if re.fullmatch(r"[0-9\s]*", text) else "",
    )
    return next((reading for reading in readings if reading.strip()), "")


def countdown_equals(numbers: tuple[int, ...], target: int, text: str) -> bool:
    r"""Whether the last box, else the first tag, else the text has an expression of the numbers that equals the target.

    "... = 23" behind it, ``\times``, ``\cdot`` and ``\div``, and all that Python's arithmetic allows (signs, powers,
    whole division, decimals) are fine; the numbers are the runs of digits.
    """
    equation = _boxed(text)
    if equation is None:
        tag = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL) if "</answer>" in text else None
        equation = text if tag is None else tag.group(1).strip()
    for latex, sign in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        equation = equation.replace(latex, sign)
    if match := EXPRESSION.search(equation):
        equation = match.group(1)
    equation = equation.strip()
    if len(equation) > LONGEST or not re.fullmatch(r"[0-9+\-*/().\s]+", equation):
        return False
    if sorted(map(int, re.findall("[0-9]+", equation))) != sorted(numbers):
        return False
    value = arithmetic(equation)
    return value is not None and abs(value - target) < Fraction(1, 100_000)


def _boxed(text: str) -> str | None:
    r"""The last ``\boxed{...}``, or what follows the last ``\boxed`` and a blank up to a dollar sign."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start, depth = text.rfind("\\boxed{"), 0
    if start < 0 or start < text.rfind("\\boxed"):
        return None
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
}


def arithmetic(expression: str) -> Fraction | None:
    """Python's value of an expression of numbers, exactly and without running it; None for all else, or too large."""
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, KeyError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left), _value(right)
            small = max(base.numerator.bit_length(), base.denominator.bit_length()) < LARGEST_BITS
            if power.denominator != 1 or abs(power) > LARGEST_POWER or not small:
                raise ValueError
            return Fraction(base ** int(power))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError
