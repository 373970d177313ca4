"""The leaderboard as numbers and as a page: which learning rate is next, what is chosen, who differs. Pure.

An *entry* is what a method did on a task: its pilots, its learning rate and its final runs, as
`espo_lightning.contest.enter` returns them. A *board* holds the entries of a task by the methods' names.
"""

from pathlib import Path
from statistics import mean, median
from typing import Any

from espo_lightning.lab.choice import open_sides
from espo_lightning.lab.evidence import NO, NOT_SHOWN, YES, above, paired

COLUMNS = ("", "method", "held-out exact, median [range]", "minus ESPO, mean [95 %]", "shown", "in its own order")
COLUMNS += ("KL to the base", "rollouts", "FLOPs", "learning rate", "processor s", "wall s")

PAGE = """# Leaderboard: methods at equal compute

Every preset of [`experiments/methods`](../experiments/methods) but EBPO, which needs blocks, trains the bundled
policies ({tasks}) with the same FLOPs, prompts, tuning budget and, where the method allows it, decoder.
"ESPO, M = 2" is the ESPO preset with
the paper's two draws, two coupled pairs of masks instead of one. The numbers are those of
[notebook 09](../notebooks/09_leaderboard.ipynb), which says what was expected, shows curves, and says what they mean.
`python -m espo_lightning.leaderboard` writes this page from its `result.json`; a test compares.

**Enter your method.** Write a YAML file like those presets, with a first line `# Name: what it does`, and

```
python -m espo_lightning.leaderboard --method=my_method.yaml
```

tunes it like the others, runs it on the same seeds and adds its row, without running any other method again.

**The terms.** {prompts} prompts × {group} completions a rollout; as many rollouts as take the FLOPs of {rollouts} of
ESPO, by the cost model. The learning rate is chosen by the mean sampled reward of the final policy on training
problems, among {rates} (runs of full length for each, on other seeds: {pilots}) and beyond, where the best of them is
at an edge (further rates at most: {extra}); "edge" marks a choice still at one,
of which nothing is shown. Then {seeds} new seeds; the
last policy decodes {problems} held-out problems greedily, one token a step, low confidence first. Rollouts are
decoded in that order, too, at temperature 1, except for methods that score the decoder's trace: they keep the order
that they are made for, and "in its own order" is their accuracy there. All other settings are the preset's.

**What is shown.** Intervals are Student's, over the {seeds} seeds, of the difference to ESPO with the same seed (the
same prompts); "above" and "below" say that it excludes 0. Of {comparisons} such intervals, {wrong} would exclude it by
chance. The order of two rows without a verdict means nothing, and the held-out problems are the same for all rows. The
KL is of what a random-order decoder does, in nats per completion. Seconds are those of training on a busy machine with
one thread: compare processor seconds, roughly. Cells are medians where they do not say otherwise.

**What the ranking does not show.** Policies of less than a million parameters, canvases of 16 tokens or less, a right
answer that the base knows, a few small rollouts: nothing follows for 8B models, 256 tokens, or long training. Nor are
the methods' other settings (clips, KL weights, updates per rollout) tuned here; they are those of their presets. The
contest is not neutral: ESPO's are the library's defaults, chosen on this Sudoku policy, the others' those of papers.

{boards}
"""


def title(path: Path) -> str:
    """A method's name: what its file says before the first colon of a comment in its first line, or the file's name."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    name, colon, _ = first.removeprefix("#").partition(":")
    return name.strip() if first.startswith("#") and colon else path.stem


# ---- tuning ---------------------------------------------------------------------------------------------------------


def best(pilots: list[dict]) -> float:
    """The learning rate "lr" with the highest "score"; of equal ones the smallest."""
    return min(pilots, key=lambda pilot: (-pilot["score"], pilot["lr"]))["lr"]


def at_edge(pilots: list[dict]) -> bool:
    """Whether the best learning rate is the smallest or largest that was tried, so that a better one may lie beyond."""
    return bool(open_sides({(pilot["lr"],): pilot["score"] for pilot in sorted(pilots, key=lambda p: p["lr"])}))


def beyond(pilots: list[dict], factor: float) -> float:
    """The next learning rate outside a grid, on the side of its best one, with two digits."""
    lr, rates = best(pilots), [pilot["lr"] for pilot in pilots]
    return float(f"{lr * factor if lr == max(rates) else lr / factor:.2g}")


# ---- comparing ------------------------------------------------------------------------------------------------------


def ends(entry: dict, key: str = "exact") -> list[float]:
    """A measure of an entry's final policies, by seed."""
    return [run[key] for run in entry["runs"]]


def difference(entry: dict, other: dict, key: str = "exact") -> dict[str, Any]:
    """How a measure of two entries differs, paired by seed: "mean", "interval", and "shown".

    That is "above" or "below" if the interval excludes 0, else "not shown"; also where a learning rate is at the edge
    of what was tried ("edge"), as a better one may lie beyond.
    """
    a, b = ends(entry, key), ends(other, key)
    found = paired(a, b)
    chosen = not (entry.get("edge") or other.get("edge"))
    shown = {YES: "above", NO: "below"}.get(above(found) if chosen else NOT_SHOWN, NOT_SHOWN)
    return {"mean": mean(x - y for x, y in zip(a, b)), "interval": list(found), "shown": shown}


def order(board: dict[str, dict]) -> list[str]:
    """The methods of a board, those with the highest median accuracy first, then those with the highest mean."""
    return sorted(board, key=lambda name: (-median(ends(board[name])), -mean(ends(board[name])), name))


# ---- the page -------------------------------------------------------------------------------------------------------


def boards(result: dict) -> dict[str, dict[str, dict]]:
    """The boards of a stored result by the tasks' names, with the runs of all seeds."""
    return {
        contest: {
            name: {**entry, "runs": [row["runs"][contest][name] for row in result["per_seed"]]}
            for name, entry in entries.items()
        }
        for contest, entries in result["summary"]["entries"].items()
    }


def row(place: int, name: str, entry: dict, espo: dict) -> list[str]:
    """One line of a board."""
    found = difference(entry, espo)
    low, high = found["interval"]
    against = ["", ""] if entry is espo else [f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]", found["shown"]]
    exact = ends(entry)
    diverged = sum(ends(entry, "diverged"))
    return [
        str(place),
        name + (f" ({diverged} runs diverged)" if diverged else ""),
        f"{median(exact):.3f} [{min(exact):.3f}, {max(exact):.3f}]",
        *against,
        f"{median(ends(entry, 'own')):.3f}" if "own" in entry["runs"][0] else "",
        f"{median(ends(entry, 'kl')):.2f}",
        str(entry["rollouts"]),
        f"{entry['flops']:.2f}",
        f"{entry['lr']:g}" + (", edge" if entry["edge"] else ""),
        f"{median(ends(entry, 'cpu')):.0f}",
        f"{median(ends(entry, 'wall')):.0f}",
    ]


def section(contest: str, board: dict[str, dict], base: dict[str, float], chance: float) -> str:
    """A task's heading, its reference lines and its table."""
    rows = [row(i + 1, name, board[name], board["ESPO"]) for i, name in enumerate(order(board))]
    lines = [f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]]
    others = f"{base['random_order']:.3f} in random order and {base['left_to_right']:.3f} from the left"
    start = f"The base policy solves {base['exact']:.3f} ({others}); chance is {chance:.3f}."
    return "\n".join([f"## {contest}", "", start, "", *lines])


def page(result: dict, entered: list[dict]) -> str:
    """docs/leaderboard.md of notebook 09's result and what else was entered since.

    Args:
        entered: "name" of the method, the "parameters" that it ran with, and "entries" by the tasks' names.

    Raises:
        ValueError: something was entered with other parameters than the result's, or under a name that is taken.
    """
    found, parameters = boards(result), result["parameters"]
    for one in entered:
        check(one["name"], result, one["parameters"])
        for contest, entry in one["entries"].items():
            found[contest] = {**found[contest], one["name"]: entry}
    comparisons = sum(len(board) - 1 for board in found.values())
    summary = result["summary"]
    return PAGE.format(
        **{key: parameters[key] for key in ("prompts", "extra", "pilots", "seeds", "problems")},
        group=summary["group_size"],
        tasks=" and ".join(found),
        rollouts=" or ".join(f"{n} ({contest})" for contest, n in parameters["rollouts"].items()),
        rates=", ".join(f"{lr:g}" for lr in parameters["learning_rates"]),
        comparisons=comparisons,
        wrong=f"{comparisons / 20:.0f} or so",
        boards="\n\n".join(
            section(contest, board, summary["base"][contest], summary["chance"][contest])
            for contest, board in found.items()
        ),
    )


def check(name: str, result: dict, parameters: dict) -> None:
    """Raise ValueError if a method with these parameters does not belong on the board of a result."""
    if parameters != result["parameters"]:
        raise ValueError(f"{name} was entered with other parameters than the stored result has: enter it again")
    if any(name in entries for entries in result["summary"]["entries"].values()):
        raise ValueError(f"{name} is the name of a preset on the board: name your method otherwise, in its first line")
