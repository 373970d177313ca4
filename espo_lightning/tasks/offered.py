r"""The one answer that a completion offers to a puzzle, out of tags, boxes, fences and marks of emphasis.

In this order: the last ``<answer>`` tag if there is one, else the whole text; in it the content of ``\boxed{}``, else
of a fenced block, else all of it. Two different answers side by side are a hedge, which is none.
"""

import re

from espo_lightning.tasks.base import answer_part

BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
BOXES = 20  # more than so many are no answer
BOX_LIMIT = 1000  # characters in a box
FENCE = re.compile(r"(```|~~~)(?:[A-Za-z]*[ \t]*\r?\n)?(.*?)\1", re.DOTALL)
LAST_TAG = re.compile("<answer>", re.IGNORECASE | re.ASCII)
JOINED = re.compile(r"</answer>\s{0,20}(?:or|and|[,;/|])\s{0,20}$", re.IGNORECASE | re.ASCII)
MARKS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("``", "``"), ("`", "`"), ('"', '"'))
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])", re.IGNORECASE)


def offered(text: str) -> str | None:
    """The answer as text, or None if there is none or more than one."""
    part = answer_part(text)
    tags = [match.start() for match in LAST_TAG.finditer(text)]
    joined = len(tags) > 1 and JOINED.search(text[max(0, tags[-1] - 60) : tags[-1]])  # one tag, "or", another tag
    if joined and _plain(answer_part(text[: tags[-1]])) != _plain(part):
        return None
    found = boxes(part)
    if found is None or (found and _is_joined(part)):
        return None
    found = found or [match.group(2) for match in FENCE.finditer(part)]
    if len({_plain(answer) for answer in found}) > 1:
        return None
    return unmarked(found[-1] if found else part)


def boxes(text: str) -> list[str] | None:
    r"""What every complete ``\boxed{...}`` and ``\fbox{...}`` holds, or None if there are too many. In linear time."""
    matches = list(BOX.finditer(text))
    if len(matches) > BOXES:
        return None
    return [content for match in matches if (content := _braced(text, match.end())) is not None]


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for place in range(start, min(len(text), start + BOX_LIMIT + 1)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _is_joined(text: str) -> bool:
    """Does the line of a box offer something else, too?"""
    return any(BOX.search(line) and OR.search(line) for line in text.splitlines())


def unmarked(answer: str) -> str:
    """An answer without blanks, a full stop, dollar signs, backticks and asterisks around it."""
    while True:
        before, answer = answer, answer.strip()
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1]
        for opening, closing in MARKS:
            if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : -len(closing)]
                break
        if answer == before:
            return answer


def _plain(answer: str) -> str:
    return "".join(answer.split())
