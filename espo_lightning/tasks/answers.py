r"""Where the final answer of a completion stands, for GSM8K and MATH alike.

1. A complete ``<answer>...</answer>`` confines the search to what is in it; the last one counts.
2. The last complete ``\boxed{...}`` or ``\fbox{...}``, or the last few if only commas, "and" or "or" divide them.
3. What comes last of "#### ..." and "(the) answer is ..." / "Answer: ...", on its line or below it, to the end of the
   sentence or to an explanation.
4. All that stands in the tag.
5. For GSM8K only: the last number, where a hyphen between digits is no sign and a time of day ("7 pm") does not count.

A box that never closes is no answer: it may have been cut off, and \boxed{12 would be read where 120 was meant.
Two different answers are a hedge and none of them counts; they come back as one text, which equals neither.
"""

import re

from espo_lightning.tasks.grammar import read
from espo_lightning.tasks.notation import LIMIT, form, plain
from espo_lightning.tasks.trees import Tree
from espo_lightning.tasks.vocabulary import EXPLAINING, FACTORS, HEDGES, NEVER_UNITS, NUMBER_WORDS, PARTS

TEXT_LIMIT = 20_000  # characters of a completion that are read, from its end

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}(?:(\{)|([0-9A-Za-z])(?![0-9A-Za-z.]))")
_DIVIDER = re.compile(r"(?:[\s$*]|\\[()\[\],;: ]|\\q?quad|\\text\{|\})*")
_MARKER = re.compile(
    r"####|(?<![A-Za-z])answers?(?:\s{1,4}to\s(?:the|this)\s(?:problem|question))?[*_]{0,3}\s{0,4}(?:is|are|:|=)(?:\s{0,4}:)?"
    r"(?:\s(?:therefore|thus|hence|then|simply|just)\b,?)?"
    r"|^[#*_ ]{1,8}(?:final\s)?answer[*_ ]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?|\.[0-9]{1,40}"
_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}.])-)?(?<![\w.,/])(?:{_DIGITS})(?:/[0-9]{{1,40}})?(?![0-9])", re.ASCII)
_CLOCK = re.compile(r"(?::[0-9]{2})?\s?[ap]\.?m\b", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w)*])(\*{1,3}|_{2,3}|`)(?=\S)([^*`\n]{1,200}?)(?<=\S)\1(?![\w(*])")
_PICTURES = re.compile("[\u2600-\u27bf\U0001f000-\U0001ffff\ufe0f]")  # a tick, a party
_SENTENCE = re.compile(r"[.?;](?:\s|$)|[.?;](?=[$*])")
_CUT = re.compile(
    r"[.?;](?=[\s$*]|$)|,(?=\s*[A-Za-z])|\s\(|\s(?=[a-z.]{2,10}\b)|(?<=\s)[-–—]{1,3}(?=\s*[A-Za-z])|\[(?=[A-Za-z])"
)
_OFFERS = re.compile(r"\W*(?:or|maybe|perhaps|possibly|probably|alternatively|otherwise)\b", re.IGNORECASE)
_GUESS = r"\b(?:or|xor|maybe|perhaps|possibly|alternatively|versus|vs)\b|\\(?:vee|lor)\b"
_EITHER = re.compile(rf"[0-9][^.!?\n]{{0,30}}(?:{_GUESS})[^.!?\n0-9]{{0,12}}$", re.IGNORECASE)
_OR_ELSE = re.compile(rf"[^.!?\n]{{0,12}}?(?:{_GUESS})", re.IGNORECASE)
CUTS = 40


def locate(text: str, numbers: bool) -> str | None:
    """The answer of a completion. ``numbers``: fall back to the last number."""
    text = text[-TEXT_LIMIT:]
    tags = list(_TAG.finditer(text))
    if tags:
        text = tags[-1][1]
    if (answer := boxed(text)) is not None:
        return answer or None
    if "\\boxed" in text:
        return None
    if (answer := marked(text)) is not None:
        return answer or None
    if tags:
        return _undecorated(text) or None
    return last_number(text) if numbers else None


# ---- boxes --------------------------------------------------------------------------------------------------------


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the complete boxes that lie in no other, in order. Linear in the text."""
    closing, opened = {}, []
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            closing[opened.pop()] = brace.start()
    found, after = [], 0
    for match in _BOX.finditer(text):
        end = match.end() if match[2] else closing.get(match.end(), -1) + 1
        if match.start() < after or not match.end() <= end <= match.end() + LIMIT:
            continue
        found.append((match.start(), end, match[2] or text[match.end() : end - 1]))
        after = end
    return found


def boxed(text: str) -> str | None:
    """What the last box holds, see the module's docstring; None if there is no complete one, "" if it is a hedge."""
    found = boxes(text)
    if not found:
        return None
    contents, start = [found[-1][2]], found[-1][0]
    for first, end, content in reversed(found[:-1]):
        words = re.findall(r"[A-Za-z]+", re.sub(r"\\q?quad|\\text", "", text[end:start]).lower())
        gap = _DIVIDER.sub("", text[end:start]).strip()
        if re.fullmatch(r"[,;]?(?:and|or)?", gap) and gap:
            contents.insert(0, content)
        elif form(content) == form(contents[0]):
            pass
        elif not words or (HEDGES & set(words) and not re.search(r"[.!?\n]", text[end:start])):
            return ""
        else:
            break
        start = first
    inner = [_unboxed(content) for content in contents]
    rest = text[found[-1][1] : found[-1][1] + LIMIT]
    if offer := _OFFERS.match(rest):
        other = statement(rest[offer.end() :])
        return " or ".join([*inner, other]) if read(other) else ""
    if re.match(r"\s*\\(?:vee|lor|cup)\b", rest) or _is_another(rest.partition("\n")[0], inner[-1]):
        return ""
    return inner[0] if len({form(content) or content for content in inner}) == 1 else ", ".join(inner)


def _unboxed(content: str) -> str:
    """The content of a box that holds nothing but a box."""
    inside = boxes(content)
    return _unboxed(inside[0][2]) if len(inside) == 1 and inside[0][:2] == (0, len(content)) else content


# ---- sentences ----------------------------------------------------------------------------------------------------


def marked(text: str) -> str | None:
    """What follows the last marker; None if there is no marker, "" if nothing or a hedge follows."""
    markers = list(_MARKER.finditer(text))
    return statement(text[markers[-1].end() :]) if markers else None


def statement(rest: str) -> str:
    """The answer at the start of ``rest``: the longest beginning of its first line that reads as one."""
    rest = rest[: 2 * LIMIT].lstrip(" \t\r\n*_:#")
    if display := re.match(r"(?:\$\$|\\\[)\s*(.{1,300}?)\s*(?:\$\$|\\\])", rest, re.DOTALL):
        rest = " ".join(display[1].split()) + rest[display.end() :]
    line, _, below = rest.partition("\n")
    line = _undecorated(line)
    if read(line):
        return "" if _offered_below(below, line) else line
    for cut in reversed([match.start() for match in _CUT.finditer(line)][:CUTS]):
        head, tail = line[:cut].strip(), line[cut:]
        if read(head) and head and not head.endswith(("=", ":")):
            return head if _harmless(tail, head) and not _offered_below(below, head) else ""
    sentence = _SENTENCE.split(line)[0]
    return sentence.strip() if form(sentence) else ""


def _harmless(tail: str, head: str) -> bool:
    """Does nothing that follows the answer ``head`` in its line offer another or change it?"""
    ended = tail[:1] in ".?;"  # no "!", which is a factorial behind a number
    if _OFFERS.match(tail) or _is_another(tail, head):
        return False
    if ended:
        return True
    sentence = _SENTENCE.split(tail)[0]
    words = re.findall(r"[a-z]+", sentence.lower())
    if not words or HEDGES & set(words):
        return not words and not re.search("[0-9]", sentence)
    changing = {*NEVER_UNITS, *NUMBER_WORDS, *FACTORS, *PARTS} - {"is", "are", "was"} | {"squared", "cubed"}
    if words[0] in EXPLAINING:
        return True
    variables = {word for word in words if len(word) == 1} - {"a", "i"}
    return not (re.search(r"[0-9\\^=<>+]", sentence) or variables or changing & set(words))


def _is_another(rest: str, answer: str) -> bool:
    """Does ``rest`` begin with an answer of its own: a number, or a sentence that is mathematics and nothing else?"""
    between = re.match(r"(?:[\s$*,;/|&.!?:)\]]|\\[,;: )\]$]|\\q?quad(?![A-Za-z]))*", rest)[0]
    rest = rest[len(between) :]
    if not re.search(r"[.!?]", between) and re.match(r"(?:\\[$(\[]|[\s({\[])*[-+]?[0-9]", rest):
        return True
    piece = _SENTENCE.split(_undecorated(rest))[0]
    if piece[:1] == "{" and piece[-1:] == "}":
        piece = piece[1:-1]
    tree = read(piece)
    if tree is None or form(piece) == form(answer) or _is_unit(piece):
        return False
    said = read(answer)
    return (
        tree[0] != "words" or piece.startswith("\\") or (said is not None and said[0] == "words" and " " not in piece)
    )


def _is_unit(text: str) -> bool:
    measured = read(f"2 {text}")
    return measured is not None and measured[0] == "quantity" and measured[1] == ("number", "2")


def _offered_below(below: str, answer: str) -> bool:
    """Does the next line that is not empty hold another answer and nothing else, or begin with "or"?"""
    line = next((line.strip() for line in below[:LIMIT].splitlines() if line.strip()), "")
    number = re.match(r"[$\\(\s]*[-+]?[0-9]", line) is not None
    return _OFFERS.match(line) is not None or ((read(line) is not None or not number) and _is_another(line, answer))


def _undecorated(text: str) -> str:
    """Without the marks of Markdown around it."""
    text = _BOLD.sub(r"\2", _PICTURES.sub("", text).strip())
    return text.strip(' \t\r\n*_`"').removesuffix("</answer>").strip()


def last_number(text: str) -> str | None:
    """The last number of a text that gives no other sign of its answer, with the word that multiplies it."""
    found = [n for n in _IN_TEXT.finditer(text) if not _CLOCK.match(text, n.end())]
    if not found:
        return None
    last = found[-1]
    before, after = text[max(0, last.start() - 40) : last.start()], text[last.end() : last.end() + 40]
    if _EITHER.search(before) or _OR_ELSE.match(after):
        return None
    words = re.findall(r"[A-Za-z]+", after)[:3]
    if words[:1] and words[0].lower() in FACTORS and after[:1] == " ":
        return f"{last.group()} {words[0]}"
    parts = [word for word in words if word.lower() in PARTS]
    return None if parts and (words[0] in parts or words[0] == "and") else last.group()


# ---- copies -------------------------------------------------------------------------------------------------------


def copies(answer: str, question: str, gold: str) -> bool:
    """Is the answer an expression that stands in the question, with something left to work out?

    A number, a fraction, a variable or a word is none, and neither is what looks like the gold answer itself. Brackets
    around it, spaces, the sign of a product, and a name and "=" before it make no difference.
    """
    tree = read(answer)
    if tree is None or form(answer) == form(gold):
        return False
    sides = tree[1:] if tree[0] == "=" else (tree,)
    texts, asked = _squeezed(answer).split("="), _squeezed(question)
    if len(sides) > 1 and _stands_in(_squeezed(answer), asked):
        return True
    claimed = [text for text, side in zip(texts, sides) if side[0] != "symbol"]
    return bool(claimed) and not any(map(_worked_out, sides)) and all(_stands_in(text, asked) for text in claimed)


def _worked_out(tree: Tree) -> bool:
    """Is it a value, or several?"""
    kind, *parts = tree
    if kind in ("number", "words", "based"):
        return True
    if kind in ("-", "quantity", "list", "set", "sequence", "union", "compound", "in", "order"):
        return all(
            _worked_out(part) or part[0] == "symbol" for part in parts if isinstance(part[0], str) and len(part) > 1
        )
    return kind == "/" and parts[0][0] == parts[1][0] == "number"


def _squeezed(text: str) -> str:
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ()\[\]]|[\s$~]", "", plain(text))
    text = re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])", "*", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


def _stands_in(text: str, asked: str) -> bool:
    while len(text) > 2 and text[0] in "({" and text[-1] in ")}":
        text = text[1:-1]
    return re.search(rf"(?<![0-9.]){re.escape(text)}(?![0-9])", asked) is not None
