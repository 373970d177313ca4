"""The picture of a canvas being unmasked, before and after training, in the README.

``python website/picture.py`` decodes held-out Sudoku puzzles greedily with both policies, takes the first that is wrong
before and right after, and writes what the decoder returned (``docs/unmasking.json``) and the picture of it
(``docs/unmasking.svg``). A test makes both again.
"""

import json
from functools import partial
from pathlib import Path

from espo_lightning.lab.unmasking import fitting, keys_of, unmask
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.tasks.base import Problem
from espo_lightning.tasks.judge import judge
from espo_lightning.tasks.sudoku import Sudoku

DOCS = Path(__file__).parents[1] / "docs"
CELL, GAP, LEFT, TOP = 23, 22, 96, 34  # pixels: a cell, the space between grids, and the margins for words
GIVEN, SHOWN, RIGHT, WRONG, MASKED = "#666666", "#0072B2", "#009E73", "#D55E00", "#BBBBBB"
MOMENTS = (0, 8, 10, 12, 14, 16)  # denoising steps; the first eight copy the givens, of which the policy is sure


def traced(policy: Policy, problem: Problem, index: int) -> dict:
    """A greedy completion: its text, the step that committed each of its letters, and its verdict."""
    (made,) = unmask(policy, "", problem.prompt, fitting(policy, 0.0), keys_of(0, index, 1), partial(judge, problem))
    assert len(made.text) == 16, "one letter per token, as the picture has it"
    return {"text": made.text, "steps": made.steps, "verdict": made.verdict}


def compared(before: Policy, after: Policy, problems: int = 256) -> dict:
    """Both policies on the first held-out puzzle that is wrong before and right after.

    Raises:
        ValueError: there is none among so many.
    """
    task = Sudoku()
    for index in range(problems):
        problem = task.problem("test", 0, index)
        rows = {name: traced(policy, problem, index) for name, policy in (("before", before), ("after", after))}
        if (rows["before"]["verdict"]["exact"], rows["after"]["verdict"]["exact"]) == (0.0, 1.0):
            return {"index": index, "puzzle": problem.prompt, "answer": problem.answer, **rows}
    raise ValueError(f"none of {problems} puzzles is wrong before and right after: train another policy")


def picture(record: dict) -> str:
    """An SVG of the two rows of canvases, one column per moment."""
    width = LEFT + len(MOMENTS) * (4 * CELL + GAP)
    height = TOP + 2 * (4 * CELL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" role="img">',
        "<title>A Sudoku canvas at six moments of decoding, before and after training</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for column, moment in enumerate(MOMENTS):
        x = LEFT + column * (4 * CELL + GAP) + 2 * CELL
        parts.append(_word(x, TOP - 14, f"step {moment}", "middle"))
    for row, name in enumerate(("before", "after")):
        y = TOP + row * (4 * CELL + GAP)
        verdict = record[name]["verdict"]
        parts += [
            _word(8, y + 2 * CELL - 14, f"{name} RL", weight="bold"),
            _word(8, y + 2 * CELL + 6, "right" if verdict["exact"] else "wrong", colour=_verdict(verdict["exact"])),
            _word(8, y + 2 * CELL + 26, f"{100 * verdict['cell']:.0f} % cells", colour=_verdict(verdict["exact"])),
        ]
        for column, moment in enumerate(MOMENTS):
            parts += _grid(LEFT + column * (4 * CELL + GAP), y, record, name, moment)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _verdict(right: float) -> str:
    return RIGHT if right else WRONG


def _word(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222222", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}" font-size="13"'
    return f'<text x="{x}" y="{y}" {style} font-family="DejaVu Sans, Helvetica, Arial, sans-serif">{text}</text>'


def _grid(x: int, y: int, record: dict, name: str, moment: int) -> list[str]:
    """One canvas: lines, thicker around the four blocks, and the letters that are there at this moment."""
    side, made = 4 * CELL, record[name]
    parts = [f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="#222222" stroke-width="1.5"/>']
    for i in (1, 2, 3):
        line = f'stroke="#222222" stroke-width="{1.5 if i == 2 else 0.4}"'
        parts.append(f'<path d="M{x + i * CELL} {y}v{side}M{x} {y + i * CELL}h{side}" {line}/>')
    for i, (letter, step) in enumerate(zip(made["text"], made["steps"])):
        shown, given, right = step < moment, record["puzzle"][i] != "0", letter == record["answer"][i]
        colour = (
            MASKED if not shown else GIVEN if given and right else _verdict(right) if moment == MOMENTS[-1] else SHOWN
        )
        weight = "normal" if given and right else "bold"
        place = f'x="{x + (i % 4 + 0.5) * CELL}" y="{y + (i // 4 + 0.5) * CELL + 5}" text-anchor="middle"'
        parts.append(f'<text {place} fill="{colour}" font-weight="{weight}">{letter if shown else "·"}</text>')
    return parts


def record() -> dict:
    """The record of the bundled policy and of what the default run made of it."""
    return compared(load_policy("bundled:sudoku"), load_policy("bundled:sudoku_espo"))


if __name__ == "__main__":
    made = record()
    (DOCS / "unmasking.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (DOCS / "unmasking.svg").write_text(picture(made), encoding="utf-8")
