r"""The expressions of answers: numbers, products, powers, functions, brackets. `grammar` makes answers of them."""

from fractions import Fraction

from espo_lightning.tasks.notation import Token, Unreadable
from espo_lightning.tasks.trees import INFINITY, SCALARS, Cursor, Tree, exact
from espo_lightning.tasks.units import NO_UNIT, degree_at, scaled_at, unit_at
from espo_lightning.tasks.vocabulary import CAPITALS, FUNCTIONS, GREEK, INVERSES, KEYBOARD_NAMES, SMALL_WORDS

DEPTH = 40  # levels of brackets
CONSTANTS = {"pi", "e", "i", "infty"}
CLOSING = {"(": ")", "[": "]", "\\{": "\\}", "langle": "rangle"}
NAMED = {*GREEK, *CAPITALS, "infty", "ell", "hbar"}


class Expressions(Cursor):
    """Recursive descent. Every method raises Unreadable where it finds no expression."""

    def scalar(self, tree: Tree) -> Tree:
        if tree[0] not in SCALARS or tree == INFINITY:
            raise Unreadable(f"arithmetic on a {tree[0]}")
        return tree

    def sum(self) -> Tree:
        """Terms with signs."""
        tree = self.signed()
        while self.at("+", "-", "pm", "mp"):
            if self.unit == "%":
                raise Unreadable("arithmetic with per cent")
            sign = self.take().value
            right = self.scalar(self.product())
            if sign in ("pm", "mp"):
                right = ("plusminus", sign, right)
            tree = ("+", self.scalar(tree), ("-", right) if sign == "-" else right)
        return tree

    def signed(self) -> Tree:
        if self.at("+", "-", "pm", "mp"):
            sign = self.take().value
            tree = self.signed()
            if tree != INFINITY or sign not in "+-":
                self.scalar(tree)
            return tree if sign == "+" else ("-", tree) if sign == "-" else ("plusminus", sign, tree)
        return self.product()

    def product(self) -> Tree:
        tree, measured = self.power(), False
        while True:
            if self.at("*", "/"):
                if self.unit == "%":
                    raise Unreadable("arithmetic with per cent")
                sign = self.take().value
                tree = (sign, self.scalar(tree), self.scalar(self.signed_power()))
            elif not measured and self.measure(tree):
                measured = True
            elif not measured and self.starts_factor() and not self.is_prose():
                if self.peek().kind == "number" or (self.at("frac") and exact(tree) is not None):
                    tree = self.mixed(tree)
                else:
                    tree = self.side_by_side(tree, self.power())
            else:
                return tree

    def is_prose(self) -> bool:
        """Does the next token divide words by a space, and not variables?"""
        before, token = self.peek(-1), self.peek()
        if token.kind == "letters" and token.space and token.value in SMALL_WORDS:
            return True
        return before.kind == token.kind == "letters" and token.space and len(before.value + token.value) > 2

    def side_by_side(self, left: Tree, right: Tree) -> Tree:
        """A product without a sign. Nobody writes one with 0, 1 or a factorial: those are two answers."""
        if {left, right} & {("number", "0"), ("number", "1")} or left[0] == "!":
            raise Unreadable("two answers side by side")
        return ("*", self.scalar(left), self.scalar(right))

    def measure(self, tree: Tree) -> bool:
        """Take the unit behind ``tree``, if there is one and brackets do not forbid it."""
        if self.brackets or tree[0] not in SCALARS:
            return False
        unit, place = unit_at(self.tokens, self.place, tree)
        if unit is None:
            return False
        if self.unit and unit and self.unit != unit:
            raise Unreadable("sums of different units")
        self.place, self.unit = place, unit or self.unit or ""
        return True

    def signed_power(self) -> Tree:
        return ("-", self.scalar(self.signed_power())) if self.accept("-") else self.power()

    def mixed(self, whole: Tree) -> Tree:
        """``1\\frac{4}{5}`` and ``11 5/6``: a whole number and a proper fraction. Other neighbours are no number."""
        if whole[0] != "number" or "/" in whole[1]:
            raise Unreadable("two numbers side by side")
        if self.at("frac"):
            part = self.power()
        elif self.peek().space and self.peek(1).value == "/" and self.peek(2).kind == "number":
            above, _, below = self.take(), self.take(), self.take()
            part = ("/", ("number", above.value), ("number", below.value))
        else:
            raise Unreadable("two numbers side by side")
        value = exact(part)
        if value is None or not 0 < value < 1 or part[0] != "/" or whole[1] == "0":
            raise Unreadable("a mixed number without a proper fraction")
        return ("number", str(Fraction(whole[1]) + value))

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "letters"):
            return token.kind == "number" or self.word() not in ("and", "or")
        if token.kind == "words":
            return len(token.value) == 1
        if token.value == "|":
            return not self.bars
        starts = {"(", "{", "[", "frac", "sqrt", "binom", "lfloor", "lceil", "begin", *NAMED, *FUNCTIONS}
        return token.kind in ("sign", "command") and token.value in starts

    def power(self) -> Tree:
        """A factor with what stands above, below and behind it."""
        tree = self.base()
        while True:
            if self.at("_"):
                tree = self.based(tree)
            elif self.is_degree():
                if not (self.brackets or self.operands):
                    return tree  # the unit of the whole
                self.place += degree_at(self.tokens, self.place)
                if self.operands:
                    tree = ("/", ("*", self.scalar(tree), ("symbol", "pi")), ("number", "180"))
            elif self.at("^"):
                self.place += 1
                tree = ("^", self.scalar(tree), self.argument())
            elif self.at("!"):
                self.place += 1
                if self.at("!"):
                    raise Unreadable("a double factorial")
                tree = ("!", self.scalar(tree))
            else:
                return tree

    def is_degree(self) -> bool:
        return degree_at(self.tokens, self.place) > 0

    def based(self, tree: Tree) -> Tree:
        """``52_8``: digits in a base."""
        digits = self.peek(-1).text
        self.expect("_")
        braces = self.accept("{")
        base = self.take()
        if braces:
            self.expect("}")
        if tree[0] != "number" or not digits.isdigit() or base.kind != "number" or not base.text.isdigit():
            raise Unreadable("no number in a base")
        return ("based", digits.lstrip("0") or "0", base.text)

    def argument(self) -> Tree:
        """What a command or a power takes: a group in braces, a signed number or a single factor."""
        if self.at("-"):
            self.place += 1
            return ("-", self.scalar(self.base()))
        return self.scalar(self.base())

    def half_argument(self) -> tuple[Tree, Tree]:
        """Both arguments of ``\\frac``, which TeX also takes as two digits side by side."""
        token = self.peek()
        if token.kind == "number" and len(token.text) == 2 and token.text.isdigit():
            self.place += 1
            return ("number", token.text[0]), ("number", token.text[1])
        if token.kind == "letters" and len(token.value) == 2:
            self.place += 1
            return ("symbol", token.value[0]), ("symbol", token.value[1])
        return self.argument(), self.argument()

    def base(self) -> Tree:
        token = self.take()
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("nested too deeply")
        try:
            if token.kind == "number":
                value, self.place = scaled_at(self.tokens, self.place, Fraction(token.value))
                return ("number", str(value))
            if token.kind == "letters":
                return self.letters(token.value)
            if token.kind == "words" and len(token.value) == 1:
                return self.subscripted(token.value)
            if token.kind in ("sign", "command"):
                return self.structure(token)
        finally:
            self.depth -= 1
        raise Unreadable(token.value)

    def letters(self, name: str) -> Tree:
        if name in FUNCTIONS:
            return self.function(name)
        if name in KEYBOARD_NAMES:
            return self.subscripted(KEYBOARD_NAMES[name])
        return self.run(name)

    def run(self, name: str) -> Tree:
        """Letters side by side: points that name a segment, or a product of at most three variables."""
        if len(name) == 1:
            return self.subscripted(name)
        if name.isupper():
            return ("symbol", name)
        if len(name) > 3 or not name.islower() or name in NO_UNIT:
            raise Unreadable(name)
        tree = ("symbol", name[0])
        for letter in name[1:-1]:
            tree = ("*", tree, ("symbol", letter))
        last = ("symbol", name[-1])
        if self.at("^", "_", "!"):  # these belong to the last letter
            self.place -= 1
            self.tokens = [*self.tokens[: self.place], Token("letters", name[-1]), *self.tokens[self.place + 1 :]]
            last = self.power()
        return ("*", tree, last)

    def subscripted(self, name: str) -> Tree:
        if self.at("_") and name not in CONSTANTS:
            self.place += 1
            braces = self.accept("{")
            parts = [self.take().value]
            while braces and not self.at("}"):
                if self.token is None or len(parts) > 8:
                    raise Unreadable("an open subscript")
                parts.append(self.take().value)
            if braces:
                self.expect("}")
            name += "_" + "".join(parts)
        return ("symbol", name)

    def structure(self, token: Token) -> Tree:
        """A factor that begins with a sign or a command."""
        value = token.value
        if value in NAMED:
            return self.subscripted(value)
        if value in FUNCTIONS:
            return self.function(value)
        if value == "frac" or value == "binom":
            above, below = self.half_argument()
            return ("/" if value == "frac" else "binom", above, below)
        if value == "{":
            tree = self.sum()
            self.expect("}")
            return tree
        if value == "|":
            self.bars += 1
            tree = ("function", "Abs", self.scalar(self.inner()))
            self.bars -= 1
            self.expect("|")
            return tree
        if value in ("lfloor", "lceil"):
            tree = ("function", {"lfloor": "floor", "lceil": "ceiling"}[value], self.scalar(self.inner()))
            self.expect("r" + value[1:])
            return tree
        if value == "begin":
            return self.matrix()
        if value == "emptyset":
            return ("set",)
        if value in CLOSING:
            return self.bracket(value)
        raise Unreadable(value)

    def bracket(self, opening: str) -> Tree:
        """A group, a set, a tuple or an interval."""
        items = [] if opening == "\\{" and self.at("\\}") else [self.inner()]
        while self.accept(",", ";"):
            items.append(self.inner())
        closing = self.expect(")", "]") if opening in "([" else self.expect(CLOSING[opening])
        if opening == "\\{":
            return ("set", *items)
        if len(items) == 1 and opening != "langle":
            if closing != CLOSING[opening]:
                raise Unreadable("brackets that do not match")
            return self.scalar(items[0])
        return ("sequence", opening, closing, *items)

    def inner(self) -> Tree:
        """An element: a scalar, a tuple or a set. Units in brackets are not read."""
        self.brackets += 1
        tree = self.sum()
        self.brackets -= 1
        return tree

    def matrix(self) -> Tree:
        rows, row = [], []
        while True:
            row.append(self.scalar(self.inner()))
            if self.accept("&"):
                continue
            rows.append(("row", *row))
            row = []
            if self.accept("\\") and not self.at("end"):
                continue
            self.expect("end")
            if len({len(r) for r in rows}) != 1:
                raise Unreadable("rows of different lengths")
            return ("matrix", *rows)

    def function(self, name: str) -> Tree:
        name, power = INVERSES.get(name, name), self.argument() if self.accept("^") else None
        if name == "sqrt":
            index = ("number", "2")
            if self.accept("["):
                index = self.scalar(self.inner())
                self.expect("]")
            tree = ("^", self.argument(), ("/", ("number", "1"), index))
        elif name == "log" and self.accept("_"):
            base = self.argument()
            tree = ("log", base, self.operand())
        elif name == "log":
            tree = ("log", ("number", "10"), self.operand())
        elif name == "exp":
            tree = ("^", ("symbol", "e"), self.operand())
        else:
            if power == ("-", ("number", "1")):
                name, power = f"arc{name}", None
            tree = ("function", {"ln": "log", "ceil": "ceiling", "abs": "Abs"}.get(name, name), self.operand())
        return tree if power is None else ("^", tree, power)

    def operand(self) -> Tree:
        """What a function without brackets takes: factors side by side, as in ``\\sin 2x``."""
        self.operands += 1
        bracketed = self.at("(", "{", "[")
        tree = self.scalar(self.power())
        while not bracketed and self.starts_factor() and self.peek().value not in ("(", "[", *FUNCTIONS):
            if self.peek().kind != "letters" and self.peek().value not in NAMED:
                raise Unreadable("an argument that does not end")
            tree = ("*", tree, self.scalar(self.power()))
        self.operands -= 1
        return tree
