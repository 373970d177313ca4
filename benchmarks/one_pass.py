"""Where the time of one pass goes, by kernel, and what bfloat16, eager attention and compilation change.

    OMP_NUM_THREADS=1 python benchmarks/one_pass.py

24 rows of 64 tokens through a random policy of 0.87M parameters, forward alone and forward with backward. Shares are
those of torch's profiler in float32; milliseconds are user CPU time, the settings in turn. Prints two tables, writes
JSON.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measure import host, random_policy, summary, user_seconds
from torch.profiler import ProfilerActivity, profile
from workloads import SIZES

ROWS, WIDTH = 24, 64
SETTINGS = {
    "float32, sdpa": ("float32", "sdpa", False),
    "float32, eager": ("float32", "eager", False),
    "float32, sdpa, compiled": ("float32", "sdpa", True),
    "bfloat16, sdpa": ("bfloat16", "sdpa", False),
    "bfloat16, eager": ("bfloat16", "eager", False),
    "bfloat16, eager, compiled": ("bfloat16", "eager", True),
}
KINDS = {  # the beginning of a kernel's name, after aten::
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot_product",),
    "elementwise": ("mul", "add", "silu", "pow", "div", "neg", "rsqrt", "sub", "where", "fill_", "mean", "sum"),
    "copies and concatenations": ("copy_", "cat", "index", "embedding"),
}


def passes(dtype: str, attention: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """The forward pass alone, and with its backward pass."""
    policy = random_policy(*SIZES["0.87M"]).to(getattr(torch, dtype))
    policy.model.set_attn_implementation(attention)
    if compiled:
        policy.compile_network("inductor")
    ids = torch.randint(8, 60, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    select = torch.arange(WIDTH).expand(ROWS, -1) % 4 == 3  # a quarter: half of the positions of half of a canvas

    def trained() -> None:
        policy(ids, None, select, lambda logits: logits.logsumexp(-1)).sum().backward()

    return {
        "forward": torch.no_grad()(lambda: policy(ids, None, select, lambda x: x.logsumexp(-1))),
        "trained": trained,
    }


def shares(run: Callable[[], None]) -> dict[str, float]:
    """Shares of the kernels' own time, by `KINDS`; what belongs to none is the rest."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(5):
            run()
    own = {event.key: event.self_cpu_time_total for event in measured.key_averages()}
    whole = sum(own.values())
    found = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for name, time in own.items():
        of = (kind for kind, names in KINDS.items() if name.removeprefix("aten::").startswith(names))
        found[next(of, "the rest")] += time / whole
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of every setting (default: 7)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "one_pass.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: passes(*setting) for name, setting in SETTINGS.items()}
    found = {"host": host(), "shares": {kind: shares(run) for kind, run in runs["float32, sdpa"].items()}}
    seconds = {name: {kind: [] for kind in kinds} for name, kinds in runs.items()}
    for repeat in range(options.repeats + 1):
        for name, kinds in runs.items():
            for kind, run in kinds.items():
                start = user_seconds()
                for _ in range(3):
                    run()
                if repeat:  # the first one warms up, and compiles
                    seconds[name][kind].append((user_seconds() - start) / 3)
    found["milliseconds"] = {
        name: {kind: summary([1000 * s for s in values]) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }
    print(json.dumps(found, indent=1))
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
