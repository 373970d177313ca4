"""Trees of answers, see `grammar`, and the cursor over tokens that its readers share."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from espo_lightning.tasks.notation import Token, Unreadable

Tree = tuple
SCALARS = {"number", "symbol", "+", "*", "/", "^", "-", "function", "log", "!", "binom", "plusminus", "matrix"}
INFINITY = ("symbol", "infty")


@lru_cache(maxsize=4096)
def exact(tree: Tree) -> Fraction | None:
    """The value of arithmetic on rational numbers of moderate size, or None."""
    kind, *parts = tree
    if kind == "number":
        return Fraction(parts[0])
    if kind not in ("+", "*", "/", "^", "-"):
        return None
    values = [exact(part) for part in parts]
    if None in values or any(max(abs(v.numerator), v.denominator) >= 1 << 512 for v in values):
        return None
    match kind, values:
        case "+", [a, b]:
            return a + b
        case "*", [a, b]:
            return a * b
        case "-", [a]:
            return -a
        case "/", [a, b] if b != 0:
            return a / b
        case "^", [a, b] if b.denominator == 1 and abs(b) <= 64 and (a != 0 or b > 0):
            return a ** int(b)
    return None


class Cursor:
    """Recursive descent over tokens. Every method raises Unreadable where they end in the middle of something."""

    def __init__(self, found: Sequence[Token]) -> None:
        self.tokens, self.place, self.depth = found, 0, 0
        self.brackets = self.bars = self.operands = 0  # how many of each are open
        self.unit: str | None = None  # of the quantity that is being read

    @property
    def token(self) -> Token | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def peek(self, ahead: int = 0) -> Token:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("end", "")

    def at(self, *values: str, kind: str = "") -> bool:
        """Is the next token a sign or command (or of ``kind``) of this value?"""
        token = self.peek()
        return token.value in values and token.kind in ((kind,) if kind else ("sign", "command"))

    def word(self, ahead: int = 0) -> str:
        """The next token in lower case if it is made of letters, else ""."""
        token = self.peek(ahead)
        return token.value.lower() if token.kind in ("letters", "words") else ""

    def take(self) -> Token:
        token = self.peek()
        self.place += 1
        return token

    def accept(self, *values: str) -> bool:
        if self.at(*values):
            self.place += 1
            return True
        return False

    def expect(self, *values: str) -> str:
        if not self.at(*values):
            raise Unreadable(f"{self.peek().value!r} instead of {values}")
        return self.take().value
