"""Completions being unmasked, on a terminal: text side by side, in colours where there are any."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TextIO

from espo_lightning.lab.unmasking import Unmasking, steps_of

MASK, END = "▒", "·"  # a hidden position, and one behind the end of the text
# numbers of the 256-colour palette, from orange over grey to blue, which colour-blind readers can tell apart
RAMP = (208, 215, 250, 111, 33)
GAP = 4  # blanks between two panels
ESCAPE = re.compile(r"\033\[[0-9;]*m")


def coloured(out: TextIO) -> bool:
    """Whether to use colours and to draw over what stands there: on a terminal where NO_COLOR is not set."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def by_certainty(one: Unmasking, position: int) -> float:
    """How sure the policy was of a token, from 0 (perplexity 4 or more) to 1."""
    return max(0.0, (4 * one.certainty[position] - 1) / 3)


def by_step(one: Unmasking, position: int) -> float:
    """When a token was committed, from 0, in the first step, to 1, in the last."""
    return max(0, one.steps[position]) / max(1, *one.steps)


COLOURS: dict[str, tuple[Callable[[Unmasking, int], float], str, str]] = {
    "certainty": (by_certainty, "unsure", "sure"),
    "step": (by_step, "first", "last"),
}


def panel(one: Unmasking, step: int, width: int, columns: int | None, colour: str | None) -> list[str]:
    """The canvas after a step as lines of at most ``width`` characters.

    Args:
        columns: tokens of a line, one blank between two; None = as the text flows.
        colour: a key of `COLOURS`; None = without escape sequences.
    """
    lines, used = [""], 0
    for position, token in enumerate(one.shown(step)):
        text = MASK if token is None else END if position >= one.end else token
        if columns and position and position % columns == 0:
            lines, used = [*lines, ""], 0
        for part in re.split("(\n)", text) if not columns else [text.replace("\n", "↵")]:
            if part == "\n" or used + len(part) > width:
                lines, used = [*lines, ""], 0
            if part != "\n":
                lines[-1] += _styled(part, one, position, step, colour) + (" " if columns else "")
                used += len(part) + bool(columns)
    return lines


def _styled(text: str, one: Unmasking, position: int, step: int, colour: str | None) -> str:
    if colour is None or not text:
        return text
    if text in (MASK, END):
        return f"\033[2m{text}\033[0m"
    value = COLOURS[colour][0](one, position)
    new = "7;" if one.steps[position] == step else ""  # what this step committed is shown inverted
    return f"\033[{new}1;38;5;{RAMP[min(len(RAMP) - 1, int(value * len(RAMP)))]}m{text}\033[0m"


def beside(panels: Sequence[list[str]], widths: Sequence[int]) -> list[str]:
    """Panels side by side."""
    rows = zip_longest(*panels, fillvalue="")
    return ["".join(_padded(x, w + GAP) for x, w in zip(row, widths)).rstrip() for row in rows]


def _padded(text: str, width: int) -> str:
    return text + " " * (width - len(ESCAPE.sub("", text)))


def frame(
    unmaskings: Sequence[Unmasking], step: int, columns: int | None, colour: str | None, across: int
) -> list[str]:
    """All completions after a step, as many side by side as the screen of ``across`` characters holds."""
    narrow = max([2 * (columns or 0), *(len(one.policy) for one in unmaskings)])
    width = narrow if columns else max(narrow, min(60, (across + GAP) // min(len(unmaskings), 2) - GAP))
    each = max(1, (across + GAP) // (width + GAP))
    lines = []
    for first in range(0, len(unmaskings), each):
        part = unmaskings[first : first + each]
        lines += beside([[one.policy, *panel(one, step, width, columns, colour)] for one in part], [width] * len(part))
        lines += [""]
    return lines[:-1]


def legend(colour: str) -> str:
    """What the colours say."""
    _, low, high = COLOURS[colour]
    squares = " ".join(f"\033[38;5;{number}m■\033[0m" for number in RAMP)
    return f"{low} {squares} {high}; inverted: committed in this step"


def verdicts(unmaskings: Iterable[Unmasking]) -> list[str]:
    """A line per completion that was judged: right or wrong where that is known, its reward, its other metrics."""
    shown = [one for one in unmaskings if one.verdict]
    width = max((len(one.policy) for one in shown), default=0)
    lines = []
    for one in shown:
        metrics = {"reward": one.verdict["reward"]} | {k: v for k, v in one.verdict.items() if v and k != "exact"}
        exact = one.verdict.get("exact")
        word = "" if exact is None else "right  " if exact == 1 else "wrong  "
        lines.append(f"{one.policy:{width}}  {word}" + "  ".join(f"{k} {v:.3g}" for k, v in metrics.items()))
    return lines


def play(
    unmaskings: Sequence[Unmasking],
    columns: int | None = None,
    colour: str = "certainty",
    pause: float = 0.2,
    out: TextIO | None = None,
) -> None:
    """Show completions step by step: drawn over one another on a terminal, one after the other elsewhere.

    Args:
        columns: tokens of a line; None = as the text flows.
        colour: what colours say, "certainty" or "step".
        pause: seconds between two steps on a terminal.
        out: where to; None = standard output.
    """
    out = out or sys.stdout
    alive, screen = coloured(out), shutil.get_terminal_size()
    look, drawn = colour if alive else None, 0
    for step in [-1, *steps_of(list(unmaskings))]:
        lines = [f"step {step + 1}" if step >= 0 else "before the first step"]
        lines += [*frame(unmaskings, step, columns, look, screen.columns), ""]
        if alive:
            lines.append(legend(colour))
            over = f"\033[{drawn}A\033[J" if 0 < drawn < screen.lines else ""  # else it has scrolled away
            out.write(over + "\n".join(lines) + "\n")
            out.flush()
            time.sleep(pause)
        else:
            out.write("\n".join(lines) + "\n")
        drawn = len(lines)
