r"""The grammar of answers: a tree of the whole answer, or nothing. A fragment is never read.

An answer is a list of items, an item an expression with at most a unit, a relation, a set, a tuple or interval, a
matrix, or words. A tree is a tuple of its kind and its parts, plain data that crosses a pipe:

    number value | symbol name | + a b | * a b | / a b | ^ a b | - a | function name a | log base a | ! a | binom a b
    plusminus sign a                                                   (scalars)
    quantity a unit | compound quantities ... | based digits base | words text | ratio a b ...
    list a ... | either a ... | set a ... | sequence open close a ... | union a ... | matrix row ... (a row: row a ...)
    = a ... | order signs a ... | in name a | approximate a decimal
"""

from functools import lru_cache

from espo_lightning.tasks.expressions import CONSTANTS, Expressions
from espo_lightning.tasks.notation import Unreadable, tokens
from espo_lightning.tasks.trees import Tree
from espo_lightning.tasks.vocabulary import APPROXIMATE, CURRENCY_CODES, FUNCTIONS, KEYBOARD_NAMES, SMALL_WORDS

ORDERS = {"<": "<", ">": ">", "le": "<=", "ge": ">="}


@lru_cache(maxsize=4096)
def read(text: str) -> Tree | None:
    """The tree of an answer, or None if it cannot be read as a whole."""
    try:
        reader = _Answers(tokens(text))
        tree = reader.answer()
        return tree if reader.token is None else None
    except Unreadable:
        return None


class _Answers(Expressions):
    """Lists, relations and quantities."""

    def answer(self) -> Tree:
        """Items, divided by commas, semicolons, "and" and "or"."""
        if self.is_text():
            self.place = len(self.tokens)
            return ("words", " ".join(token.value.lower() for token in self.tokens))
        items, dividers = [self.item()], set()
        while self.token is not None:
            comma = self.accept(",", ";")
            if not (comma or self.word() in ("and", "or")):
                raise Unreadable(self.peek().value)
            dividers.add(self.take().value if self.word() in ("and", "or") else ",")
            items.append(self.item())
        return items[0] if len(items) == 1 else ("either" if dividers == {"or"} else "list", *items)

    def is_text(self) -> bool:
        """Words and no mathematics: letters only, with one word among them that is too long for a product."""
        short = {*FUNCTIONS, *KEYBOARD_NAMES}
        long = [t for t in self.tokens if (t.kind == "words" and len(t.value) > 1) or len(t.value) > 3]
        return all(t.kind in ("letters", "words") for t in self.tokens) and any(t.value not in short for t in long)

    def item(self) -> Tree:
        if self.peek().kind == "letters" and self.peek().value in SMALL_WORDS and self.peek(1).kind != "sign":
            raise Unreadable("prose")
        if self.word() in APPROXIMATE or self.at("approx"):
            self.place += 1
            self.accept(".")
        if self.peek().value in CURRENCY_CODES and self.peek(1).kind == "number":
            self.place += 1
        sides, signs = [self.side()], []
        while self.at("=", "in", *ORDERS):
            signs.append(self.take().value)
            sides.append(self.side())
        if set(signs) <= {"="} and self.accept("approx"):
            return ("approximate", ("=", *sides) if signs else sides[0], self.decimal())
        if not signs:
            return sides[0]
        if set(signs) == {"="}:
            return ("=", *sides)
        if signs == ["in"] and sides[0][0] == "symbol" and sides[0][1] not in CONSTANTS:
            return ("in", sides[0][1], sides[1])
        if "in" in signs or "=" in signs:
            raise Unreadable("mixed relations")
        return ("order", tuple(ORDERS[sign] for sign in signs), *sides)

    def decimal(self) -> Tree:
        """The decimal that an exact value is near: its value and its last digit's."""
        sign = "-" if self.accept("-") else ""
        token, written = self.peek(), self.peek().text
        tree = self.side()
        if token.kind != "number" or tree[0] not in ("number", "quantity") or "." not in written:
            raise Unreadable("not near a decimal")
        return ("decimal", sign + token.value, f"1/{10 ** len(written.split('.')[1])}")

    def side(self) -> Tree:
        """One side of a relation: an object with at most a unit."""
        if self.accept("angle", "triangle"):
            return ("symbol", "∠" + self.take().value)
        name = self.call()
        if name is not None:
            return name
        first = self.quantity()
        if self.accept(":"):
            parts = [first, self.quantity()]
            while self.accept(":"):
                parts.append(self.quantity())
            return ("ratio", *parts)
        if first[0] == "quantity" and self.peek().kind == "number":
            parts = [first]
            while self.peek().kind == "number":
                parts.append(self.quantity())
            return ("compound", *parts)
        if self.at("cup"):
            parts = [first]
            while self.accept("cup"):
                parts.append(self.quantity())
            if not all(part[0] in ("sequence", "set") for part in parts):
                raise Unreadable("a union of numbers")
            return ("union", *parts)
        return first

    def call(self) -> Tree | None:
        """``f(x)`` before an equals sign, as a name; else None."""
        values = [self.peek(ahead) for ahead in range(5)]
        name, argument = values[0], values[2]
        if name.kind != "letters" or len(name.value) > 1 or [values[n].value for n in (1, 3, 4)] != ["(", ")", "="]:
            return None
        self.place += 4
        return ("symbol", f"{name.value}({argument.value})")

    def quantity(self) -> Tree:
        """An expression, and its unit or per cent sign behind it."""
        self.unit = None
        tree = self.sum()
        return tree if self.unit is None else ("quantity", self.scalar(tree), self.unit)
