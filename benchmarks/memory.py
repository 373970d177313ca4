"""Peak memory of one scoring and backward pass: ``python benchmarks/memory.py``.

The library builds logits for the scored positions only, in chunks; the straightforward version builds those of every
position, twice, and the competent one those of the completion, twice. A thin network (hidden size 32, one layer)
leaves little else to see; the last rows, of hidden size 512, are LLaDA's head on one prompt's completions, trained and
frozen (LoRA). Each figure comes from a fresh process. Prints a table, writes JSON.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import competent
import torch
from measure import host, in_fresh_process, random_policy, resident_peak
from straightforward import log_probs, terms

from espo_lightning import ELBO, Policy, Prompts
from espo_lightning.scoring.score import score

LIMIT = 12_288  # MiB: cases in which the straightforward version needs more by estimate are left out
BASELINES = {"straightforward": log_probs, "competent": competent.log_probs}


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


CASES = [Case(126_464, 128, 128, 8)]
CASES += [Case(126_464, 144, 256, 6, hidden=512, frozen=frozen) for frozen in (False, True)]


def peak(case: Case, side: str) -> float:
    """MiB that resident memory rises: scores of the completions on a coupled mask, and their gradient."""
    policy = random_policy(case.hidden, 1, 2, 2 * case.hidden, case.vocabulary)
    if case.frozen:
        policy.model.lm_head.requires_grad_(False)
        policy.model.model.embed_tokens.requires_grad_(False)
    one_pass(policy, Case(case.vocabulary, 8, 8, 1), side)  # loads code; allocates the gradients, which stay
    return resident_peak(lambda: one_pass(policy, case, side))


def one_pass(policy: Policy, case: Case, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, 64, (case.batch, case.prompt), generator=generator)
    completion = torch.randint(8, 64, (case.batch, case.length), generator=generator)
    masks = ELBO().draw(torch.arange(case.batch), case.length)
    if side == "library":
        scored = score(policy, Prompts(prompts, None), completion, masks)
    else:
        scored = terms(policy.model, policy.mask_id, prompts, completion, masks, BASELINES[side])
    scored.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    sides = (*BASELINES, "library")
    names = ("vocabulary", "hidden", "prompt", "length", "batch", "head", "logits", *sides)
    print(*(f"{name:>15}" for name in names), "  MiB")
    rows = []
    for case in CASES:
        if 6 * case.logits() > LIMIT:  # two passes, about three copies alive at the peak
            continue
        measured = {side: in_fresh_process(peak, case, side) for side in sides}
        rows.append(asdict(case) | {"logits": case.logits(), **measured})
        head = "frozen" if case.frozen else "trained"
        shown = (case.vocabulary, case.hidden, case.prompt, case.length, case.batch, head, f"{case.logits():.0f}")
        print(*(f"{value:>15}" for value in (*shown, *(f"{measured[side]:.0f}" for side in sides))), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"host": host(), "rows": rows}, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
