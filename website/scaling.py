"""The numbers of docs/scaling.md, by `espo_lightning.cost`.

``python website/scaling.py`` writes its rows and outputs anew; a test compares. A row begins with flags in backticks,
in which a name such as $SUDOKU stands for what the page's block of variables says.
"""

import re
from functools import cache
from pathlib import Path

from espo_lightning import cost as calculator

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
ROW = re.compile(r"^\| `(\$[^`]*)` \|.*$", re.MULTILINE)
OUTPUT = re.compile(r"```\n\$ python -m espo_lightning.cost ?(.*?)\n(.*?)```", re.DOTALL)
READING = "reading, rollout"


def plain(flags: str, page: str) -> str:
    """Flags without the page's variables."""
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', page, flags=re.MULTILINE))
    while "$" in flags:
        flags = re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], flags)
    return flags


@cache
def table_of(flags: str) -> dict:
    """What the command line computes: "parameters", "table" and more."""
    return calculator.run(calculator.cost, "espo_lightning.cost", flags.split())


def seconds(flags: str) -> dict[str, float]:
    """Of a rollout's computing and reading, of scores and updates, at the first number of GPUs."""
    found = table_of(flags)["table"]["seconds"]
    parts = {part: found[f"computing, {part}"][0] for part in ("rollout", "scores", "updates")}
    return parts | {"reading": found[READING][0]}


def row(shown: str, page: str) -> str:
    """One line of a table: totals of one setting, where they differ at 8, 64 and 512 GPUs."""
    flags = plain(shown, page)
    table, spent = table_of(flags)["table"], seconds(flags)
    kinds = [values for name, values in table["seconds"].items() if name.startswith("collectives")]
    held = table["GB of memory per GPU"]
    memory = [max(pair) for pair in zip(held["total"], held["total in the rollout"])]
    cells = [
        f"{table['PFLOP per GPU']['total'][0]:.1f}",
        " + ".join(f"{spent[part]:.1f}" for part in ("rollout", "scores", "updates")),
        f"{spent['reading']:.1f}",
        " / ".join(f"{sum(column):.1f}" for column in zip(*kinds)),
        " / ".join(f"{gigabytes:.0f}" for gigabytes in memory),
    ]
    return f"| `{shown}` | {' | '.join(cells)} |"


def written(page: str) -> str:
    """The page with the numbers that its commands compute."""

    def output(match: re.Match) -> str:
        text = "\n".join(calculator.lines(table_of(match[1])))
        return f"```\n$ {' '.join(['python -m espo_lightning.cost', *match[1].split()])}\n{text}\n```"

    return OUTPUT.sub(output, ROW.sub(lambda match: row(match[1], page), page))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
