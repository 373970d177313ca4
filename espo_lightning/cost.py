"""python -m espo_lightning.cost: what a rollout and its updates cost per GPU, without weights and without a GPU.

FLOPs are those of `flops`, checked against measurement; bytes and seconds follow from the assumptions of `Hardware`.
docs/scaling.md has the formulas and what follows from them.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from espo_lightning.checkpoint import resolve
from espo_lightning.cli import run
from espo_lightning.flops import DREAM_7B, LLADA_8B, Network, Passes, Work, decoding_passes, flops, work
from espo_lightning.formats import make_config
from espo_lightning.likelihood import ELBO, Likelihood
from espo_lightning.masking import fold_in
from espo_lightning.policy import HEAD_BYTES
from espo_lightning.sampler import Decoding

BF16, FP32 = 2, 4  # bytes
SAMPLES = 4096  # completions whose masks are drawn, to average how many positions are hidden
LOGIT_COPIES = 4  # of a chunk of logits, in units of float32: themselves, bfloat16 twice, softmax, its gradient
KNOWN = {"GSAI-ML/LLaDA-8B-Instruct": LLADA_8B, "Dream-org/Dream-v0-Instruct-7B": DREAM_7B}


def read_network(policy: str) -> Network:
    """The shape of a checkpoint: of a hub id in `KNOWN`, a folder or ``bundled:NAME``. Nothing is downloaded.

    Raises:
        ValueError: anything else, or a config.json that is of none of the formats.
    """
    if policy in KNOWN:
        return KNOWN[policy]
    if not policy.startswith("bundled:") and not Path(policy).expanduser().is_dir():
        raise ValueError(
            f"policy must be a folder with a config.json, bundled:NAME or {' or '.join(KNOWN)}: {policy!r}"
        )
    config = make_config(json.loads((resolve(policy) / "config.json").read_text(encoding="utf-8")))
    return Network(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        qkv_bias=config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        tied=config.tie_word_embeddings,
    )


# ---- bytes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """Assumptions about the machine; the defaults are the data sheet of a node of 8 H100, nothing measured.

    Args:
        tflops: dense bfloat16 peak of a GPU, TFLOP/s.
        utilisation: the share of it that is reached (MFU).
        node: GPUs per node.
        nvlink: GB/s that a GPU receives from its node.
        network: GB/s that a GPU receives from other nodes, each through a port of its own.
    """

    tflops: float = 990
    utilisation: float = 0.4
    node: int = 8
    nvlink: float = 450
    network: float = 50

    def gather_speed(self, shards: int) -> float:
        """GB/s of all-gather and reduce-scatter; the ports of a node fetch one copy for all of its GPUs."""
        return self.nvlink if shards <= self.node else min(self.nvlink, self.network * self.node)

    def replica_speed(self, shards: int, gpus: int) -> float:
        """GB/s of the all-reduce between replicas of a shard; different shards of a node share its ports."""
        if gpus <= self.node:
            return self.nvlink
        return min(self.nvlink, self.network * self.node / min(shards, self.node))


def ring(size: float, ranks: int) -> float:
    """Bytes that every rank receives in an all-gather or reduce-scatter of ``size``; an all-reduce is one of each."""
    return size * (ranks - 1) / ranks


def gathers(w: Work, gather_rollouts: bool) -> dict[str, float]:
    """How often all weights are gathered in every phase, if they are sharded.

    In every forward and every backward pass, except that a rollout may keep what its first pass gathers.
    """
    passes = {"rollout": w.rollout, "old scores": w.old, "reference": w.reference, "updates": w.terms + w.updates * 2}
    return {phase: p.calls for phase, p in passes.items()} | ({"rollout": 1} if gather_rollouts else {})


def collectives(
    network: Network,
    w: Work,
    hardware: Hardware,
    *,
    gpus: int,
    shards: int,
    updates: int,
    rank: int,
    gather_rollouts: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a GPU receives in every phase, and the seconds that they take. Weights bfloat16, gradients float32.

    Gradients of replicas (DDP, ``shards`` = 1) and of adapters are reduced once per update, others after every
    backward pass.
    """
    weights = BF16 * (network.parameters + network.adapters(rank))
    gradients = FP32 * (network.adapters(rank) if rank else network.parameters)
    size = {phase: n * ring(weights, shards) for phase, n in gathers(w, gather_rollouts).items()}
    reductions = updates if shards == 1 or rank else w.updates.calls
    size["updates"] += reductions * ring(gradients, shards)
    replicas = reductions * 2 * ring(gradients / shards, gpus // shards)
    seconds = {phase: n / 1e9 / hardware.gather_speed(shards) for phase, n in size.items()}
    size["updates"] += replicas
    seconds["updates"] += replicas / 1e9 / hardware.replica_speed(shards, gpus)
    return size, seconds


def activation_bytes(network: Network, passes: Passes, rank: int = 0, checkpointing: bool = False) -> float:
    """What one call keeps for its backward pass, logits excluded, in bf16-mixed precision and without padding.

    Weights are float32, or bfloat16 below float32 adapters. Per token and layer, in bfloat16: the inputs of the seven
    linear layers; q, k, v; gate, silu(gate) and up; with adapters their hidden states and the attention's output once
    more. In float32: the input of both norms, without adapters their unscaled output too, and the softmax's logarithm.
    """
    h, f, q, kv = network.hidden_size, network.intermediate_size, *(n for _, n in network.attention[:2])
    norm = FP32 * ((1 if rank else 2) * h + 1)
    attention = norm + BF16 * (3 * h + 2 * q + 2 * kv) + FP32 * network.heads + (BF16 * (q + 4 * rank) if rank else 0)
    mlp = norm + BF16 * (2 * h + 4 * f + 3 * rank)
    tokens, positions = passes.rows * passes.width / passes.calls, passes.positions / passes.calls
    last, others = tokens * attention + positions * (mlp + norm), network.layers - 1
    if not checkpointing:
        return others * tokens * (attention + mlp) + last
    stream = (BF16 if rank else FP32) * h
    return others * tokens * stream + max(last, tokens * (attention + mlp))  # layers are recomputed one at a time


def memory(
    network: Network, w: Work, *, stored: int, shards: int, rank: int, checkpointing: bool, gather_rollouts: bool
) -> dict[str, float]:
    """Bytes of one GPU in the backward pass of a micro-batch; and in a rollout, which has other activations.

    stored: bytes of a stored weight; adapters are float32. Gradients and Adam's moments are like what they belong to.
    A rollout's activations are an estimate: per token the residual stream, norms and MLP of one layer.
    """
    n, adapters, layer = network.parameters, network.adapters(rank), network.layer_parameters
    trained = FP32 * adapters if rank else stored * n
    held = {
        "weights": (stored * n + FP32 * adapters) / shards,
        "gradients": trained if rank else trained / shards,  # those of adapters are whole until they are reduced
        "optimizer": 2 * trained / shards,
        "reference": stored * n / shards if w.reference.calls and not rank else 0,
    }
    logits = LOGIT_COPIES * min(HEAD_BYTES, FP32 * network.vocab_size * w.updates.positions / w.updates.calls)
    few = n - (network.layers - 2) * layer  # a layer, the next one, the embedding and the head
    tokens = w.rollout.rows * w.rollout.width / w.rollout.calls
    decoding = BF16 * tokens * (6 * network.intermediate_size + 4 * network.hidden_size)
    whole = BF16 * (n if gather_rollouts else few) if shards > 1 else 0
    backward = {
        "gathered weights": BF16 * few if shards > 1 else 0,
        "activations": activation_bytes(network, w.updates, rank, checkpointing),
        "logits": logits,
    }
    rollout = sum(held.values()) + whole + decoding + logits
    return held | backward | {"total": sum((held | backward).values()), "total in the rollout": rollout}


def expected_work(rollout: Passes, likelihood: Likelihood, completions: int, length: int, sets: int, **options) -> Work:
    """The mean of `work` over many draws of the masks, ``sets`` of them per rollout. options: see `work`."""
    repeats = math.ceil(SAMPLES / completions / sets)
    drawn = likelihood.draw(fold_in(0, torch.arange(repeats * sets * completions)), length)
    masks = [drawn.of(slice(i, i + completions)) for i in range(0, repeats * sets * completions, completions)]
    sampled = [work(rollout, masks[i : i + sets], **options) for i in range(0, len(masks), sets)]
    return Work(*(sum(phase, rollout * 0) * (1 / repeats) for phase in zip(*sampled)))


# ---- the table ------------------------------------------------------------------------------------------------------


def cost(
    policy: str = "GSAI-ML/LLaDA-8B-Instruct",
    decoding: Decoding = Decoding(length=256, block_length=32, steps=128),
    likelihood: Likelihood = ELBO(draws=2),
    prompt_length: int = 400,
    prompts_per_gpu: int = 2,
    group_size: int = 6,
    updates: int = 8,
    fresh_masks: bool = True,
    beta: float = 0.01,
    micro_batch: int = 1,
    view_by_view: bool = False,
    lora_rank: int | None = 128,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    gradient_checkpointing: bool = False,
    gpus: tuple[int, ...] = (8, 64, 512),
    shards: int | None = 1,
    gather_rollouts: bool = True,
    hardware: Hardware = Hardware(),
    output: str | None = None,
) -> dict:
    """FLOPs, bytes and memory of one rollout and its updates, per GPU. The defaults are the paper's Sudoku run.

    Args:
        policy: whose shape to take: a folder with a config.json, bundled:NAME, or the hub id of LLaDA-8B-Instruct or
            Dream-v0-Instruct-7B, which are known.
        decoding: see `Decoding`.
        likelihood: see `Likelihood`.
        prompt_length: tokens of the longest prompt (P).
        prompts_per_gpu: data.batch_size of the run divided by its processes.
        group_size: completions per prompt (G).
        updates: inner updates (mu).
        fresh_masks: new masks for every update.
        beta: 0 = no reference.
        micro_batch: completions per pass of scoring and training.
        view_by_view: one mask view per backward pass.
        lora_rank: null = all weights are trained.
        dtype: of the stored weights; with bf16-mixed precision, products are bfloat16 in both cases.
        gradient_checkpointing: recompute layers in the backward pass.
        gpus: one column for each number of GPUs.
        shards: GPUs that share one copy of the weights: 1 = DDP, null = all (FSDP), 8 of 64 = hybrid.
        gather_rollouts: keep sharded weights together for a whole rollout, as in `ESPOModule`.
        hardware: assumed speeds.
        output: a JSON file to write.

    Returns:
        "network", "parameters", "gpus" and "table": group -> row -> one value per column.
    """
    counts = {"prompt_length": prompt_length, "prompts_per_gpu": prompts_per_gpu, "group_size": group_size}
    counts |= {"updates": updates, "micro_batch": micro_batch, "lora_rank": lora_rank, "gpus": min(gpus, default=0)}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if shards is not None and (shards < 1 or any(n % shards for n in gpus)):
        raise ValueError(f"every number of gpus must be a multiple of shards, got gpus={gpus} and shards={shards}")
    if output is not None and Path(output).exists():
        raise ValueError(f"output {output} exists already: name another file, or remove it")
    network, rank, completions = read_network(policy), lora_rank or 0, prompts_per_gpu * group_size
    rollout = decoding_passes(decoding, completions, prompt_length + decoding.length)

    options = {"updates": updates, "reference": beta != 0, "micro_batch": micro_batch, "view_by_view": view_by_view}
    w = expected_work(
        rollout,
        likelihood,
        completions,
        decoding.length,
        updates if fresh_masks and likelihood.random else 1,
        **options,
    )
    draws = getattr(likelihood, "draws", 1)
    spent = flops(network, w, rank, gradient_checkpointing)
    paper = 2 * network.parameters * rollout.width * completions
    columns = []
    for n in gpus:
        shared = {"shards": shards or n, "rank": rank, "gather_rollouts": gather_rollouts}
        size, seconds = collectives(network, w, hardware, gpus=n, updates=updates, **shared)
        stored = BF16 if dtype == "bfloat16" else FP32
        held = memory(network, w, stored=stored, checkpointing=gradient_checkpointing, **shared)
        speed = hardware.tflops * 1e12 * hardware.utilisation
        times = {"computing": {phase: n / speed for phase, n in spent.items()}, "collectives": seconds}
        columns.append(
            {
                "completions per rollout": {"": n * completions},
                "PFLOP per GPU": with_total(spent, 1e15)
                | {
                    "paper, 2ND(T + 6 mu M)": paper * (decoding.steps + 6 * updates * draws) / 1e15,
                    "2ND(T + 10 mu M)": paper * (decoding.steps + 10 * updates * draws) / 1e15,
                },
                "GB received per GPU": with_total(size, 1e9),
                "seconds": {
                    f"{what}, {phase}": n for what, by in times.items() for phase, n in merge_scores(by).items()
                },
                "FLOP per byte": {
                    "of weights, in the rollout": spent["rollout"] / (BF16 * network.parameters * w.rollout.calls),
                    "received, in the rollout": spent["rollout"] / size["rollout"] if size["rollout"] else None,
                    "received, in the updates": spent["updates"] / size["updates"] if size["updates"] else None,
                },
                "GB of memory per GPU": {part: n / 1e9 for part, n in held.items()},
            }
        )
    table = {group: {row: [c[group][row] for c in columns] for row in rows} for group, rows in columns[0].items()}
    result = {"network": asdict(network), "parameters": network.parameters, "gpus": list(gpus), "table": table}
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def merge_scores(phases: dict[str, float]) -> dict[str, float]:
    """Old and reference scores as one phase, as ``time/score`` of a run."""
    scores = phases["old scores"] + phases["reference"]
    return {"rollout": phases["rollout"], "scores": scores, "updates": phases["updates"]}


def with_total(values: dict[str, float], unit: float) -> dict[str, float]:
    """All values in a unit, and their sum."""
    return {key: value / unit for key, value in (values | {"total": sum(values.values())}).items()}


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
