"""From a completion to the program that is judged: fenced blocks by Markdown's own rules, and what goes before them."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from markdown_it import MarkdownIt

TEXT_LIMIT = 100_000  # characters of a completion that are read
LABELS = ("", "python", "python2", "python3", "py", "py2", "py3", "ipython", "ipython3")

_FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})(.*)$")
_INLINE = re.compile(r"^([ ]{0,3}`{3,})([^`\n]*\S)[ \t]*(`{3,}[A-Za-z0-9]*[ \t]*)$", re.MULTILINE)
_LATE = re.compile(r"(?<!`)`{3,}[A-Za-z0-9]*[ \t]*$")
_EARLY = re.compile(
    rf"^[ \t]*`{{3,}}(?![ \t]*(?:{'|'.join(LABELS[1:])})\b)(?=[ \t]+[^`\s{{][^`]*$|[.,;:!?)][^`]*$)", re.IGNORECASE
)
# Levels of nesting in one line that take minutes to parse.
_DEEP = re.compile(r"^(?:[ \t]*(?:>|[-+*](?=[ \t])|[0-9]{1,9}[.)](?=[ \t]))){6,}", re.MULTILINE)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+(?:\([^)]*\)|[^\n;]*)(?:;|$)", re.MULTILINE)


class Block(NamedTuple):
    """A closed fenced block."""

    label: str
    code: str


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    """CommonMark's block structure, without HTML: a tag on its own line would hide the fence below it."""
    return MarkdownIt("commonmark").disable(["inline", "text_join", "html_block", "reference", "lheading"])


def blocks(text: str) -> list[Block]:
    """The closed fenced blocks of a text, in order, with their labels in lower case. What is never closed is none."""
    text = text[:TEXT_LIMIT].replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\0", "\ufffd")
    if "```" not in text and "~~~" not in text:
        return []
    text = _DEEP.sub("", text)
    found = _blocks(_INLINE.sub(r"\1\n\2\n\3", text), 0)
    if any(block.label in LABELS for block in found):
        return found
    return _blocks("\n".join(map(_alone, text.split("\n"))), 0)


def _alone(line: str) -> str:
    """A line whose fence shares it with text as two lines: "Here it is: ```python", "return x```", "```. It works"."""
    if match := _EARLY.match(line):
        return f"{match.group()}\n{line[match.end() :]}"
    if (match := _LATE.search(line)) and line[: match.start()].strip(" \t>"):
        return f"{line[: match.start()]}\n{match.group()}"
    return line


def _blocks(text: str, depth: int) -> list[Block]:
    found, lines, start = [], text.split("\n"), 0
    for token in _markdown().parse(text):
        if token.map is None or token.map[0] < start:
            continue
        if token.type == "code_block" and depth < 2:  # indented as a whole, fences and all
            found += _blocks(token.content, depth + 1)
        if token.type != "fence":
            continue
        first, end = token.map
        code = token.content
        if not _closes(lines[end - 1], token.markup) or end - 1 == first:
            continue
        if _open_string(code) and (longer := _extended(lines, first, end, token.markup)):
            end, code = longer
            start = end
        found.append(Block(_label(token.info), code))
    return found


def _closes(line: str, markup: str) -> bool:
    match = _FENCE.match(line)
    return bool(match) and match[2].startswith(markup) and not match[3].strip()


def _open_string(code: str) -> bool:
    """Does the code end inside a triple-quoted string? Then the fence that closed it belongs to the string."""
    return any(code.count(quotes) % 2 for quotes in ('"""', "'" * 3))


def _extended(lines: Sequence[str], first: int, end: int, markup: str) -> tuple[int, str] | None:
    """(end, code) of the block that begins on line ``first`` up to the first later fence where no string is open."""
    indent = len(lines[first]) - len(lines[first].lstrip())
    for last in range(end, len(lines)):
        if _closes(lines[last], markup):
            code = "".join(re.sub(rf"^[ \t]{{0,{indent}}}", "", line) + "\n" for line in lines[first + 1 : last])
            if not _open_string(code):
                return last + 1, code
    return None


def _label(info: str) -> str:
    r"""The language of an info string: ``python title="a.py"``, ``{.python}``, ``Python3``, ``python:a.py``."""
    match = re.match(r"[{.\s]*([A-Za-z0-9+#]*)", info)
    return match[1].lower()


def defines(code: str, name: str) -> bool:
    """Is ``name`` a function, a class or a variable at the top of the code?"""
    name = re.escape(name)
    return bool(
        re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=(?!=)", code, re.M)
    )


def extract_code(text: str, names: Sequence[str] = ()) -> str | None:
    """The program of a completion: of its closed Python blocks, with or without a label, the one that counts, or None.

    That is the last of those that define most of ``names``, which are what the tests call: examples, their output and
    shell commands may follow or precede it. Blocks with another language's label do not count.
    """
    codes = [block.code for block in blocks(text) if block.label in LABELS]
    if not codes:
        return None
    known = [sum(defines(code, name) for name in names) for code in codes]
    return next(code for code, count in zip(reversed(codes), reversed(known)) if count == max(known))


def bare_code(text: str) -> str:
    """A completion without a closed block as code: all of it, without the fence that it ends with."""
    lines = text[:TEXT_LIMIT].replace("\r\n", "\n").replace("\ufeff", "").split("\n")
    while lines and (not lines[-1].strip() or _FENCE.match(lines[-1])):
        lines.pop()
    return "".join(f"{line}\n" for line in lines)


def assemble(head: str, entry_point: str, code: str) -> str:
    """The program to judge. ``head``: a function signature with its docstring (HumanEval), or "".

    Code that defines the entry point comes after the head, which lends its imports and helpers; anything else is taken
    for the body and continues it. Imports from ``__future__`` come first, where Python wants them.
    """
    if not head:
        return code
    future = "\n".join(match.rstrip(";") for match in _FUTURE.findall(code))
    code = _FUTURE.sub("", code)
    source = (
        f"{head}\n    pass\n\n{code}"
        if re.search(rf"^\s*(async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE)
        else head + code
    )
    return f"{future}\n{source}" if future else source
