"""python -m espo_lightning.cost: what a rollout and its updates cost per GPU, without weights and without a GPU.

FLOPs are those of `flops`, checked against measurement; bytes and seconds follow from the assumptions of `Hardware`.
docs/cost_model.md has the formulas, docs/scaling.md what follows from them.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.decoding.masked import Decoding
from espo_lightning.lab.costs import (
    BF16,
    FP32,
    Hardware,
    collectives,
    expected_work,
    memory,
    merge_scores,
    read_bytes,
    with_total,
)
from espo_lightning.lab.flops import Passes, Work, decoding_passes, flops, scoring_passes
from espo_lightning.lab.flops_blocks import block_decoding_passes, block_scoring_passes
from espo_lightning.lab.network import Network, read_network
from espo_lightning.objectives.objective import Objective
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.ranges import check_counts
from espo_lightning.scoring.block import BlockELBO
from espo_lightning.scoring.likelihood import ELBO, Likelihood
from espo_lightning.training.command_line import run


def cost(
    policy: str = "GSAI-ML/LLaDA-8B-Instruct",
    decoding: Decoding = Decoding(length=256, block_length=32, steps=128),
    likelihood: Likelihood = ELBO(draws=2),
    prompt_length: int = 400,
    prompts_per_gpu: int = 2,
    group_size: int = 6,
    updates: int = 8,
    fresh_masks: bool = True,
    objective: Objective = PolicyGradient(),
    micro_batch: int = 1,
    view_by_view: bool = False,
    lora_rank: int | None = 128,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    gradient_checkpointing: bool = False,
    gpus: tuple[int, ...] = (8, 64, 512),
    shards: int | None = 1,
    zero: Literal[1, 2, 3] = 3,
    gather_rollouts: bool = True,
    hardware: Hardware = Hardware(),
    output: str | None = None,
) -> dict:
    """FLOPs, bytes and memory of one rollout and its updates, per GPU. The defaults are the paper's Sudoku run.

    Args:
        policy: whose shape to take: a folder with a config.json, bundled:NAME, or the hub id of LLaDA-8B-Instruct,
            Dream-v0-Instruct-7B or SDAR-8B-Chat, which are known.
        decoding: see `Decoding`.
        likelihood: see `Likelihood`.
        prompt_length: tokens of the longest prompt (P).
        prompts_per_gpu: data.batch_size of the run divided by its processes.
        group_size: completions per prompt (G).
        updates: inner updates (mu).
        fresh_masks: new masks for every update.
        objective: what is maximised; it says whether old and reference scores are needed.
        micro_batch: completions per pass of scoring and training.
        view_by_view: one mask view per backward pass.
        lora_rank: null = all weights are trained.
        dtype: of the stored weights; with bf16-mixed precision, products are bfloat16 in both cases.
        gradient_checkpointing: recompute layers in the backward pass.
        gpus: one column for each number of GPUs.
        shards: GPUs that share one copy of the weights: 1 = DDP, null = all (FSDP), 8 of 64 = hybrid.
        zero: what shards share: 1 = moments, 2 = gradients too (DeepSpeed's stages), 3 = weights too (FSDP).
        gather_rollouts: keep sharded weights together for a whole rollout, as in `ESPOModule`.
        hardware: assumed speeds.
        output: a JSON file to write.

    Returns:
        "network", "parameters", "gpus" and "table": group -> row -> one value per column.
    """
    counts = {"prompt_length": prompt_length, "prompts_per_gpu": prompts_per_gpu, "group_size": group_size}
    counts |= {"updates": updates, "micro_batch": micro_batch, "lora_rank": lora_rank, "shards": shards}
    _check(counts, gpus, shards, zero, output)
    network, rank, completions = read_network(policy), lora_rank or 0, prompts_per_gpu * group_size
    resumes = all((shards or n) == 1 for n in gpus) and not gradient_checkpointing
    shift = network.shift
    rollout, scoring, cached, largest = passes_of(decoding, likelihood, completions, prompt_length, resumes, shift)
    options = {"updates": updates, "objective": objective, "micro_batch": micro_batch, "view_by_view": view_by_view}
    options["scoring"] = scoring
    sets = updates if fresh_masks and likelihood.random else 1
    w = expected_work(rollout, likelihood, completions, decoding, sets, **options)
    spent = flops(network, w, rank, gradient_checkpointing)
    nd = 2 * network.parameters * rollout.width * completions / 1e15  # of the papers' formulas
    draws = getattr(likelihood, "draws", 1) or decoding.passes
    formulas = {
        "paper, 2ND(T + 6 mu M)": nd * (decoding.steps + 6 * updates * draws),
        "2ND(T + 10 mu M)": nd * (decoding.steps + 10 * updates * draws),
    }
    columns = []
    for n in gpus:
        shared = {"shards": shards or n, "rank": rank, "gather_rollouts": gather_rollouts, "zero": zero}
        size, seconds = collectives(network, w, hardware, gpus=n, updates=updates, **shared)
        stored = BF16 if dtype == "bfloat16" else FP32
        rooms = {"cached": cached, "largest": largest}
        held = memory(network, w, stored=stored, checkpointing=gradient_checkpointing, **rooms, **shared)
        whole = column(network, w, spent, size, seconds, hardware)
        sent = BF16 * (network.adapters(rank) if rank else network.parameters)
        whole["seconds"]["sending weights to an engine"] = sent / 1e9 / hardware.network
        whole["PFLOP per GPU"] |= formulas
        memories = {"GB of memory per GPU": {part: b / 1e9 for part, b in held.items()}}
        columns.append({"completions per rollout": {"": n * completions}} | whole | memories)
    table = {group: {row: [c[group][row] for c in columns] for row in rows} for group, rows in columns[0].items()}
    result = {"network": asdict(network), "parameters": network.parameters, "gpus": list(gpus), "table": table}
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _check(
    counts: dict[str, int | None], gpus: tuple[int, ...], shards: int | None, zero: int, output: str | None
) -> None:
    """Refuse numbers below 1, shards that do not divide the GPUs, zero without them, and a file that exists."""
    for count in (counts, *({"gpus": n} for n in gpus or [0])):
        check_counts(1, **count)
    if shards is not None and any(n % shards for n in gpus):
        raise ValueError(f"every number of gpus must be a multiple of shards, got gpus={gpus} and shards={shards}")
    if zero < 3 and shards == 1:
        raise ValueError(f"zero={zero} has no effect with shards=1, where nothing is shared: set shards, or drop zero")
    if output is not None and Path(output).exists():
        raise ValueError(f"output {output} exists already: name another file, or remove it")


class Rollout(NamedTuple):
    """The passes of a rollout and those of scoring, given masks; and what a rollout needs room for, in tokens.

    cached: whose keys and values it keeps. largest: of its largest pass.
    """

    passes: Passes
    scoring: Callable[..., Passes]
    cached: int
    largest: int


def passes_of(
    decoding: Decoding, likelihood: Likelihood, completions: int, prompt_length: int, resumes: bool, shift: int = 0
) -> Rollout:
    """What a rollout and its scores run. resumes: see `Policy.resumes`. shift: of the policy.

    Raises:
        ValueError: blocks in one of the two only.
    """
    blocks, width = isinstance(decoding, BlockDecoding), prompt_length + decoding.length
    elbo, everything = isinstance(likelihood, BlockELBO), completions * width
    if (blocks and not likelihood.in_blocks) or (elbo and not (blocks and likelihood.block == decoding.block_length)):
        raise ValueError("decoding=BlockDecoding and likelihood=BlockELBO go together, with the same block")
    if not blocks:
        cached = everything if decoding.prefix_cache else 0
        return Rollout(decoding_passes(decoding, completions, width, shift), scoring_passes, cached, everything)
    own = partial(block_scoring_passes, block=decoding.block_length, resumes=resumes)
    passes, scoring = block_decoding_passes(decoding, completions, width), own if elbo else scoring_passes
    if not decoding.cache:
        return Rollout(passes, scoring, 0, everything)
    return Rollout(passes, scoring, everything, completions * max(prompt_length, decoding.block_length))


def column(
    network: Network,
    w: Work,
    spent: dict[str, float],
    size: dict[str, float],
    seconds: dict[str, float],
    hardware: Hardware,
) -> dict[str, dict[str, float | None]]:
    """FLOPs, bytes and seconds of one number of GPUs: group -> row -> value.

    Args:
        spent: FLOPs of every phase. size, seconds: what a GPU receives in every phase, and how long that takes.
    """
    speed = hardware.tflops * 1e12 * hardware.utilisation
    times = {"computing": {phase: n / speed for phase, n in spent.items()}, "collectives": seconds}
    reading = read_bytes(network, w.rollout) / 1e9 / hardware.memory
    return {
        "PFLOP per GPU": with_total(spent, 1e15),
        "GB received per GPU": with_total(size, 1e9),
        "seconds": {f"{what}, {phase}": n for what, by in times.items() for phase, n in merge_scores(by).items()}
        | {"reading, rollout": reading},
        "FLOP per byte": {
            "of weights, in the rollout": spent["rollout"] / (BF16 * network.parameters * w.rollout.calls),
            "received, in the rollout": spent["rollout"] / size["rollout"] if size["rollout"] else None,
            "received, in the updates": spent["updates"] / size["updates"] if size["updates"] else None,
        },
    }


def lines(result: dict) -> list[str]:
    """The table as text; one number where all columns agree."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"

    def line(label: str, values: list) -> str:
        shown = values if len(set(values)) > 1 else values[:1]
        return f"{label:32}" + "".join(f"{cell(v):>10}" for v in shown)

    text = [f"{result['parameters'] / 1e9:.3g} B parameters", "", line("GPUs", result["gpus"])]
    for group, rows in result["table"].items():
        text += [line(group, rows[""])] if "" in rows else ["", group, *(line(f"  {k}", v) for k, v in rows.items())]
    return text


def main(argv: list[str] | None = None) -> None:
    sys.stdout.write("\n".join(lines(run(cost, "espo_lightning.cost", argv))) + "\n")


if __name__ == "__main__":
    main()
