"""Peak memory of one scoring and backward pass: ``python benchmarks/memory.py``.

The library builds logits for the scored positions only, in chunks; the straightforward version builds those of every
position, twice. A thin network (hidden size 32, one layer) leaves little else to see; the last rows, of hidden size
512, are LLaDA's head on one prompt's completions, trained and frozen (LoRA). Each figure comes from a fresh process.
Prints a table, writes JSON.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from measure import in_fresh_process, random_policy, resident_peak
from straightforward import terms

from espo_lightning import ELBO, Policy, Prompts
from espo_lightning.scoring.score import score

LIMIT = 12_288  # MiB: straightforward cases that need more by estimate are left out


@dataclass(frozen=True)
class Case:
    """A row of the table: ``batch`` completions of ``length`` tokens after ``prompt`` tokens.

    frozen: whether head and embedding have no gradient, as under LoRA.
    """

    vocabulary: int
    prompt: int
    length: int
    batch: int
    hidden: int = 32
    frozen: bool = False

    def logits(self) -> float:
        """MiB of the float32 logits of every position, once."""
        return self.batch * (self.prompt + self.length) * self.vocabulary * 4 / 2**20


CASES = [Case(v, n, n, b) for v, n, b in product((64, 49_152, 126_464), (32, 128), (2, 4, 8))]
CASES += [Case(126_464, 144, 256, 6, hidden=512, frozen=frozen) for frozen in (False, True)]


def peak(case: Case, library: bool) -> float:
    """MiB that resident memory rises: scores of the completions on a coupled mask, and their gradient."""
    policy = random_policy(case.hidden, 1, 2, 2 * case.hidden, case.vocabulary)
    if case.frozen:
        policy.model.lm_head.requires_grad_(False)
        policy.model.model.embed_tokens.requires_grad_(False)
    one_pass(policy, Case(case.vocabulary, 8, 8, 1), library)  # loads code; allocates the gradients, which stay
    return resident_peak(lambda: one_pass(policy, case, library))


def one_pass(policy: Policy, case: Case, library: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, 64, (case.batch, case.prompt), generator=generator)
    completion = torch.randint(8, 64, (case.batch, case.length), generator=generator)
    masks = ELBO().draw(torch.arange(case.batch), case.length)
    if library:
        scored = score(policy, Prompts(prompts, None), completion, masks)
    else:
        scored = terms(policy.model, policy.mask_id, prompts, completion, masks)
    scored.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    print(
        f"{'vocabulary':>10} {'hidden':>6} {'prompt':>7} {'length':>7} {'batch':>6} {'head':>7} "
        f"{'logits':>7} {'straightforward':>16} {'library':>8}   MiB"
    )
    rows = []
    for case in CASES:
        small = 6 * case.logits() <= LIMIT  # two passes, about three copies alive at the peak
        plain = in_fresh_process(peak, case, False) if small else None
        library = in_fresh_process(peak, case, True)
        measured = {"logits_MiB": case.logits(), "straightforward_MiB": plain, "library_MiB": library}
        rows.append(asdict(case) | measured)
        shown = "left out" if plain is None else f"{plain:.0f}"
        head = "frozen" if case.frozen else "trained"
        print(
            f"{case.vocabulary:10} {case.hidden:6} {case.prompt:7} {case.length:7} {case.batch:6} {head:>7} "
            f"{case.logits():7.0f} {shown:>16} {library:8.0f}",
            flush=True,
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
