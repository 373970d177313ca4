"""Accuracy against the cost of decoding: ``OMP_NUM_THREADS=1 python benchmarks/pareto.py``.

Trained policies decode held-out problems at the temperature of rollouts, 1, with every setting and each seed, and what
they run is counted: forward passes in rows, tokens that went through the network, FLOPs. A setting's accuracy is
compared with that of the full decoding in pairs, problem by problem, the mean over seeds of each; intervals are
clustered as those of evaluations are. The setting to train with is chosen on decoding seeds of its own (`PILOTS`),
which are not reported: the cheapest of Sudoku's settings whose loss is not shown. Resumes where it was stopped;
``--table`` prints what was measured and draws it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from espo_lightning import BlockDecoding, Chain, Countdown, Decoding, Policy, Sudoku, generate, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops import Passes, forward
from espo_lightning.lab.network import Network, read_network
from espo_lightning.lab.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, panels, save
from espo_lightning.tasks.judge import judge
from espo_lightning.tasks.statistics import cluster_of, interval

SEEDS, PILOTS, PROBLEMS = range(5), (101, 102), 256
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pareto.json"
FULL = "full"


class Subject(NamedTuple):
    """Who decodes what; points: the most that a problem brings, of which ``verdict`` names the share."""

    policy: str
    task: Any
    full: Decoding
    verdict: str = "exact"
    points: int = 1


SUBJECTS = {
    "Sudoku": Subject("bundled:sudoku_espo", Sudoku(), Decoding(16, 16, 16)),
    "Countdown": Subject("bundled:countdown", Countdown(largest=10, largest_target=50), Decoding(12, 12, 12)),
    "chain": Subject("bundled:chain", Chain(64, reward="step"), BlockDecoding(128, 8, 128), "step", 64),
}
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def settings(name: str) -> dict[str, Decoding]:
    """What is tried on a subject: name -> decoding, the full one first."""
    full = SUBJECTS[name].full
    length = full.length
    tried = {FULL: full}
    tried |= {f"{n} steps": replace(full, steps=n) for n in (length // 2, length // 4, max(2, length // 8))}
    tried |= {f"threshold {bar:g}": replace(full, threshold=bar) for bar in THRESHOLDS}
    tried["early stop"] = replace(full, early_stop=True)
    tried["threshold 0.99, early stop"] = replace(full, threshold=0.99, early_stop=True)
    if isinstance(full, BlockDecoding):
        return tried
    cache, dual = {"prefix_cache": True}, {"prefix_cache": True, "dual_cache": True}
    blocks = replace(full, block_length=4)
    return tried | {
        "prefix cache, r 2": replace(full, **cache, refresh=2),
        "prefix cache, r 4": replace(full, **cache, refresh=4),
        "prefix cache": replace(full, **cache),
        "threshold 0.99, prefix cache, r 2": replace(full, threshold=0.99, **cache, refresh=2),
        "half the steps, corrector 4": replace(full, steps=length // 2, corrector=4),
        "blocks of 4": blocks,
        "blocks of 4, threshold 0.9": replace(blocks, threshold=0.9),
        "blocks of 4, prefix cache, r 2": replace(blocks, **cache, refresh=2),
        "blocks of 4, prefix cache": replace(blocks, **cache),
        "blocks of 4, dual cache, r 2": replace(blocks, **dual, refresh=2),
        "blocks of 4, dual cache": replace(blocks, **dual),
    }


class Counter:
    """A policy that counts what it runs."""

    def __init__(self, policy: Policy, network: Network):
        self.policy, self.network = policy, network
        self.calls, self.rows, self.tokens, self.flops = 0, 0, 0, 0.0

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def __call__(self, ids, attention, select, *rest, prefix=None, **more):
        rows, keys = ids.shape
        part = slice(None) if prefix is None else prefix.computed
        tokens = rows * len(range(*part.indices(keys)))
        self.calls, self.rows, self.tokens = self.calls + 1, self.rows + rows, self.tokens + tokens
        read, pairs = int(select.sum()), tokens * keys
        unread = (0, 0) if read or prefix is None else (tokens, pairs)
        self.flops += sum(forward(self.network, Passes(1, tokens, 1, read, pairs, unread)))
        return self.policy(ids, attention, select, *rest, prefix=prefix, **more)


def measure(name: str, decoding: Decoding, seeds, problems: int) -> dict:
    """Per completion: forward passes, tokens through the network, FLOPs; and every problem's points in all seeds."""
    subject = SUBJECTS[name]
    policy = Counter(load_policy(subject.policy), read_network(subject.policy))
    batch = [subject.task.problem("test", 0, i) for i in range(problems)]
    prompts, points = policy.encode([problem.prompt for problem in batch]), [0] * problems
    for seed in seeds:
        completion = generate_with(policy, prompts, fold_in(seed, torch.arange(problems)), decoding)
        for i, text in enumerate(policy.decode(completion)):
            points[i] += round(judge(batch[i], text)[subject.verdict] * subject.points)
    count = problems * len(seeds)
    costs = {"passes": policy.rows, "tokens": policy.tokens, "flops": policy.flops}
    return {key: value / count for key, value in costs.items()} | {"points": " ".join(map(str, points))}


def generate_with(policy, prompts, keys: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """By either decoder."""
    blocks = isinstance(decoding, BlockDecoding)
    return decoding.generate(policy, prompts, keys) if blocks else generate(policy, prompts, keys, decoding)


# ---- what was measured ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A setting: costs as shares of the full decoding's, accuracy, and the paired difference with its interval."""

    label: str
    passes: float
    tokens: float
    flops: float
    accuracy: float
    difference: float
    low: float
    high: float


def rows_of(result: dict, name: str, seeds: int) -> list[Row]:
    """The settings of a subject, in their order."""
    subject, full = SUBJECTS[name], result[FULL]
    most = seeds * subject.points

    def values(one: dict) -> list[float]:
        return [int(points) / most for points in one["points"].split()]

    problems = [subject.task.problem("test", 0, i) for i in range(len(values(full)))]
    clusters = [cluster_of(problem.prompt, problem.cluster) for problem in problems]
    rows = []
    for label, one in result.items():
        change = [a - b for a, b in zip(values(one), values(full))]
        bounds = interval(change, clusters) if any(change) else (0.0, 0.0)
        costs = (one[key] / full[key] for key in ("passes", "tokens", "flops"))
        rows.append(Row(label, *costs, mean(values(one)), mean(change), *bounds))
    return rows


def chosen(result: dict) -> str:
    """The cheapest of Sudoku's settings on the pilot seeds whose loss is not shown: its interval reaches 0."""
    rows = rows_of(result["pilot"]["Sudoku"], "Sudoku", len(PILOTS))
    return min((row for row in rows if row.high >= 0), key=lambda row: row.flops).label


def on_front(rows: list[Row]) -> list[Row]:
    """The rows than which none is both cheaper and better, from the cheapest on."""
    best, front = -1.0, []
    for row in sorted(rows, key=lambda row: (row.flops, -row.accuracy)):
        if row.accuracy > best:
            best, front = row.accuracy, [*front, row]
    return front


def table(result: dict) -> str:
    """What was measured, as Markdown."""
    lines = []
    for name in SUBJECTS:
        full, rows = result["reported"][name][FULL], rows_of(result["reported"][name], name, len(SEEDS))
        front = {row.label for row in on_front(rows)}
        verdict = SUBJECTS[name].verdict
        lines += [
            f"**{name}**, {full['passes']:.0f} passes and {full['flops'] / 1e6:,.0f} MFLOP a completion in full:",
            "",
        ]
        lines += [
            f"| {name} | passes | tokens | FLOPs | {verdict} | against full [95 %] |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            label = f"**{row.label}**" if row.label in front else row.label
            change = "" if row.label == FULL else f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            costs = " | ".join(f"{x:.2f}" for x in (row.passes, row.tokens, row.flops))
            lines.append(f"| {label} | {costs} | {row.accuracy:.3f} | {change} |")
        lines.append("")
    return "\n".join(lines)


CACHE = ", prefix cache"
LINES = {  # from the most expensive setting to the cheapest, beside which the name stands: settings, colour, place
    "fewer steps": (("8 steps", "6 steps", "4 steps", "3 steps", "2 steps"), ORANGE, (6, -10)),
    "even steps": (("64 steps", "32 steps", "16 steps"), ORANGE, (6, -4)),
    "threshold": (tuple(f"threshold {bar:g}" for bar in THRESHOLDS), BLUE, (-50, -3)),
    "prefix cache": (("prefix cache, r 2", "prefix cache, r 4", "prefix cache"), GREEN, (4, 12)),
    "blocks of 4, prefix": (("blocks of 4", f"blocks of 4{CACHE}, r 2", f"blocks of 4{CACHE}"), VERMILLION, (-24, -14)),
    "blocks of 4, dual": (
        ("blocks of 4", "blocks of 4, dual cache, r 2", "blocks of 4, dual cache"),
        PURPLE,
        (-20, -28),
    ),
    "early stop": (("early stop",), GREY, (-44, -12)),
}


def draw(result: dict) -> None:
    """The accuracies against FLOPs, as docs/decoding.png; the name of a line stands at its cheapest point."""
    figure, axes = panels(*SUBJECTS, height=3.8, width=3.8)
    for axis, name in zip(axes, SUBJECTS):
        rows = {row.label: row for row in rows_of(result["reported"][name], name, len(SEEDS))}
        for label, (members, colour, shift) in LINES.items():
            found = [rows[member] for member in members if member in rows]
            points = sorted([*found, *([] if "blocks" in label else [rows[FULL]])], key=lambda row: -row.flops)
            if not found or all(row.flops > 0.99 for row in found):
                continue
            axis.plot([row.flops for row in points], [row.accuracy for row in points], color=colour, marker="o")
            end, where = (points[-1].flops, points[-1].accuracy), {"textcoords": "offset points", "fontsize": 8}
            axis.annotate(label, end, shift, color=colour, **where)
        axis.plot(1, rows[FULL].accuracy, "s", color=BLACK)
        axis.annotate("full", (1, rows[FULL].accuracy), (6, -3), **where)
        axis.set(xscale="log", xlabel="FLOPs of a completion / full", ylabel=SUBJECTS[name].verdict, xlim=(0.05, 1.8))
        axis.set_ylim(0, 1.15 * max(row.accuracy for row in rows.values()))
        axis.set_xticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
        axis.minorticks_off()
    save(figure, ROOT, "docs", "decoding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=PROBLEMS, help=f"held-out problems (default: {PROBLEMS})")
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), choices=SUBJECTS, help="some (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing, print and draw what the output holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(options.output.read_text()) if options.output.exists() else {"pilot": {}, "reported": {}}
    for part, seeds in (("pilot", PILOTS), ("reported", SEEDS)):
        for name in [] if options.table else options.only:
            done = result[part].setdefault(name, {})
            for label, decoding in settings(name).items():
                if label not in done and (part == "reported" or name == "Sudoku"):
                    done[label] = measure(name, decoding, seeds, options.problems)
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                    print(part, name, label, {k: round(v) for k, v in done[label].items() if k != "points"}, flush=True)
    print(table(result))
    print("chosen:", chosen(result))
    draw(result)


if __name__ == "__main__":
    main()
