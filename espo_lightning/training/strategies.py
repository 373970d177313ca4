"""Sharding for Lightning's strategies: FSDP1 and FSDP2 around a `Policy`, and what differs between them.

Lightning is the engine; a module calls `shard` in ``configure_model`` and everything else follows. The `Policy` is
the root of the sharding, because its forward pass is the only way into the network. Its transformer layers are the
units; embedding, last norm and head belong to the root, whose weights stay together for a whole forward pass. So the
head may run in as many chunks as a process has tokens: no collective happens inside. `DeepSpeed` leaves all weights
whole.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from espo_lightning.training.zero import ZERO, DeepSpeed

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP(FSDPStrategy):
    """Lightning's FSDP (torch's FSDP1), which also runs on CPUs: ``--trainer.strategy=fsdp``.

    Its arguments are Lightning's. Full checkpoints are offloaded to the CPU only where they are not there already,
    which torch answers with a segmentation fault.
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        return get_model_state_dict(self.model, options=_whole(self.root_device))

    def optimizer_state(self, optimizer) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().optimizer_state(optimizer)
        plain = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        state = get_optimizer_state_dict(self.model, plain, options=_whole(self.root_device))
        return {} if self.global_rank else state


class FSDP2(ModelParallelStrategy):
    """FSDP2 over all processes: ``--trainer.strategy=fsdp2``.

    Lightning's `ModelParallelStrategy` with one data-parallel group of everything; its own defaults would be tensor
    parallelism, which needs a plan for every architecture.

    Args:
        save_distributed_checkpoint: every process writes its part, into a folder; false gathers one file.
        process_group_backend, timeout: as in every strategy of Lightning.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **arguments: Any):
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **arguments)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


NAMES = {  # what --trainer.strategy means here; other names are Lightning's
    "fsdp": FSDP,
    "fsdp2": FSDP2,
    "deepspeed": DeepSpeed,
    "deepspeed_stage_1": partial(DeepSpeed, stage=1),
    "deepspeed_stage_2": partial(DeepSpeed, stage=2),
}


def named(strategy: str | Strategy) -> str | Strategy:
    """The strategy that a command line means by ``fsdp``, ``fsdp2`` and ``deepspeed``; everything else as it is.

    Raises:
        ValueError: a stage of ZeRO that is not possible, or the package is not installed.
    """
    name = strategy.lower() if isinstance(strategy, str) else None  # as Lightning reads its own
    if name is not None and name.startswith("deepspeed") and name not in NAMES:
        raise ValueError(f"trainer.strategy={strategy}: {ZERO}")
    return NAMES[name]() if name in NAMES else strategy


def check(strategy: Strategy, policy: nn.Module) -> None:
    """Refuse, before any work, what cannot train this policy as one process would.

    Raises:
        ValueError: a precision, tensor parallelism, FSDP1 with weights of two types, compiled layers, or adapters on
            one process, DeepSpeed with other settings than `DeepSpeed` has, or to train weights other than float32.
    """
    precision = getattr(strategy.precision_plugin, "precision", "32-true")
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision must be 32-true or bf16-mixed, got {precision}: gradients are not scaled, and the type "
            "of the weights themselves is --model.policy.dtype"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        if not isinstance(strategy, DeepSpeed):
            raise ValueError("trainer.strategy=DeepSpeedStrategy has an engine of its own settings: use deepspeed")
        types = {p.dtype for p in policy.parameters() if p.requires_grad}
        if types != {torch.float32}:
            raise ValueError(
                f"trainer.strategy=deepspeed trains weights of float32, got {sorted(map(str, types))}: set "
                "--model.policy.dtype=float32, train adapters, or use fsdp2"
            )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise ValueError(
            "trainer.strategy=ModelParallelStrategy would split matrices (tensor parallelism), for which there is no "
            "plan here: use fsdp2, its data-parallel half"
        )

    if isinstance(strategy, FSDPStrategy):
        types = {p.dtype for p in policy.parameters()}
        if len(types) > 1:
            raise ValueError(
                f"trainer.strategy=fsdp needs weights of one type, got {sorted(map(str, types))}: use fsdp2, or "
                "--model.policy.dtype=float32 under adapters"
            )
        if getattr(policy.network, "_compiled_call_impl", None):
            raise ValueError("trainer.strategy=fsdp cannot shard compiled layers: use fsdp2, or model.compile=null")
        if strategy.world_size == 1 and policy.has_adapters:  # it loses sight of a frozen embedding, and cannot save
            raise ValueError("trainer.strategy=fsdp cannot train adapters on one process: use fsdp2, or auto")


def check_resume(strategy: Strategy, checkpoint: Path) -> None:
    """Refuse, before any work, a checkpoint in shards that this strategy cannot read; a single file suits them all.

    Raises:
        ValueError: another strategy wrote it, or it is a folder of something else.
    """
    if checkpoint.is_dir():
        name = "fsdp2" if weights_in(checkpoint)[0] == "state_dict" else "fsdp"
        if not isinstance(strategy, NAMES[name]):
            raise ValueError(
                f"ckpt_path {checkpoint} is a folder of shards that only {name} reads, on any number of processes: set "
                f"trainer.strategy={name}"
            )


def weights_in(checkpoint: Path) -> tuple[str, set[str]]:
    """The weights in a checkpoint folder: the part of it, "state_dict" of FSDP2 or "model" of FSDP, and their names.

    Raises:
        ValueError: there are no shards in it.
    """
    if not (checkpoint / ".metadata").exists():
        raise ValueError(f"{checkpoint} is a folder without shards: expected a checkpoint, a file or a folder")
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    part = "state_dict" if any(name.startswith("state_dict.") for name in names) else "model"
    return part, {name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")}


def shard(policy: nn.Module, strategy: Strategy, *, gather_rollouts: bool = False) -> nn.Module:
    """The policy, sharded as the strategy wants it; the policy itself under any other strategy, or if it is already.

    Under bf16-mixed the weights are gathered, and computed with, in bfloat16; gradients are reduced in float32, and
    inputs keep their type: a sampler's uniforms, and the rotary frequencies, would not survive 8 bits of mantissa.

    Args:
        policy: a `Policy`, still whole, the same on every process.
        gather_rollouts: FSDP1 keeps the gathered weights from a forward pass to the next backward pass (ZeRO-2).
    """
    if isinstance(policy, (FullyShardedDataParallel, FSDPModule)):
        return policy
    layers = {type(layer) for layer in policy.layers}
    mixed = torch.bfloat16 if getattr(strategy.precision_plugin, "precision", None) == "bf16-mixed" else None
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        policy.sharded = True
    if isinstance(strategy, FSDPStrategy):
        precision = MixedPrecision(mixed, torch.float32, cast_root_forward_inputs=False) if mixed else None
        settings = {"auto_wrap_policy": ModuleWrapPolicy(layers), **strategy.kwargs}
        return FullyShardedDataParallel(
            policy,
            device_id=strategy.root_device,
            sharding_strategy=ShardingStrategy.SHARD_GRAD_OP if gather_rollouts else strategy.sharding_strategy,
            mixed_precision=strategy.mixed_precision or precision,
            cpu_offload=strategy.cpu_offload,
            **settings,
        )
    if isinstance(strategy, ModelParallelStrategy):
        precision = MixedPrecisionPolicy(mixed, torch.float32 if mixed else None, cast_forward_inputs=False)
        settings = {"mesh": strategy.device_mesh["data_parallel"], "mp_policy": precision}
        for layer in policy.layers:
            fully_shard(layer, **settings)
        trained = any(p.requires_grad for p in policy.parameters())  # the root then waits for its backward pass
        return fully_shard(policy, reshard_after_forward=not trained, **settings)
    return policy


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Under FSDP2, layers stay whole after their first forward pass in here. FSDP1 decides that in `shard`."""
    layers = policy.layers if isinstance(policy, FSDPModule) else ()
    for layer in layers:
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


@contextmanager
def unreduced(policy: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Backward passes in here only add to this process's gradients; the one after it reduces them over processes.

    DDP, ZeRO-1, and FSDP2 with adapters. Otherwise shards are reduced in every pass, as the gradients of all weights
    would have to be kept whole.
    """
    adapters = isinstance(policy, FSDPModule) and policy.has_adapters
    if adapters:
        policy.set_requires_gradient_sync(False)
    with getattr(strategy, "block_backward_sync", nullcontext)():
        yield
    if adapters:
        policy.set_requires_gradient_sync(True)


def clip_grad_norm(policy: nn.Module, strategy: Strategy, max_norm: float) -> Tensor:
    """Clip the norm of the gradient over all parameters of all processes; returns the norm before clipping."""
    if isinstance(strategy, DeepSpeed):
        return strategy.clip_grad_norm(max_norm)
    if isinstance(policy, FullyShardedDataParallel):
        return policy.clip_grad_norm_(max_norm)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # torch 2.9 leaves every process its part of it


def full_state_dict(policy: nn.Module) -> dict[str, Tensor]:
    """The complete weights under their plain names. Every process takes part; only the first need receive them."""
    if isinstance(policy, (FullyShardedDataParallel, FSDPModule)):
        return get_model_state_dict(policy, options=_whole(policy.device))
    return policy.state_dict()


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Give a policy the weights of another that is sharded alike, every process its own part."""
    with _in_parts(target), _in_parts(source):
        target.load_state_dict(source.state_dict())


def gather(value: Any) -> list[Any]:
    """The picklable value of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lost_ranks(trainer: Trainer, patience: float = 1.0) -> list[str]:
    """A sentence for each process that Lightning started from this one and that has ended, with its exit code."""
    lines = []
    for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), 1):
        try:
            code = process.wait(patience)  # its connections close a moment before it is gone
        except subprocess.TimeoutExpired:
            continue
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines.append(f"Local rank {rank} {how}.")
    return lines


def _in_parts(policy: nn.Module):
    """State dictionaries hold this process's part: always under FSDP2, in here under FSDP1."""
    if isinstance(policy, FullyShardedDataParallel):
        return FullyShardedDataParallel.state_dict_type(policy, StateDictType.SHARDED_STATE_DICT)
    return nullcontext()


def _whole(device: torch.device) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=device.type != "cpu")
