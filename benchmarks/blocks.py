"""What blocks buy: rollouts and scoring of block-causal policies against full attention.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py        # about ten CPU minutes; --quick for the smallest canvas only
    python benchmarks/blocks.py --table                  # what benchmarks/results/blocks.json says, as Markdown

The same random network under three settings: full attention (`Decoding`), block-causal with its cache and without
(`BlockDecoding`); and one scoring pass with M draws, of `ELBO` and `BlockELBO`, with its
gradient. User CPU seconds on one thread; what is compared runs in turns, and ratios are of medians, with the smallest
and largest ratio of a turn. See benchmarks/README.md.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import random_policy, summary, user_seconds

from espo_lightning import ELBO, BlockDecoding, BlockELBO, Decoding, Layout, Policy, Prompts
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops_blocks import cache_bytes
from espo_lightning.lab.network import Network
from espo_lightning.scoring.likelihood import Likelihood, Seen

SIZE = {"hidden_size": 96, "layers": 4, "heads": 4, "intermediate_size": 256}
PROMPT, LENGTHS, BLOCKS, DRAWS = 64, (64, 256, 1024), (4, 16, 32), (1, 2, 4)
UNCACHED = {64: BLOCKS, 256: BLOCKS, 1024: (16, 32)}  # by canvas, the blocks that are measured without a cache, too
RESULTS = Path(__file__).parent / "results" / "blocks.json"


def in_turns(jobs: dict[str, Callable[[], object]], repeats: int, once: Iterable[str] = ()) -> dict[str, list[float]]:
    """User CPU seconds of each, one after the other in every round; of some in the first round only."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats):
        for name, job in jobs.items():
            if number and name in once:
                continue
            start = user_seconds()
            job()
            seconds[name].append(user_seconds() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Of the medians, and the range over the rounds that both were in."""
    each = [a / b for a, b in zip(above, below)]
    above = above[: len(below)]
    return {"median": summary(above)["median"] / summary(below)["median"], "min": min(each), "max": max(each)}


def policies(block: int) -> tuple[Policy, Policy]:
    """The same weights under full and under block-causal attention."""
    full = random_policy(**SIZE)
    full.config.max_position_embeddings = 4096
    blocks = Policy(full.model, full.tokenizer, mask_id=full.mask_id, layout=Layout(block, "response"))
    return full, blocks


def some_prompts(rows: int) -> Prompts:
    ids = torch.randint(7, 60, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    return Prompts(ids, None)


def rollouts(length: int, rows: int, repeats: int, uncached: tuple[int, ...]) -> dict:
    """Tokens per second, one token a step, and how many times those of full attention.

    uncached: the blocks that are measured without a cache, too; on longer canvases than the shortest, once.
    """
    prompts, keys, full = some_prompts(rows), fold_in(0, torch.arange(rows)), policies(32)[0]
    jobs: dict[str, Callable[[], object]] = {
        "full": lambda: Decoding(length, 32, length).generate(full, prompts, keys),
    }
    for block in BLOCKS:
        blocks = policies(block)[1]
        for name, cache in [("cached", True), ("not cached", False)][: 1 + (block in uncached)]:
            decoding = BlockDecoding(length, block, length, cache=cache)
            jobs[f"b {block}, {name}"] = partial(decoding.generate, blocks, prompts, keys)
        if uncached and length == LENGTHS[0]:
            assert torch.equal(jobs[f"b {block}, cached"](), jobs[f"b {block}, not cached"]())
    once = [name for name in jobs if "not cached" in name and length > LENGTHS[0]]
    seconds = in_turns(jobs, repeats, once)
    shape = (SIZE["hidden_size"], SIZE["layers"], SIZE["heads"], SIZE["heads"], 24, SIZE["intermediate_size"], 64)
    return {
        "rows": rows,
        "seconds": seconds,
        "tokens per second": {name: rows * length / summary(s)["median"] for name, s in seconds.items()},
        "times full attention": {name: ratio(seconds["full"], s) for name, s in seconds.items() if name != "full"},
        "cache bytes": cache_bytes(Network(*shape), rows * (PROMPT + length), 4),
    }


def scoring(length: int, block: int, rows: int, repeats: int) -> dict:
    """A scoring pass and its backward pass; blocks as a share of full attention, by draws."""
    full, blocks = policies(block)
    prompts, keys = some_prompts(rows), fold_in(1, torch.arange(rows))
    completion = torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(1))

    def job(policy: Policy, likelihood: Likelihood) -> Callable[[], None]:
        masks = likelihood.masks(keys, Seen.of(policy, prompts, completion, keys))
        return lambda: likelihood.terms(policy, prompts, completion, masks).sum().backward()

    jobs = {}
    for draws in DRAWS:
        jobs[f"full, M {draws}"] = job(full, ELBO(draws))
        jobs[f"blocks, M {draws}"] = job(blocks, BlockELBO(draws, block=block))
    seconds = in_turns(jobs, repeats)
    shares = {f"M {m}": ratio(seconds[f"blocks, M {m}"], seconds[f"full, M {m}"]) for m in DRAWS}
    return {"rows": rows, "seconds": seconds, "of full attention": shares}


def table(result: dict) -> str:
    """The measured ratios as Markdown."""

    def cell(of: dict[str, float]) -> str:
        return (
            f"{of['median']:.2f} [{of['min']:.2f}, {of['max']:.2f}]" if of["min"] < of["max"] else f"{of['median']:.2f}"
        )

    lines = ["| tokens/s, times those of full attention | b 4 | b 16 | b 32 |", "|---|---|---|---|"]
    for name, measured in result["rollouts"].items():
        for kind in ("cached", "not cached"):
            cells = [measured["times full attention"].get(f"b {block}, {kind}") for block in BLOCKS]
            if any(cells):
                rows = f"{measured['rows']} row{'s' * (measured['rows'] > 1)}"
                lines.append(f"| {name}, {rows}, {kind} | {' | '.join(cell(c) if c else '' for c in cells)} |")
    lines += ["", "| scoring and its gradient, of full attention | M 1 | M 2 | M 4 |", "|---|---|---|---|"]
    for name, measured in result["scoring"].items():
        lines.append(f"| {name} | {' | '.join(map(cell, measured['of full attention'].values()))} |")
    for what, goal, found in goals(result):
        lines += ["", f"Goal: {what} {goal}. Measured {cell(found)}: {'reached' if met(goal, found) else 'missed'}."]
    return "\n".join(lines) + "\n"


def goals(result: dict) -> Iterator[tuple[str, str, dict[str, float]]]:
    """What was aimed at, and what came, where it was measured."""
    if (speed := result["rollouts"].get("L 256")) is not None:
        found = speed["times full attention"]["b 32, cached"]
        yield "tokens/s at L 256, b 32,", "at least 8 times those of full attention", found
    if (share := result["scoring"].get("L 256, b 32")) is not None:
        yield "scoring at L 256, b 32, M 4", "at most 0.9 of full attention", share["of full attention"]["M 4"]


def met(goal: str, found: dict[str, float]) -> bool:
    """Whether the median is on the right side of the number in a goal."""
    number = float(goal.split()[2])
    return found["median"] >= number if goal.startswith("at least") else found["median"] <= number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest canvas only")
    parser.add_argument("--rows", type=int, default=16, help="completions; on the longest canvas one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the output holds")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.output.read_text())), end="")
        return
    torch.set_num_threads(1)
    done = json.loads(options.output.read_text()) if options.output.exists() else {}
    result: dict = {"size": SIZE, "prompt": PROMPT, "torch": torch.__version__}
    result |= {"rollouts": done.get("rollouts", {}), "scoring": done.get("scoring", {})}

    def save(kind: str, name: str, measure: Callable[[], dict]) -> None:
        if name not in result[kind]:
            result[kind][name] = measure()
            options.output.write_text(json.dumps(result, indent=1) + "\n")
            print(kind, name, flush=True)

    rollouts(32, 2, 1, uncached=())  # the first passes of a process are slower
    for length in LENGTHS[: 1 if options.quick else None]:
        # where one round of full attention takes minutes
        rows, repeats = (1, 1) if length == 1024 else (options.rows, options.repeats)
        save("rollouts", f"L {length}", partial(rollouts, length, rows, repeats, UNCACHED[length]))
        few = rows if length <= 64 else max(1, rows // 4)  # a micro-batch
        for block in BLOCKS:
            save("scoring", f"L {length}, b {block}", partial(scoring, length, block, few, max(2, repeats)))
    print(table(result), end="")


if __name__ == "__main__":
    main()
