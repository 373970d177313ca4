"""Rollouts with a large vocabulary: the library's sampler against the straightforward and the competent one, in turn.

    OMP_NUM_THREADS=1 python benchmarks/wide_vocabulary.py --sudoku=RUN/policy

A Sudoku policy, best a trained one, whose head is widened to LLaDA's 126,464 tokens, which it never writes; 8
completions of 16 tokens at once, temperature 1. Prints and writes JSON: tokens per user CPU second, and of the
library's settings the accuracy on held-out problems and the forward passes of a completion.
"""

import argparse
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import competent
import straightforward
import torch
from decoding import decode
from measure import host, summary, user_seconds

from espo_lightning import Decoding, Policy, Sudoku, generate, load_policy
from espo_lightning.keys import fold_in

VOCABULARY, ROWS, PROBLEMS = 126_464, 8, 64
PLAIN = Decoding(16, 16, 16)
SETTINGS = {
    "full": PLAIN,
    "threshold 0.99": replace(PLAIN, threshold=0.99),
    "threshold 0.9": replace(PLAIN, threshold=0.9),
}
BASELINES = {"straightforward": straightforward.generate, "competent": competent.generate}


def widen(policy: Policy, vocabulary: int = VOCABULARY) -> Policy:
    """The policy with more tokens, which it never writes: its accuracy with the head of a large vocabulary.

    The head's new rows are 32 times its mask token's: what training pushed down, far down.
    """
    model = deepcopy(policy.model)
    old, new = model.lm_head, torch.nn.Linear(policy.config.hidden_size, vocabulary, bias=False)
    with torch.no_grad():
        new.weight[:] = 32 * old.weight[policy.mask_id]
        new.weight[: len(old.weight)] = old.weight
    model.lm_head = new
    return Policy(model, policy.tokenizer, mask_id=policy.mask_id, shift=policy.shift)


def speed(policy: Policy, repeats: int) -> dict[str, dict]:
    """Tokens per user CPU second of every sampler, in turn."""
    problems = [Sudoku().problem("test", 0, i) for i in range(ROWS)]
    prompts, keys = policy.encode([p.prompt for p in problems]), fold_in(0, torch.arange(ROWS))
    assert prompts.mask is None, "the baselines take prompts of one width"
    generator = torch.Generator().manual_seed(0)
    seconds = {name: [] for name in (*BASELINES, *SETTINGS)}
    for repeat in range(repeats + 1):
        for name in seconds:
            start = user_seconds()
            if name in BASELINES:
                BASELINES[name](policy.model, policy.mask_id, prompts.ids, 16, 16, 16, 1.0, generator)
            else:
                generate(policy, prompts, keys, SETTINGS[name])
            if repeat:  # the first one warms up
                seconds[name].append(user_seconds() - start)
    return {name: summary([ROWS * PLAIN.length / s for s in values]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sudoku", default="bundled:sudoku", help="a policy for 4x4 Sudoku")
    parser.add_argument("--repeats", type=int, default=3, help="of every sampler (default: 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "wide_vocabulary.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = widen(load_policy(options.sudoku))
    result = {"host": host(), "vocabulary": VOCABULARY, "problems": PROBLEMS}
    result["tokens_per_second"] = speed(policy, options.repeats)
    result["settings"] = {}
    for name, decoding in SETTINGS.items():
        _, verdict, counter = decode(policy, Sudoku(), PROBLEMS, decoding)
        result["settings"][name] = {**verdict, "passes": counter.rows / PROBLEMS}
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
