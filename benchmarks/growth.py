"""How the cost of a step grows: ``OMP_NUM_THREADS=1 python benchmarks/growth.py``.

From one small workload, one quantity at a time: group size, draws, updates, denoising steps, completion length,
vocabulary; and draws once more where decoding dominates (256 steps, mu = 8). The library with its defaults against the
straightforward and the competent version, in one process. Prints a table ("x": against the first value of the axis),
writes JSON and a figure. Rows that the JSON has already are not measured again.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
from measure import host, in_fresh_process, summary
from step import PHASES, SIDES, ratios, time_all
from workloads import Setting, Workload

BASE = Workload(prompts=2, group=4, updates=4)
LONG = Workload(prompts=1, group=4, length=256, block=32, steps=256, updates=8)
WIDE = Workload(prompts=1, group=4, steps=8, updates=2)
AXES = {
    "group": [replace(BASE, group=n) for n in (2, 4, 8, 16)],
    "draws": [replace(BASE, draws=n) for n in (1, 2, 4)],
    "updates": [replace(BASE, updates=n) for n in (1, 2, 4, 8)],
    "steps": [replace(BASE, steps=n) for n in (8, 16, 32)],
    "length": [replace(BASE, length=n, block=n) for n in (32, 64, 128, 256)],
    "vocabulary": [replace(WIDE, vocabulary=n) for n in (64, 4096, 49_152, 126_464)],
    "draws, 256 steps": [replace(LONG, draws=n) for n in (1, 2)],
}
COLOURS = {"straightforward": "#777777", "competent": "#D55E00", "library": "#0072B2"}
OPTIONS = {"": Setting(), "masks once": Setting(same_work=False, module={"fresh_masks": False})}


def measure(work: Workload, setting: Setting, repeats: int) -> dict:
    """Seconds of all sides."""
    sides, _, _ = in_fresh_process(time_all, work, setting, repeats)
    phases = ("step", *PHASES)
    row = {side: {key: summary([run[key] for run in runs[1:]]) for key in phases} for side, runs in sides.items()}
    return row | {"ratio": ratios(sides)}


def table(row: dict, first: dict) -> str:
    """A line; ``first`` is the row of the axis' first value."""
    seconds = [row[side]["step"]["median"] for side in SIDES]
    shown = " ".join(f"{s:10.2f} s ({s / first[side]['step']['median']:5.2f} x)" for s, side in zip(seconds, SIDES))
    others = " ".join(f"{ratio['step']['median']:7.2f}" for ratio in row["ratio"].values())
    return f"{row['axis']:18} {row['value']:7} {row['option']:12} {shown} {others}"


def draw(rows: list[dict], path: Path) -> None:
    """One panel per axis, all sides, seconds per step; median and range of the repeats."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    rows_of, columns = min(2, len(axes)), -(-len(axes) // 2)
    figure, panels = plt.subplots(
        rows_of, columns, figsize=(8, 2.3 * rows_of), layout="constrained", sharey=True, squeeze=False
    )
    for axis, panel in zip(axes, panels.flat):
        chosen = [row for row in rows if row["axis"] == axis and not row["option"]]
        values = [row["value"] for row in chosen]
        for side, colour in COLOURS.items():
            low, middle, high = ([row[side]["step"][key] for row in chosen] for key in ("min", "median", "max"))
            panel.plot(values, middle, "o-", ms=4, color=colour, label=side)
            panel.fill_between(values, low, high, color=colour, alpha=0.2, lw=0)
        panel.set(title=axis, xscale="log", yscale="log")
        panel.minorticks_off()
        panel.set_xticks(values, [str(v) if v < 1000 else f"{v // 1000}k" for v in values], fontsize=7)
        panel.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(axes) :]:
        panel.remove()
    for panel in panels[:, 0]:
        panel.set_ylabel("CPU seconds per step")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="some (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each side (default: 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"host": host(), "rows": []}
    rows: list[dict] = stored["rows"]
    names = " ".join(f"{side:>22}" for side in SIDES)
    print(f"{'axis':18} {'value':>7} {'option':12} {names}  library / others")
    for axis in arguments.axes:
        for work in AXES[axis]:
            for option, setting in OPTIONS.items():
                if option and axis != "draws, 256 steps":
                    continue
                case = {"axis": axis, "value": getattr(work, axis.partition(",")[0]), "option": option, **asdict(work)}
                row = next((r for r in rows if case.items() <= r.items()), None)
                if row is None:
                    row = case | measure(work, setting, arguments.repeats)
                    rows.append(row)
                    arguments.output.write_text(json.dumps(stored, indent=1) + "\n")
                first = next(r for r in rows if (r["axis"], r["option"]) == (axis, option))
                print(table(row, first), flush=True)
    draw(rows, arguments.output.with_suffix(".png"))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
