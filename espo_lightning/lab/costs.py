"""Bytes, memory and seconds of a rollout and its updates per GPU, from the passes of `flops`. Pure.

FLOPs are those of `flops`, checked against measurement; bytes and seconds follow from the assumptions of `Hardware`.
docs/cost_model.md has the formulas, docs/scaling.md what follows from them.
"""

import math
from dataclasses import dataclass

import torch

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops import Passes, Work, plain_trace, work
from espo_lightning.lab.flops_blocks import cache_bytes
from espo_lightning.lab.network import Network
from espo_lightning.policies.prefix import HEAD_BYTES
from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.scoring.likelihood import Likelihood, Seen

BF16, FP32 = 2, 4  # bytes
SAMPLES = 4096  # completions whose masks are drawn, to average how many positions are hidden


LOGIT_COPIES = 4  # of a chunk of logits, in units of float32: themselves, bfloat16 twice, softmax, its gradient


@dataclass(frozen=True)
class Hardware:
    """Assumptions about the machine; the defaults are the data sheet of a node of 8 H100, nothing measured.

    Args:
        tflops: dense bfloat16 peak of a GPU, TFLOP/s.
        utilisation: the share of it that is reached (MFU).
        node: GPUs per node.
        nvlink: GB/s that a GPU receives from its node.
        network: GB/s that a GPU receives from other nodes, each through a port of its own.
        memory: GB/s that a GPU reads from its own memory.

    Raises:
        ValueError: a number out of range.
    """

    tflops: float = 990
    utilisation: float = 0.4
    node: int = 8
    nvlink: float = 450
    network: float = 50
    memory: float = 3350

    def __post_init__(self):
        speeds = {"nvlink": self.nvlink, "network": self.network, "memory": self.memory}
        check_numbers("(0, inf)", tflops=self.tflops, **speeds)
        check_numbers("(0, 1]", utilisation=self.utilisation)
        check_counts(1, node=self.node)

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


def gathered(network: Network, w: Work, rank: int, gather_rollouts: bool) -> dict[str, float]:
    """Bytes of the weights that are gathered in every phase by FSDP2, if they are sharded; in bfloat16.

    Layers in every forward and every backward pass, except that a rollout may keep what its first pass gathers.
    Embedding, last norm and head are one unit, which stays together until the next backward pass is over, so that it
    is gathered once per rollout and once per backward pass but the first; that of a frozen copy, in every pass.
    """
    layers = BF16 * (network.layers * network.layer_parameters + network.adapters(rank))
    rest = BF16 * (network.parameters - network.layers * network.layer_parameters)
    passes = {"rollout": w.rollout, "old scores": w.old, "reference": w.reference, "updates": w.terms + w.updates * 2}
    calls = {phase: p.calls for phase, p in passes.items()} | ({"rollout": 1} if gather_rollouts else {})
    apart = {"rollout": 1, "reference": 0 if rank else w.reference.calls, "updates": w.updates.calls - 1}
    return {phase: n * layers + apart.get(phase, 0) * rest for phase, n in calls.items()}


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
    zero: int = 3,
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a GPU receives in every phase, and the seconds that they take. Weights bfloat16, gradients float32.

    Gradients of replicas (DDP, ``shards`` = 1), of adapters and of ZeRO 1 are reduced once per update, others after
    every backward pass. zero: what ``shards`` GPUs share: 1 moments, 2 gradients too, 3 weights too; see `memory`.
    Below 3, updated weights are gathered once per update, in float32 as they are stored.
    """
    trained = network.adapters(rank) if rank else network.parameters
    gradients = FP32 * trained
    size = {phase: ring(n, shards) for phase, n in gathered(network, w, rank, gather_rollouts).items()}
    if zero < 3:
        size = dict.fromkeys(size, 0.0) | {"updates": updates * ring(gradients, shards)}
    once = shards == 1 or zero == 1 or (rank and zero == 3)
    reductions = updates if once else w.updates.calls
    size["updates"] += reductions * ring(gradients, shards)
    replicas = reductions * 2 * ring(gradients / shards, gpus // shards)
    seconds = {phase: n / 1e9 / hardware.gather_speed(shards) for phase, n in size.items()}
    size["updates"] += replicas
    seconds["updates"] += replicas / 1e9 / hardware.replica_speed(shards, gpus)
    return size, seconds


def read_bytes(network: Network, passes: Passes) -> float:
    """What passes read from a GPU's own memory at the least, in bfloat16: all weights in each, and keys and values."""
    return BF16 * network.parameters * passes.calls + cache_bytes(network, passes.known, BF16)


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
    network: Network,
    w: Work,
    *,
    stored: int,
    shards: int,
    rank: int,
    checkpointing: bool,
    gather_rollouts: bool,
    cached: float = 0,
    largest: float | None = None,
    zero: int = 3,
) -> dict[str, float]:
    """Bytes of one GPU in the backward pass of a micro-batch; and in a rollout, which has other activations.

    stored: bytes of a stored weight; adapters are float32. Gradients and Adam's moments are like what they belong to.
    A rollout's activations are an estimate: per token the residual stream, norms and MLP of one layer. cached: tokens
    whose keys and values a rollout has room for. largest: tokens of its largest pass; None = of the mean one.
    zero: as in `collectives`; below 3, the engine also has a float32 copy of its part of the trained weights.
    """
    n, adapters, layer = network.parameters, network.adapters(rank), network.layer_parameters
    trained, parted = FP32 * adapters if rank else stored * n, shards > 1 and zero == 3
    of_weights, of_gradients = shards if parted else 1, shards if zero > 1 else 1
    if rank and parted:
        of_gradients = 1  # those of adapters are whole until they are reduced
    copies = FP32 * (adapters if rank else n) / shards if shards > 1 and zero < 3 else 0
    held = {
        "weights": (stored * n + FP32 * adapters) / of_weights,
        "gradients": trained / of_gradients,
        "optimizer": 2 * trained / shards + copies,
        "reference": stored * n / of_weights if w.reference.calls and not rank else 0,
    }
    logits = LOGIT_COPIES * min(HEAD_BYTES, FP32 * network.vocab_size * w.updates.positions / w.updates.calls)
    few = n - (network.layers - 2) * layer  # a layer, the next one, the embedding and the head
    tokens = w.rollout.rows * w.rollout.width / w.rollout.calls if largest is None else largest
    decoding = BF16 * tokens * (6 * network.intermediate_size + 4 * network.hidden_size)
    whole = BF16 * (n if gather_rollouts else few) if parted else 0
    backward = {
        "gathered weights": BF16 * few if parted else 0,
        "activations": activation_bytes(network, w.updates, rank, checkpointing),
        "logits": logits,
    }
    keys = {"cache in the rollout": cache_bytes(network, cached, stored)} if cached else {}
    rollout = sum(held.values()) + whole + decoding + logits + sum(keys.values())
    return held | backward | {"total": sum((held | backward).values())} | keys | {"total in the rollout": rollout}


def expected_work(
    rollout: Passes, likelihood: Likelihood, completions: int, decoding: Decoder, sets: int, **options
) -> Work:
    """The mean of `work` over many draws of the masks, ``sets`` of them per rollout. options: see `work`."""
    repeats = math.ceil(SAMPLES / completions / sets) if likelihood.random else 1
    keys = fold_in(0, torch.arange(repeats * sets * completions))
    trace = plain_trace(decoding, len(keys)) if likelihood.traced else None
    drawn = likelihood.masks(keys, Seen.whole(keys, decoding.length)._replace(trace=trace))
    masks = [drawn.of(slice(i, i + completions)) for i in range(0, repeats * sets * completions, completions)]
    sampled = [work(rollout, masks[i : i + sets], **options) for i in range(0, len(masks), sets)]
    return Work(*(sum(phase, rollout * 0) * (1 / repeats) for phase in zip(*sampled)))


def merge_scores(phases: dict[str, float]) -> dict[str, float]:
    """Old and reference scores as one phase, as ``time/score`` of a run."""
    scores = phases["old scores"] + phases["reference"]
    return {"rollout": phases["rollout"], "scores": scores, "updates": phases["updates"]}


def with_total(values: dict[str, float], unit: float) -> dict[str, float]:
    """All values in a unit, and their sum."""
    return {key: value / unit for key, value in (values | {"total": sum(values.values())}).items()}
