"""What stands behind a number: words that multiply or divide it, and its unit."""

from collections.abc import Sequence
from fractions import Fraction

from espo_lightning.tasks.notation import Token, Unreadable
from espo_lightning.tasks.vocabulary import (
    APPROXIMATE,
    BESIDE_UNITS,
    FACTORS,
    FUNCTIONS,
    IN_PLACE_OF_UNITS,
    KEYBOARD_NAMES,
    NEVER_UNITS,
    NUMBER_WORDS,
    PARTS,
    UNITS,
)

END = Token("end", "")
NO_UNIT = {*NEVER_UNITS, *NUMBER_WORDS, *FACTORS, *PARTS, *KEYBOARD_NAMES, *FUNCTIONS, *APPROXIMATE}
RATES = {"mi/h": "mph", "km/h": "kph"}
COUNTED = ("unit", "point", "sq", "cu")  # units of no dimension: they contradict nothing


def _word(tokens: Sequence[Token], place: int) -> str:
    """The token in lower case if it is made of letters, else ""."""
    token = tokens[place] if place < len(tokens) else END
    return token.value.lower() if token.kind in ("letters", "words") else ""


def _values(tokens: Sequence[Token], place: int, count: int) -> list[str]:
    return [token.value for token in tokens[place : place + count]]


def scaled_at(tokens: Sequence[Token], place: int, value: Fraction) -> tuple[Fraction, int]:
    """A number with "million", "dozen", "thirds" or "and a half" behind it, and the place after them."""
    if [_word(tokens, place + n) for n in range(2)] == ["and", "a"] and _word(tokens, place + 2) in PARTS:
        return value + Fraction(1, PARTS[_word(tokens, place + 2)]), place + 3
    while (word := _word(tokens, place)) in FACTORS:
        value, place = value * FACTORS[word], place + 1
    if word in PARTS and value.denominator == 1 and (value == 1 or word.endswith("s")):
        return value / PARTS[word], place + 1
    return value, place


def degree_at(tokens: Sequence[Token], place: int) -> int:
    """How many tokens a degree sign takes, 0 if there is none."""
    ahead = _values(tokens, place, 4)
    return 2 if ahead[:2] == ["^", "circ"] else 4 if ahead == ["^", "{", "circ", "}"] else int(ahead[:1] == ["circ"])


def _raised(tokens: Sequence[Token], place: int) -> tuple[str, int]:
    """The exponent of a unit, "" or "^2", and the place after it."""
    for count, ahead in ((2, ["^", "N"]), (4, ["^", "{", "N", "}"])):
        found = [t.value if t.kind != "number" else "N" for t in tokens[place : place + count]]
        if found == ahead:
            return "^" + tokens[place + count // 2].value, place + count
    return "", place


def unit_at(tokens: Sequence[Token], place: int, tree: tuple) -> tuple[str | None, int]:
    """(unit, the place after it) of the quantity ``tree``. The unit is "" for a noun, None if there is no unit.

    Raises:
        Unreadable: words that are no unit follow one.
    """
    if _values(tokens, place, 1) == ["%"] or _word(tokens, place) in ("percent", "percentage", "pct"):
        return "%", place + 1
    if [_word(tokens, place + n) for n in range(2)] == ["per", "cent"]:
        return "%", place + 2
    if degrees := degree_at(tokens, place):
        scale = _word(tokens, place + degrees)
        return ("degree", place + degrees) if scale not in ("c", "f") else (f"degree {scale}", place + degrees + 1)
    first = tokens[place] if place < len(tokens) else END
    if not _begins(tokens, place, first, tree):
        return None, place
    words, known, power, divided = [], [], "", False
    while (word := _word(tokens, place)) not in ("", "and", "or"):
        if word in NO_UNIT and not (words and word in BESIDE_UNITS):
            raise Unreadable(f"{word} behind a unit")
        if len(word) < 4 and not (_is_listed(tokens[place]) or (len(word) == 3 and len(_word(tokens, place + 1)) > 3)):
            raise Unreadable(f"{word} behind a unit")
        words.append(word)
        last = place
        if (name := UNITS.get(tokens[place].value) or UNITS.get(word)) and _word(tokens, place + 1) not in (
            "total",
            "all",
        ):
            known.append(name)
        raised, place = _raised(tokens, place + 1)
        power = power or raised
        if _values(tokens, place, 1) == ["."] and _word(tokens, place + 1):  # sq. ft.
            place += 1
        if _values(tokens, place, 1) == ["/"] and UNITS.get(_word(tokens, place + 1)):
            place, divided = place + 1, True
    plural = any(len(word) > 3 and word.endswith("s") and not word.endswith("ss") for word in words)
    ends = _is_listed(tokens[last]) or (len(words[-1]) > 3 and (words[-1].endswith("s") or words[-2:-1] == ["per"]))
    if not (ends and (plural or known or set(words) & set(IN_PLACE_OF_UNITS))):
        raise Unreadable("words that are no unit")
    power = (
        "^2" if {"sq", "square", "squared"} & set(words) else "^3" if {"cu", "cubic", "cubed"} & set(words) else power
    )
    known = [name for name in known if name not in COUNTED]
    rate = "/".join(known) if divided or "per" in words else " ".join(known)
    return RATES.get(rate, rate) + (power if known else ""), place


def _is_listed(token: Token) -> bool:
    word = token.value if len(token.value) == 1 else token.value.lower()
    return word in BESIDE_UNITS or word in IN_PLACE_OF_UNITS or word in UNITS or token.value in UNITS


def _begins(tokens: Sequence[Token], place: int, first: Token, tree: tuple) -> bool:
    """May a unit begin here, and not a variable? ``3 m`` has one, ``3m`` and ``3 m + 2`` have none."""
    word = _word(tokens, place)
    if word == "" or word in NO_UNIT:
        return False
    known = first.value in UNITS or (len(word) > 1 and word in UNITS)
    if len(word) == 1:
        _, after = _raised(tokens, place + 1)
        ends = _values(tokens, after, 1) in ([], [","], [";"], ["/"]) or tokens[after].kind == "number"
        return known and tree[0] == "number" and ends and (first.space or first.kind == "words")
    if first.kind == "words":
        return True
    if known and not _has_variable(tree):
        return True
    noun = len(word) > 3 or ((len(word) == 3 or word in BESIDE_UNITS) and len(_word(tokens, place + 1)) > 3)
    return first.space and (noun or word in IN_PLACE_OF_UNITS) and not _has_variable(tree)


def _has_variable(tree: tuple) -> bool:
    return tree[0] == "symbol" or any(_has_variable(part) for part in tree[1:] if isinstance(part, tuple))
