"""The tables of speed on the pages below (`PAGES`), from `benchmarks/results/`.

    python benchmarks/speed_tables.py        # writes them anew, each behind a comment that names it; a test compares

A ratio is that of the library to the version named, below 1 where the library takes less: of steps in turn, the median
and in brackets the range.
"""

import json
import math
import re
from pathlib import Path
from statistics import median

import default_run
import startup

ROOT = Path(__file__).parents[1]
WORDS = {  # what the rows of `step.py` are called where nobody knows them
    "M=1": "the same float32 work, M = 1",
    "M=2": "M = 2",
    "M=1, 3 x 4": "M = 1 in 4 micro-batches",
    "M=2, 3 x 4": "M = 2 in 4 micro-batches",
    "compile": "M = 1, `--model.compile=inductor`",
    "M=2, compile": "M = 2, `--model.compile=inductor`",
    "reused masks": "masks once per rollout (`--model.fresh_masks=false`)",
    "beta=0, skip groups": "no penalty (β = 0), groups without variance skipped",
    "both": "masks once per rollout, β = 0, groups without variance skipped",
    "bf16": "bfloat16 weights",
    "bf16, eager": "bfloat16 weights, eager attention",
    "all of these": "masks once, β = 0, bfloat16, eager attention, compiled",
}
PHASES = ("rollout", "score", "update")
RESULTS = Path(__file__).parent / "results"
PAGES = tuple(
    ROOT / page for page in ("docs/speed.md", "docs/results.md", "benchmarks/NOTES.md", "benchmarks/README.md")
)


def stored(name: str) -> dict:
    """A file of `benchmarks/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is words."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def spread(of: dict[str, float], digits: int = 2) -> str:
    """Median and range."""
    return f"{of['median']:.{digits}f} [{of['min']:.{digits}f}, {of['max']:.{digits}f}]"


def measured_steps() -> list[dict]:
    """The rows of `step.py`, in the order of `WORDS`."""
    return sorted(stored("step")["rows"], key=lambda row: list(WORDS).index(row["name"]))


def step() -> str:
    """Every row of `step.py`."""
    head = ["setting", "straightforward, s", "competent, s", "library, s", "library / competent", "/ straightforward"]
    rows = []
    for row in measured_steps():
        seconds = [f"{row[side]['step']['median']:.2f}" for side in ("straightforward", "competent")]
        ratios = [spread(row["ratio"][side]["step"]) for side in ("competent", "straightforward")]
        rows.append([row["name"], *seconds, spread(row["library"]["step"]), *ratios])
    return markdown(head, rows)


def steps() -> str:
    """The ratios of `step` alone."""
    rows = []
    for row in measured_steps():
        rows.append(
            [WORDS[row["name"]], *(spread(row["ratio"][side]["step"]) for side in ("competent", "straightforward"))]
        )
    return markdown(["library /", "competent", "straightforward"], rows)


def growths() -> str:
    """The ratios of `growth` alone."""
    rows = []
    for row in stored("growth")["rows"]:
        ratios = [spread(row["ratio"][side]["step"]) for side in ("competent", "straightforward")]
        rows.append([f"{row['axis']} {row['value']:,}", *ratios])
    return markdown(["library /", "competent", "straightforward"], rows)


def growth() -> str:
    """The axes of `growth.py` that were measured."""
    head = ["", "straightforward, s", "competent, s", "library, s", "library / competent", "/ straightforward"]
    rows = []
    for row in stored("growth")["rows"]:
        seconds = [f"{row[side]['step']['median']:.2f}" for side in ("straightforward", "competent", "library")]
        ratios = [spread(row["ratio"][side]["step"]) for side in ("competent", "straightforward")]
        rows.append([f"{row['axis']} {row['value']:,}", *seconds, *ratios])
    return markdown(head, rows)


def second_draw() -> str:
    """What M = 2 adds where decoding dominates, measured before there was a competent version."""
    rows = stored("growth_long")
    sides = [("straightforward", "straightforward", ""), ("library", "library", "")]
    sides.append(("library, masks once per rollout", "library", "masks once"))
    lines = []
    for name, side, option in sides:
        one, two = (row[side] for row in rows if row["option"] == option)
        parts = [" + ".join(f"{m[phase]['median']:.1f}" for phase in PHASES) for m in (one, two)]
        added = two["step"]["median"] / one["step"]["median"] - 1
        lines.append([name, *parts, f"{added:+.0%}"])
    return markdown(["rollout + scoring + updates, s", "M = 1", "M = 2", "the second draw, of a step"], lines)


def larger() -> str:
    """Other sizes of network, measured before there was a competent version."""
    head = ["size, M", "straightforward, s", "library, s", "library / straightforward", "share of the matmul peak"]
    rows = []
    for row in stored("step_0.45M")["rows"] + stored("step_large")["rows"]:
        seconds = [spread(row[side]["step"]) for side in ("straightforward", "library")]
        share = f"{row['library']['share_of_peak']:.0%}"
        rows.append([f"{row['size']}, {row['draws']}", *seconds, f"{row['ratio']['step']['median']:.2f}", share])
    return markdown(head, rows)


def authors() -> str:
    """What was measured beside the authors' own trainer."""
    sides = ("library", "straightforward")
    rows = [
        [row["setting"], *(" to ".join(f"{n:.2f}" if n < 2 else f"{n:g}" for n in row[side] or []) for side in sides)]
        for row in stored("authors")["rows"]
    ]
    return markdown(["setting", "library / authors", "straightforward / authors"], rows)


def quality() -> str:
    """Rollouts and CPU seconds until one half, by side; a seed without is shown as -."""
    found = stored("quality")
    head = ["", "learning rate", "rollouts, by seed", "median", "user CPU s, median", "CPU s of a rollout", "passes"]
    rows = []
    for side, rate in found["rates"].items():
        runs = finals(found, side)
        needed = [run["rollouts"] for run in runs]
        shown = ", ".join("-" if n is None else f"{n:.1f}" for n in needed)
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        each = median(run["curve"][-1][0] / (len(run["curve"]) - 1) for run in runs)
        middle = [f"{median(n for n in needed if n is not None):.1f}", f"{median(seconds):.1f}", f"{each:.2f}"]
        rows.append([side, f"{rate:g}", shown, *middle, str(runs[0]["passes"])])
    return markdown(head, rows)


PAIRS = [  # sides of `quality`, of which the first's numbers are divided by the second's
    ("library, defaults", "straightforward, defaults"),
    ("library, authors' settings", "straightforward, authors' settings"),
    ("library, defaults with two tokens a step", "library, authors' settings"),
    ("library, defaults with two tokens a step", "straightforward, authors' settings"),
]


def pairs() -> str:
    """Ratios of two sides over the seeds that both brought to one half: geometric means with 95 % intervals."""
    found, rows = stored("quality"), []
    for one, other in PAIRS:
        both = [(a, b) for a, b in zip(finals(found, one), finals(found, other)) if a["rollouts"] and b["rollouts"]]
        rows.append([f"{one} / {other}", str(len(both))])
        for key in ("rollouts", "seconds"):
            middle, half = default_run.gain([math.log(a[key] / b[key]) for a, b in both])
            rows[-1].append("{:.2f} [{:.2f}, {:.2f}]".format(*map(math.exp, (middle, middle - half, middle + half))))
    return markdown(["", "seeds", "rollouts", "user CPU seconds"], rows)


def finals(found: dict, side: str) -> list[dict]:
    """The reported runs of a side, by seed."""
    named = re.compile(rf"{re.escape(side)} lr=\S+ seed=1\d$")  # 10 to 19; pilots have three digits
    return [run for key, run in found["runs"].items() if named.match(key)]


def default() -> str:
    """Accuracies of the default run by rollouts."""
    return default_run.accuracies(stored("default_run")["runs"])


def where() -> str:
    """Where the CPU seconds of the default run go."""
    return default_run.phases(stored("default_run")["runs"])


def start() -> str:
    """How long programs take to start."""
    return startup.table(stored("startup")["cpu_seconds"])


def wide() -> str:
    """Rollouts with a large vocabulary."""
    found = stored("wide_vocabulary")
    rows = []
    for name, speed in found["tokens_per_second"].items():
        verdict = found["settings"].get(name)
        shown = [f"{verdict['exact']:.3f}", f"{verdict['passes']:.1f}"] if verdict else ["", ""]
        own = found["tokens_per_second"]["full"]["median"]
        rows.append([f"library, {name}" if verdict else name, spread(speed, 0), f"{own / speed['median']:.2f}", *shown])
    return markdown(["", "tokens per user CPU s", "speed of library, full, over this", "exact", "passes"], rows)


def memory() -> str:
    """Peak memory of one pass, of the rows with LLaDA's vocabulary."""
    rows = []
    for row in stored("memory")["rows"]:
        head = "frozen" if row["frozen"] else "trained"
        case = f"{row['batch']} x ({row['prompt']} + {row['length']}), d {row['hidden']}, {row['vocabulary']:,}, {head}"
        ratios = [f"{row['library'] / row[side]:.2f}" for side in ("competent", "straightforward")]
        rows.append([case, *(f"{row[side]:.0f}" for side in ("straightforward", "competent", "library")), *ratios])
    return markdown(["case", "straightforward, MiB", "competent", "library", "/ competent", "/ straightforward"], rows)


def trajectory() -> str:
    """Peak memory of an update along the decoder's trace, against its steps."""
    rows = stored("trajectory")
    head = ["steps of the trace", *(f"{way}, MiB" for way in rows[0]["MiB"])]
    return markdown(head, [[str(row["steps"]), *(f"{x:.0f}" for x in row["MiB"].values())] for row in rows])


def thresholds() -> str:
    """Passes and accuracy of confidence thresholds."""
    shown = (None, 0.5, 0.7, 0.9, 0.99)
    head = ["task, block", *("full" if bar is None else str(bar) for bar in shown)]
    rows = []
    for name, file, part, curve, block in curves("threshold"):
        of = {row["threshold"]: f"{row['passes']:.1f}, {row['exact']:.3f}" for row in stored(file)[part][curve]}
        rows.append([f"{name}, {block}", *(of[bar] for bar in shown)])
    return markdown(head, rows)


def prefix() -> str:
    """What the prefix cache changes."""
    rows = []
    for name, file, part, curve, block in curves("prefix_cache"):
        found = stored(file)[part][curve]
        exact = [f"{found[side]['exact']:.3f}" for side in ("full", "cached")]
        rows.append([f"{name}, {block}", f"{found['changed_completions']:.0%}", *exact])
    return markdown(["task, block", "changed completions", "exact, full", "exact, cached"], rows)


def curves(part: str) -> list[tuple[str, str, str, str, int]]:
    """Words, file, task and key of every policy, in blocks of 4 and in one."""
    policies = [("Sudoku", "decoding", "sudoku", 16), ("Sudoku, trained", "decoding_trained", "sudoku", 16)]
    return [
        (*policy, f"{part}{end}", size) for *policy, whole in policies for end, size in (("", 4), ("_one_block", whole))
    ]


def threads() -> str:
    """Seconds of two threads over those of one, of a rollout and its updates."""

    def both(row: dict, clock: str) -> str:
        one, two = (sum(row[n][phase][clock]["median"] for phase in ("rollout", "update")) for n in "12")
        return f"{two / one:.2g}" if two / one >= 2 else f"{two / one:.2f}"

    spinning, passive = ({row["size"]: row for row in stored(f)["rows"]} for f in ("threads", "threads_passive"))
    rows = []
    for size, row in spinning.items():
        sleeping = [both(passive[size], clock) if size in passive else "" for clock in ("cpu", "wall")]
        rows.append([size, both(row, "cpu"), both(row, "wall"), *sleeping])
    return markdown(["policy", "processor, spinning", "wall, spinning", "processor, sleeping", "wall, sleeping"], rows)


def kernels() -> str:
    """Shares of a pass by kind of kernel."""
    found = stored("one_pass")["shares"]
    rows = [[kind, *(f"{found[run][kind]:.0%}" for run in found)] for kind in found["forward"]]
    return markdown(["", "forward", "forward and backward"], rows)


def bfloat16() -> str:
    """Milliseconds of a pass by type, attention and compilation."""
    found = stored("one_pass")["milliseconds"]
    rows = [[name, *(spread(of[run], 0) for run in ("forward", "trained"))] for name, of in found.items()]
    return markdown(["user CPU ms", "forward", "forward and backward"], rows)


TABLES = {
    function.__name__: function
    for function in (
        *(
            step,
            steps,
            growth,
            growths,
            second_draw,
            larger,
            authors,
            quality,
            pairs,
            default,
            where,
            start,
            wide,
            memory,
            trajectory,
        ),
        *(thresholds, prefix, threads, kernels, bfloat16),
    )
}


def written(page: Path) -> str:
    """A page with its tables as they should be."""
    return (
        re.sub(
            r"<!-- table: (\w+) -->\n+(?:\|.*\n)*\n*",
            lambda match: f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n",
            page.read_text(),
        ).rstrip("\n")
        + "\n"
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page))
