r"""Answers as tokens: keyboard and Unicode mathematics, LaTeX's many names and spaces become one plain notation.

A token keeps what a reader sees as a unit: ``7\text{1}`` is two tokens and 71 is one, so that no rule can read both out
of the same text. `grammar` makes a tree of tokens.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from espo_lightning.tasks.vocabulary import (
    COMMANDS,
    KEYBOARD_SIGNS,
    SIZES,
    SPACES,
    SUBSCRIPTS,
    SUPERSCRIPTS,
    UNICODE,
    WORDS,
)

LIMIT = 300  # characters of an answer; a longer one is wrong (the longest of MATH-500 has 53)


class Token(NamedTuple):
    """kind: "number" (value: its exact value) | "letters" | "words" (letters out of ``\\text``) | "command" | "sign".

    text: as written, for numbers, whose digits count in a base. space: does white space stand before it?
    """

    kind: str
    value: str
    text: str = ""
    space: bool = False


class Unreadable(ValueError):
    """Not an answer in the notation that is read."""


_SIGNS = re.compile("|".join(map(re.escape, sorted(KEYBOARD_SIGNS, key=len, reverse=True))))
_TRANSLATE = str.maketrans(UNICODE)
_RAISED, _LOWERED = (re.compile(f"[{''.join(table)}]+") for table in (SUPERSCRIPTS, SUBSCRIPTS))
_GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\!,|\\,)(?=[0-9]{3}(?![0-9]))")  # TeX's ways to write 10,080
_ENVIRONMENT = re.compile(r"\\(begin|end)\s?\{([a-z]+)\}")
_MATRICES = ("matrix", "pmatrix", "bmatrix", "smallmatrix")
_WESTERN, _INDIAN = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+", r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
_THOUSANDS = re.compile(rf"(?:{_WESTERN}|{_INDIAN})(?![0-9]|,[0-9])(?:\.[0-9]+)?", re.ASCII)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s?(?:\{([0-9]+)\}|([0-9]))")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_LETTERS = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)


def _repeating(match: re.Match) -> Fraction:
    whole, fixed, period = match[1], match[2], match[3] or match[4]
    head = Fraction(int(whole + fixed or 0), 10 ** len(fixed))
    return head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def plain(text: str) -> str:
    """The text with keyboard and Unicode signs as LaTeX writes them."""
    text = _RAISED.sub(lambda m: "^{" + "".join(SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _SIGNS.sub(lambda m: KEYBOARD_SIGNS[m[0]], text.translate(_TRANSLATE))
    return _GROUP.sub(",", text)


def balanced(text: str, start: int, limit: int = LIMIT) -> int | None:
    """The place of the brace that closes the one before ``start``, or None. Escaped braces count in pairs as well."""
    depth = 1
    for place in range(start, min(len(text), start + limit + 1)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def tokens(text: str) -> list[Token]:
    """The tokens of an answer. Raises Unreadable for what no answer holds."""
    if len(text) > LIMIT:
        raise Unreadable("too long")
    found: list[Token] = []
    _scan(plain(text.strip().rstrip(".")), found, "letters", 0)
    return found


def _scan(text: str, found: list[Token], letters: str, nesting: int) -> None:
    """Append the tokens of ``text``. letters: the kind of its letters."""
    if nesting > 8:
        raise Unreadable("nested too deeply")
    place, space, depth = 0, bool(nesting), 0  # depth: in how many lists, where a comma divides and groups no digits

    def add(kind: str, value: str, written: str = "") -> None:
        nonlocal space
        found.append(Token(kind, value, written, space))
        space = False

    while place < len(text):
        char = text[place]
        if char.isspace() or char in "$~":
            place, space = place + 1, True
        elif match := _REPEATING.match(text, place):
            add("number", str(_repeating(match)), match[0])
            place = match.end()
        elif match := (_THOUSANDS.match(text, place) if depth == 0 else None) or _NUMBER.match(text, place):
            add("number", str(Fraction(match[0].replace(",", ""))), match[0].replace(",", ""))
            place = match.end()
        elif match := _LETTERS.match(text, place):
            add(letters, match[0])
            place = match.end()
        elif match := _ENVIRONMENT.match(text, place):
            if match[2] not in _MATRICES:
                raise Unreadable(match[2])
            add("command", match[1])
            place = match.end()
        elif char == "\\":
            match = _COMMAND.match(text, place)
            if match is None:
                raise Unreadable("a backslash at the end")
            name, place = match[1], match.end()
            if name in SPACES or name in SIZES or name.isspace():
                space = space or name not in SIZES
                place += name in SIZES and text[place : place + 1] == "."
            elif name in WORDS:
                inner = re.compile(r"\s?\{").match(text, place)
                end = balanced(text, inner.end()) if inner else None
                if end is None:
                    raise Unreadable(name)
                _scan(text[inner.end() : end], found, "words", nesting + 1)
                place, space = end + 1, True
            else:
                value = COMMANDS.get(name, name)
                add("command" if value[0].isalpha() or value == "\\" else "sign", value)
                depth += {"\\{": 1, "\\}": -1, "[": 1, "]": -1}.get(value, 0) if name != "\\" else 0
        elif char.isascii() and char.isprintable():
            add("sign", char)
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
            place += 1
        else:
            raise Unreadable(char)


def form(text: str) -> str | None:
    """What an answer looks like, whatever its spaces, its fonts and the case of its words; None if it is unreadable."""
    try:
        found = tokens(text)
    except Unreadable:
        return None
    return "\x1f".join(
        t.value
        if t.kind == "number"
        else t.value.lower()
        if t.kind in ("letters", "words") and len(t.value) > 1
        else t.value
        if t.kind != "command"
        else f"\\{t.value}"
        for t in found
    )
