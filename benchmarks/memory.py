"""Peak memory of one scoring and backward pass: ``python benchmarks/memory.py``.

The library builds logits for the scored positions only, in chunks; the straightforward version builds
those of every position, twice. A thin network (hidden size 32, one layer) leaves little else to see. Each figure
comes from a fresh process. Prints a table, writes JSON.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from measure import in_fresh_process, random_policy, resident_peak
from straightforward import terms

from espo_lightning import ELBO, Policy, Prompts
from espo_lightning.likelihood import score

VOCABULARIES, LENGTHS, BATCHES = (64, 49_152, 126_464), (32, 128), (2, 4, 8)
LIMIT = 8192  # MiB: straightforward cases that need more by estimate are left out


def case(vocabulary: int, length: int, batch: int, library: bool) -> float:
    """MiB that resident memory rises: scores of ``batch`` completions on a coupled mask, and their gradient."""
    policy = random_policy(32, 1, 2, 64, vocabulary)
    one_pass(policy, length=8, batch=1, library=library)  # loads code; allocates the gradients, which stay
    return resident_peak(lambda: one_pass(policy, length, batch, library))


def one_pass(policy: Policy, length: int, batch: int, library: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, 64, (batch, length), generator=generator)
    completion = torch.randint(8, 64, (batch, length), generator=generator)
    masks = ELBO().draw(torch.arange(batch), length)
    if library:
        scored = score(policy, Prompts(prompts, None), completion, masks)
    else:
        scored = terms(policy.model, policy.mask_id, prompts, completion, masks)
    scored.sum().backward()


def estimate(vocabulary: int, length: int, batch: int) -> float:
    """MiB of the straightforward version's logits: two passes, all positions, about three copies alive at the peak."""
    return 3 * 2 * batch * 2 * length * vocabulary * 4 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    print(f"{'vocabulary':>10} {'prompt':>7} {'length':>7} {'batch':>6} {'straightforward':>16} {'library':>8}   MiB")
    rows = []
    for vocabulary, length, batch in product(VOCABULARIES, LENGTHS, BATCHES):
        small = estimate(vocabulary, length, batch) <= LIMIT
        plain = in_fresh_process(case, vocabulary, length, batch, False) if small else None
        library = in_fresh_process(case, vocabulary, length, batch, True)
        rows.append(
            {"vocabulary": vocabulary, "prompt": length, "length": length, "batch": batch}
            | {"straightforward_MiB": plain, "library_MiB": library}
        )
        shown = "left out" if plain is None else f"{plain:.0f}"
        print(f"{vocabulary:10} {length:7} {length:7} {batch:6} {shown:>16} {library:8.0f}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
