"""Peak memory of `Trajectory` against the number of denoising steps: ``python benchmarks/trajectory.py``.

One update of relative trajectory balance on 4 completions of 64 tokens: reference scores, the policy's own, losses,
gradients. All steps of all completions in one pass; 2 completions at a time; one step of all at a time (view by view);
both. Each figure comes from a fresh process. Prints a table, writes JSON.
"""

import argparse
import json
from pathlib import Path

import torch
from measure import in_fresh_process, random_policy, resident_peak

from espo_lightning import Balance, Decoding, Policy, Prompts, Scores, Seen, Trajectory, random_order
from espo_lightning.lab.flops import plain_trace
from espo_lightning.training.gradient import loss_parts
from espo_lightning.training.rollout import chunks

GROUP, LENGTH, PROMPT = 4, 64, 16
STEPS = (8, 16, 32, 64)
WAYS = {"one pass": (None, False), "2 completions": (2, False), "view by view": (None, True), "both": (2, True)}


def update(policy: Policy, steps: int, micro_batch: int | None, view_by_view: bool) -> None:
    """What `ESPOModule` does with a rollout; groups of 2, so that they fit a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(torch.randint(8, 64, (GROUP, PROMPT), generator=generator), None)
    completion = torch.randint(8, 64, (GROUP, LENGTH), generator=generator)
    keys, law, objective = torch.arange(GROUP), Trajectory(), Balance(0.1)
    trace = plain_trace(Decoding(LENGTH, LENGTH, steps, order=random_order), GROUP)
    masks = law.masks(keys, Seen.whole(keys, LENGTH)._replace(trace=trace, passes=steps))
    for rows in chunks(GROUP, micro_batch):
        batch, own = (prompts.of(rows), completion[rows]), masks.of(rows)
        with torch.no_grad():
            ref = law.log_probs(policy, *batch, own)
        lengths, advantages = torch.full((len(batch[1]),), LENGTH), torch.linspace(-1, 1, len(batch[1]))

        def weigh(new: torch.Tensor, ref=ref, own=own, lengths=lengths, advantages=advantages):
            losses, statistics = objective(Scores(new, None, ref, own.weight, lengths), advantages, 2)
            return losses.mean(), statistics

        _, parts = loss_parts(lambda drawn, batch=batch: law.log_probs(policy, *batch, drawn), own, weigh, view_by_view)
        for part, _ in parts:
            part.backward()


def peak(steps: int, micro_batch: int | None, view_by_view: bool) -> float:
    """MiB that resident memory rises in an update."""
    policy = random_policy(64, 2, 4, 192)
    update(policy, 2, 2, True)  # loads code; allocates the gradients, which stay
    return resident_peak(lambda: update(policy, steps, micro_batch, view_by_view))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trajectory.json")
    arguments = parser.parse_args()
    print(f"{'steps':>6}" + "".join(f"{name:>16}" for name in WAYS) + "   MiB")
    rows = []
    for steps in STEPS:
        found = {name: in_fresh_process(peak, steps, *way) for name, way in WAYS.items()}
        numbers = 4 * GROUP * LENGTH * steps / 2**20  # MiB of one float32 [M, B, L]
        rows.append({"steps": steps, "MiB": found, "one_float32_tensor_M_B_L_MiB": numbers})
        print(f"{steps:6}" + "".join(f"{value:16.1f}" for value in found.values()), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
