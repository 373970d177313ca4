r"""The one answer that a completion offers to a puzzle, out of tags, boxes, fences and marks of emphasis.

In this order: the last ``<answer>`` tag if there is one, else the whole text; in it the content of ``\boxed{}``, else
of a fenced block, else all of it. Two different answers side by side are a hedge, which is none.
"""

import re
from collections.abc import Callable

from espo_lightning.tasks.base import answer_part

BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
BOXES = 20  # more than so many, or fences, are no answer
BOX_LIMIT = 1000  # characters in a box
LAYERS = 20  # of marks around an answer; each costs a copy of it
FENCE = re.compile(r"(```|~~~)(?:[A-Za-z]*[ \t]*\r?\n)?(.*?)\1", re.DOTALL)
LAST_TAG = re.compile("<answer>", re.IGNORECASE | re.ASCII)
JOINED = re.compile(r"</answer>\s{0,20}(?:or|and|[,;/|])\s{0,20}$", re.IGNORECASE | re.ASCII)
MARKS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("``", "``"), ("`", "`"), ('"', '"'))
AROUND = re.compile(r"^(?:\}|```|~~~)?[\s$.,;/|]*|[\s$.,;/|]*(?:\\(?:boxed|fbox)\s{0,4}\{|(?:```|~~~)[A-Za-z]*\s*)?$")
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])", re.IGNORECASE)


def offered(text: str, reads: Callable[[str], object]) -> str | None:
    """The answer as text, or None if there is none or more than one.

    reads: what an answer says, or None for other texts; what stands beside a box or fence is no second answer then.
    """
    part = answer_part(text)
    tags = [match.start() for match in LAST_TAG.finditer(text)]
    joined = len(tags) > 1 and JOINED.search(text[max(0, tags[-1] - 60) : tags[-1]])  # one tag, "or", another tag
    if joined and _plain(answer_part(text[: tags[-1]])) != _plain(part):
        return None
    found = boxes(part)
    if found is None or (found and _is_joined(part)):
        return None
    spans = found or [match.span(2) for match in FENCE.finditer(part)]
    if not spans:
        return unmarked(part)
    if len(spans) > BOXES or len({_plain(part[start:end]) for start, end in spans}) > 1:
        return None
    answer = unmarked(part[slice(*spans[-1])])
    around = zip([0, *(end for _, end in spans)], [*(start for start, _ in spans), len(part)])
    beside = [reads(unmarked(AROUND.sub("", part[start:end]))) for start, end in around]
    return None if any(said not in (None, reads(answer)) for said in beside) else answer


def boxes(text: str) -> list[tuple[int, int]] | None:
    r"""Where the content of every complete ``\boxed{...}`` and ``\fbox{...}`` stands, or None if there are too many."""
    matches = list(BOX.finditer(text))
    if len(matches) > BOXES:
        return None
    return [(match.end(), end) for match in matches if (end := _closing(text, match.end())) is not None]


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for place in range(start, min(len(text), start + BOX_LIMIT + 1)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def _is_joined(text: str) -> bool:
    """Does the line of a box offer something else, too?"""
    return any(BOX.search(line) and OR.search(line) for line in text.splitlines())


def unmarked(answer: str) -> str:
    """An answer without blanks, a full stop, dollar signs, backticks and asterisks around it."""
    for _ in range(LAYERS):
        before, answer = answer, answer.strip()
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1]
        for opening, closing in MARKS:
            if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : -len(closing)]
                break
        if answer == before:
            break
    return answer


def _plain(answer: str) -> str:
    return "".join(answer.split())
