"""What prefix caching, thresholds and early stop buy, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py        # some minutes; --quick for fewer problems
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --sudoku=RUN/policy    # a trained policy instead of the bundled

Forward passes are counted in rows: one row through the network once. Accuracies are those of held-out problems,
decoded greedily in blocks of 4 tokens. See benchmarks/README.md. What the output has of other parts stays.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from measure import host, random_policy, summary, user_seconds

from espo_lightning import Countdown, Decoding, Policy, Prompts, Sudoku, generate, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.tasks.judge import judge

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SUDOKU, COUNTDOWN = Decoding(16, 4, 16, temperature=0.0), Decoding(12, 4, 12, temperature=0.0)


class Counter:
    """A policy that counts its passes, in rows."""

    def __init__(self, policy: Policy):
        self.policy, self.passes, self.rows = policy, 0, 0

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def __call__(self, ids, *arguments, **prefix):
        self.passes += 1
        self.rows += len(ids)
        return self.policy(ids, *arguments, **prefix)


class Drift(Counter):
    """Beside every cached pass a full one, whose logits are compared with those of the cache."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.refreshed, self.cached = [], []  # mean absolute differences, in a block's first pass and in later ones

    def __call__(self, ids, attention, select, reduce, *columns, prefix):
        with torch.no_grad():
            full = self.policy(ids, attention, select, lambda logits, *_: logits, *columns)

        def compared(logits, *columns):
            (self.cached if known else self.refreshed).append((logits - full).abs().mean().item())
            return reduce(logits, *columns)

        known = len(prefix)
        return self.policy(ids, attention, select, compared, *columns, prefix=prefix)


def decode(
    policy: Policy, task, problems: int, decoding: Decoding, watch=Counter
) -> tuple[torch.Tensor, dict, Counter]:
    """Completions of held-out problems [n, L], their mean verdict, and the counter of passes."""
    batch = [task.problem("test", 0, i) for i in range(problems)]
    counter = watch(policy)
    keys = fold_in(0, torch.arange(problems))
    completion = generate(counter, policy.encode([p.prompt for p in batch]), keys, decoding)
    verdicts = [judge(problem, text) for problem, text in zip(batch, policy.decode(completion))]
    return completion, {key: sum(v[key] for v in verdicts) / problems for key in ("exact", "reward")}, counter


def prefix_error(policy: Policy, task, problems: int, decoding: Decoding) -> dict:
    """What the prefix cache changes."""
    full, verdict, _ = decode(policy, task, problems, decoding)
    cached, cached_verdict, drift = decode(policy, task, problems, replace(decoding, prefix_cache=True), Drift)
    texts = [policy.decode(c) for c in (full, cached)]
    return {
        "full": verdict,
        "cached": cached_verdict,
        "changed_completions": (full != cached).any(1).float().mean().item(),
        "changed_texts": sum(a != b for a, b in zip(*texts)) / problems,
        "logit_difference": sum(drift.cached) / len(drift.cached),
        "logit_difference_first_pass": max(drift.refreshed),
    }


def threshold_curve(policy: Policy, task, problems: int, decoding: Decoding) -> list[dict]:
    """Accuracy and passes per completion against the threshold; the first row is the full decoding."""
    rows = []
    for threshold in (None, *THRESHOLDS):
        _, verdict, counter = decode(policy, task, problems, replace(decoding, threshold=threshold))
        rows.append({"threshold": threshold, "passes": counter.rows / problems, **verdict})
    return rows


def early_stop(policy: Policy, task, problems: int, decoding: Decoding) -> dict:
    """What early stopping saves, and what it changes, at temperature 1."""
    (full, _, counter), (short, _, less) = (
        decode(policy, task, problems, replace(decoding, temperature=1.0, early_stop=on)) for on in (False, True)
    )
    texts = [policy.decode(c) for c in (full, short)]
    return {
        "passes": counter.rows / problems,
        "passes_early": less.rows / problems,
        "changed_texts": sum(a != b for a, b in zip(*texts)) / problems,
        "changed_canvases": (full != short).any(1).float().mean().item(),
    }


def speed(rows: int, width: int, decodings: dict[str, Decoding], repeats: int) -> dict:
    """Tokens per user CPU second of a random policy of 0.87M parameters, the settings in turn."""
    policy = random_policy(128, 4, 4, 384)
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(torch.randint(7, 60, (rows, width), generator=generator), None)
    keys, seconds = fold_in(0, torch.arange(rows)), {name: [] for name in decodings}
    for repeat in range(repeats + 1):
        for name, decoding in decodings.items():
            start = user_seconds()
            completion = generate(policy, prompts, keys, decoding)
            if repeat:  # the first one warms up
                seconds[name].append(user_seconds() - start)
    return {name: summary([completion.numel() / s for s in values]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sudoku", default="bundled:sudoku", help="a policy for 4x4 Sudoku")
    parser.add_argument("--countdown", default="bundled:countdown", help="a policy for 3-number Countdown")
    parts = ("sudoku", "countdown", "speed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="some (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer problems, a shorter canvas, one repeat")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems, length, repeats = (32, 64, 1) if options.quick else (256, 256, 5)
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    result |= {"problems": problems, "host": host()}
    for name, path, task, decoding in (
        ("sudoku", options.sudoku, Sudoku(), SUDOKU),
        ("countdown", options.countdown, Countdown(largest=10, largest_target=50), COUNTDOWN),
    ):
        if name not in options.parts:
            continue
        policy, one_block = load_policy(path), replace(decoding, block_length=decoding.length)
        result[name] = {
            "prefix_cache": prefix_error(policy, task, problems, decoding),
            "prefix_cache_one_block": prefix_error(policy, task, problems, one_block),
            "threshold": threshold_curve(policy, task, problems, decoding),
            "threshold_one_block": threshold_curve(policy, task, problems, one_block),
            "early_stop": early_stop(policy, task, problems, decoding),
        }
        print(name, json.dumps(result[name], indent=1))
    if "speed" in options.parts:
        plain = Decoding(length, 32, length, temperature=0.0)
        settings = {"full": plain, "prefix_cache": replace(plain, prefix_cache=True)}
        result["tokens_per_second"] = {"rows": 4, "prompt": 64, "length": length, "block_length": 32}
        result["tokens_per_second"] |= speed(4, 64, settings, repeats)
        print(json.dumps(result["tokens_per_second"], indent=1))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
