"""Are two answers the same? Trees of `grammar` are compared part by part; math-verify judges their expressions.

Exact where both sides are exact, and decimals are: 0.333 is 333/1000 and not a third. Numbers that sympy cannot settle
are compared to `DIGITS` significant digits. Runs in the worker of `maths`, and imports nothing of this package.
"""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy
from math_verify import verify

DIGITS = 100
Tree = Sequence
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}
_NAMES = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "log", "Abs", "floor", "ceiling")
FUNCTIONS = {name: getattr(sympy, name) for name in _NAMES}

FUNCTIONS |= {f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")}
SCALARS = {"number", "symbol", "+", "*", "/", "^", "-", "function", "log", "!", "binom", "matrix"}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
# Values at which two expressions of the same variables are compared before they are judged.
POINTS = [[sympy.Rational(p, q) for p, q in pairs] for pairs in (
    ((17, 13), (23, 7), (5, 3), (31, 11), (41, 17), (3, 19)), ((-19, 7), (13, 5), (-7, 11), (2, 29), (37, 3), (-5, 23))
)]  # fmt: skip


class Undefined(ValueError):
    """A tree without a value: inconsistent, infinite where it must not be, or of a kind that is not compared."""


def equal(gold: Tree, answer: Tree) -> bool:
    """Is ``answer`` as right as ``gold``? Not symmetric: see `_quantities` and `_relations` for what is lenient."""
    gold, answer = _settled(gold), _settled(answer)
    for rule in (_relations, _quantities, _lists):
        if (verdict := rule(gold, answer)) is not None:
            return verdict
    if gold[0] in SCALARS and answer[0] in SCALARS:
        return _same(value(gold), value(answer))
    if gold[0] == "based":  # the base may be left out, as a unit may
        return (answer[:2] == gold[:2] and answer[2:] == gold[2:]) or answer == ["number", gold[1]]
    if gold[0] != answer[0] or len(gold) != len(answer):
        return False
    match gold[0]:
        case "sequence":
            return gold[1:3] == answer[1:3] and all(map(equal, gold[3:], answer[3:]))
        case "union":
            return _matched(gold[1:], answer[1:])
        case "ratio":
            pairs = itertools.combinations(range(1, len(gold)), 2)
            return all(_same(value(gold[a]) * value(answer[b]), value(gold[b]) * value(answer[a])) for a, b in pairs)
        case "compound":
            return all(map(equal, gold[1:], answer[1:]))
        case "words":
            return gold == answer
    return False


# ---- the shapes of answers ----------------------------------------------------------------------------------------


def _settled(tree: Tree) -> Tree:
    """Without plus-minus signs and chains of equations: their values. Raises Undefined for 5 = 7."""
    tree = list(tree)
    if _holds(tree, "plusminus"):
        tree = ["list", _signed(tree, False), _signed(tree, True)]
    if tree[0] == "either":
        tree = _settled(tree[1]) if _all_equal(tree[1:]) else _union_of_orders(["list", *tree[1:]])
    if tree[0] == "approximate":
        return _near(_settled(tree[1]), tree[2])
    if tree[0] == "order":
        return _as_set(tree) or tree
    if tree[0] != "=":
        return tree
    sides = tree[1:]
    if _is_name(sides[0]) and not _variables(sides[0]) & _variables(sides[-1]):
        if all(equal(sides[1], side) for side in sides[2:]):
            return ["=", sides[0], sides[-1]]
        raise Undefined("sides that are not equal")
    if all(equal(a, b) for a, b in itertools.pairwise(sides)):
        return sides[-1]
    if len(sides) == 2 and _variables(sides[0]) | _variables(sides[1]) and sides[0][0] in SCALARS:
        return ["equation", *sides]
    raise Undefined("sides that are not equal")


def _near(tree: Tree, decimal: Tree) -> Tree:
    """An irrational number or a fraction that rounds to the decimal beside it. Raises Undefined for two numbers."""
    exact = tree[2] if tree[0] == "=" else tree[1] if tree[0] == "quantity" else tree
    if exact[0] == "number" or exact[0] not in SCALARS or _variables(exact):
        raise Undefined("a number near another")
    if abs(value(exact) - sympy.Rational(decimal[1])) > sympy.Rational(decimal[2]) / 2:
        raise Undefined("a decimal that is not near")
    return tree


def _is_name(tree: Tree) -> bool:
    """A variable, ``f(x)``, or what is asked for in a question: ``a+b``, ``xy``, ``\\tan A``; never ``2x``."""
    if tree[0] == "symbol":
        return tree[1] not in CONSTANTS
    return tree[0] in ("+", "*", "/", "-", "function") and all(_is_name(p) for p in tree[1:] if not isinstance(p, str))


def _relations(gold: Tree, answer: Tree) -> bool | None:
    """``x = 5`` is 5; an inequality is the interval of its variable, unless the gold answer is an interval itself."""
    kinds = gold[0], answer[0]
    match kinds:
        case "=", "=":
            return gold[1] == answer[1] and equal(gold[2], answer[2])
        case "equation", ("equation" | "="):
            return _proportional(gold, answer) is not None
        case "=", "equation":
            return bool(_variables(gold[2])) and _proportional(gold, answer) is not None
        case "order", "order":
            return _same_order(gold, answer)
        case (("in" | "ordered"), ("in" | "ordered")):
            return gold[1] == answer[1] and equal(gold[2], answer[2])
        case (("in" | "ordered"), ("sequence" | "union" | "set")):
            return equal(gold[2], answer)
        case (("sequence" | "union" | "set"), "in"):
            return equal(gold, answer[2])
        case "=", ("order" | "in" | "ordered"):
            return False
        case "=", _:
            return equal(gold[2], answer)
        case _, "=":  # x = y names no value
            return answer[2][0] != "symbol" and gold[0] != "equation" and equal(gold, answer[2])
    return False if {"equation", "order", "in", "ordered"} & set(kinds) else None


def _quantities(gold: Tree, answer: Tree) -> bool | None:
    """A unit may be left out but not contradict. Per cent: see docs/verifiers.md."""
    if "quantity" not in (gold[0], answer[0]):
        return None
    (g, g_unit), (a, a_unit) = ((t[1], t[2]) if t[0] == "quantity" else (t, None) for t in (gold, answer))
    hundredth = ["number", "1/100"]
    if g_unit == a_unit == "%":
        return equal(g, a)
    if g_unit == "%":
        return a_unit is None and (equal(g, a) or equal(["*", g, hundredth], a))
    if a_unit == "%":
        if g_unit:
            return False
        sign_left_out = g[0] == "number" and abs(Fraction(g[1])) >= 1
        return equal(g, a) if sign_left_out else equal(g, ["*", a, hundredth])
    return not (g_unit and a_unit and g_unit != a_unit) and equal(g, a)


def _lists(gold: Tree, answer: Tree) -> bool | None:
    """Lists and sets have no order; one of a single value is the value."""
    if not {"list", "set"} & {gold[0], answer[0]}:
        return None
    sides = [tree[1:] if tree[0] in ("list", "set") else [tree] for tree in (gold, answer)]
    if any(len({item[0] == "=" for item in items}) > 1 for items in sides):
        raise Undefined("a list of values and equations")
    return _matched(*sides)


def _all_equal(items: Sequence[Tree]) -> bool:
    return all(equal(items[0], item) and equal(item, items[0]) for item in items[1:])


def _matched(gold: Sequence[Tree], answer: Sequence[Tree]) -> bool:
    """Has every element one of its own among the others?"""
    left = list(answer)
    for item in gold:
        partner = next((n for n, other in enumerate(left) if equal(item, other)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def _as_set(tree: Tree) -> Tree | None:
    """``a < x < b`` as the interval of its variable, or None for other inequalities."""
    signs, *sides = tree[1:]
    infinite = ["symbol", "infty"]
    names = [n for n, side in enumerate(sides) if side[0] == "symbol" and side[1] not in CONSTANTS]
    if len(names) != 1 or any(_variables(side) for n, side in enumerate(sides) if n != names[0]) or len(sides) > 3:
        return None
    if len(sides) == 3 and (names != [1] or {sign[0] for sign in signs} not in ({"<"}, {">"})):
        return None
    if len(sides) == 2:  # 3 < x or x > 3
        sign, bound = (signs[0], sides[1]) if names == [0] else (FLIPPED[signs[0]], sides[0])
        closed = len(sign) == 2
        if sign[0] == ">":
            interval = ["sequence", "[" if closed else "(", ")", bound, infinite]
        else:
            interval = ["sequence", "(", "]" if closed else ")", ["-", infinite], bound]
        return ["ordered", sides[names[0]][1], interval]
    if signs[0][0] == ">":
        signs, sides = [FLIPPED[sign] for sign in reversed(signs)], sides[::-1]
    opening, closing = "[" if len(signs[0]) == 2 else "(", "]" if len(signs[1]) == 2 else ")"
    return ["ordered", sides[1][1], ["sequence", opening, closing, sides[0], sides[2]]]


def _union_of_orders(tree: Tree) -> Tree:
    """``x < 2 or x > 5`` as a union."""
    orders = [_as_set(item) if item[0] == "order" else None for item in tree[1:]]
    if None in orders or len({order[1] for order in orders}) != 1:
        return tree
    return ["ordered", orders[0][1], ["union", *(order[2] for order in orders)]]


def _same_order(gold: Tree, answer: Tree) -> bool:
    if len(gold) != 4 or len(answer) != 4:
        return False
    ratio = _proportional(gold[1:], answer[1:])
    sign = gold[1][0]
    return ratio is not None and answer[1][0] == (sign if ratio.is_positive else FLIPPED[sign])


def _proportional(gold: Tree, answer: Tree) -> sympy.Expr | None:
    """The number by which the two equations (kind, left, right) differ as a factor, or None."""
    sides = [value(tree[1]) - value(tree[2]) for tree in (gold, answer)]
    if 0 in sides:
        return None
    ratio = sympy.simplify(sides[0] / sides[1])
    return ratio if ratio.is_number and ratio.is_finite and _same(sides[0], ratio * sides[1]) else None


# ---- expressions --------------------------------------------------------------------------------------------------


def _walk(tree: Tree, visit: Callable[[Tree], bool]) -> bool:
    return visit(tree) or any(_walk(part, visit) for part in tree[1:] if not isinstance(part, str))


def _holds(tree: Tree, kind: str) -> bool:
    return _walk(tree, lambda t: len(t) > 0 and t[0] == kind)


def _variables(tree: Tree) -> set[str]:
    names: set[str] = set()
    _walk(tree, lambda t: names.add(t[1]) or False if t[0] == "symbol" and t[1] not in CONSTANTS else False)
    return names


def _signed(tree: Tree, minus: bool) -> Tree:
    """The tree with the upper or the lower of all its plus-minus signs."""
    if isinstance(tree, str):
        return tree
    if tree[0] == "plusminus":
        inner = _signed(tree[2], minus)
        return ["-", inner] if minus == (tree[1] == "pm") else inner
    return [_signed(part, minus) for part in tree]


def value(tree: Tree, real: bool | None = None) -> sympy.Expr:
    """The expression of a scalar tree. Raises Undefined."""
    real = not _walk(tree, lambda t: list(t) == ["symbol", "i"]) if real is None else real
    kind, *parts = tree
    if kind == "number":
        return sympy.Rational(parts[0])
    if kind == "symbol":
        return CONSTANTS.get(parts[0]) or sympy.Symbol(parts[0], real=real or None)
    if kind == "function":
        if parts[1][0] == "matrix":
            raise Undefined("a function of a matrix")
        return FUNCTIONS[parts[0]](value(parts[1], real))
    if kind == "matrix":
        return sympy.Matrix([[value(cell, real) for cell in row[1:]] for row in parts])
    if kind not in SCALARS:
        raise Undefined(kind)
    values = [value(part, real) for part in parts]
    shapes = [getattr(x, "shape", None) for x in values]
    defined = {"-": True, "+": shapes[0] == shapes[-1], "*": None in shapes}
    if any(shapes) and not defined.get(kind):
        raise Undefined("arithmetic on matrices")
    match kind, values:
        case "+", [a, b]:
            return a + b
        case "*", [a, b]:
            return a * b
        case "/", [a, b]:
            return a / b
        case "^", [a, b]:
            return a**b
        case "-", [a]:
            return -a
        case "log", [base, a]:
            return sympy.log(a) / sympy.log(base)
        case "!", [a]:
            return sympy.factorial(a)
    return sympy.binomial(*values)


def _same(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Equal numbers, or expressions that agree where they are tried and that math-verify calls equal."""
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        shapes = getattr(gold, "shape", None), getattr(answer, "shape", None)
        return shapes[0] == shapes[1] and all(map(_same, gold.flat(), answer.flat()))
    if any(e.has(sympy.nan, sympy.zoo) for e in (gold, answer)):
        raise Undefined("no value")
    if gold == answer:
        return True
    if sympy.oo in (abs(gold), abs(answer)):
        return False
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not names:
        return _agree(gold, answer)
    agreements = [_agree(*(e.subs(list(zip(names, point))) for e in (gold, answer))) for point in POINTS]
    return len(names) <= len(POINTS[0]) and all(agreements) and bool(verify(gold, answer, timeout_seconds=None))


def _agree(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Numbers that are equal, exactly or to `DIGITS` significant digits of the larger."""
    difference = a - b
    if difference.is_Rational:
        return difference == 0
    size, error = (max(abs(x.evalf(DIGITS + 10, maxn=2000)) for x in xs) for xs in ((a, b), (difference,)))
    if size < sympy.Float(10) ** -1000:  # nothing is left to be relative to
        return sympy.simplify(difference) == 0
    return bool(error < size * sympy.Float(10) ** -DIGITS)
