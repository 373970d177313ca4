"""ZeRO 1 and 2 by DeepSpeed's engine, with the accumulation, the checkpoints and the precision of the other strategies.

The package is optional; nothing of it is imported before there is a `DeepSpeed`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor

from espo_lightning.ranges import check_counts

DEEPSPEED = "pip install 'setuptools>=77' && pip install --no-build-isolation deepspeed==0.19.8"
ZERO = (
    "only ZeRO 1 and 2 are possible with deepspeed, without offloading: instead of ZeRO-3 use fsdp2, with offloading "
    "FSDP with cpu_offload: true (docs/deepspeed.md)"
)


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO 1 or 2 by DeepSpeed's engine: ``--trainer.strategy=deepspeed``.

    Every process has all weights, and its part of their moments (1) and gradients (2). An update is one step of the
    engine, after as many passes as there are. Checkpoints are the one file of ddp, not the engine's folders.

    Args:
        stage: 1 sums gradients over processes once per update, 2 in every backward pass, so as to keep only a part.
        overlap_comm: during the backward pass, on a stream of its own.
        bucket_size: weights whose gradients are summed, or which are gathered, at once.
        process_group_backend: as in every strategy of Lightning.

    Raises:
        ValueError: another stage, no bucket, or the package is not installed.
    """

    restore_checkpoint_after_setup = False  # the engine copies the weights that it finds
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict

    def __init__(
        self,
        stage: int = 2,
        overlap_comm: bool = True,
        bucket_size: int = 200_000_000,
        process_group_backend: str | None = None,
    ):
        if stage not in (1, 2):
            raise ValueError(f"stage {stage}: {ZERO}")
        check_counts(1, bucket_size=bucket_size)
        if find_spec("deepspeed") is None:
            raise ValueError(f"trainer.strategy=deepspeed needs a package that is not installed: {DEEPSPEED}")
        buckets = {"reduce_bucket_size": bucket_size, "allgather_bucket_size": bucket_size}
        config = {
            "zero_optimization": {"stage": stage, "overlap_comm": overlap_comm, **buckets},
            "zero_allow_untested_optimizer": True,  # any that treats every weight alike
            "bf16": {"enabled": False},  # which would round the weights themselves
        }
        super().__init__(config=config, process_group_backend=process_group_backend)

    # ---- set-up ------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Lightning's refuses CPUs, which DeepSpeed knows (where there is a GPU, with DS_ACCELERATOR=cpu)."""
        if self.root_device.type == "cuda":
            return super().setup_environment()
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}  # gloo alone is enough, and needs no compiler
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        # float32 weights, and no module whose gradients travel in bfloat16
        mixed = {"enabled": self.mixed, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self.config["torch_autocast"] = mixed
        super()._format_config()

    def setup(self, trainer: Trainer) -> None:
        """Lightning's casts all weights to one type, and wants an engine to validate, too."""
        import deepspeed

        self.accelerator.setup(trainer)
        self.model_to_device()
        if not trainer.training:
            return
        self._init_config_if_needed()
        optimizer, schedule = self._init_optimizers()
        self.model, optimizer, _, _ = deepspeed.initialize(
            config=self.config, model=self.model, optimizer=optimizer, dist_init_required=False
        )
        self.optimizers, self.lr_scheduler_configs = [optimizer], [schedule] if schedule else []

    def teardown(self) -> None:
        if self.model is not self.lightning_module:
            self.model.destroy()  # or its hooks follow the weights into the next fit
        super().teardown()

    # ---- steps -------------------------------------------------------------------------------------

    @property
    def mixed(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return self.precision_plugin.precision == "bf16-mixed"

    def autocast(self) -> torch.autocast:
        """As under ddp: no cast is kept, as updates change the weights. The engine's own autocast inherits that."""
        return torch.autocast(self.root_device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=False)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return super().validation_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(False)
        yield
        self.model.set_gradient_accumulation_boundary(True)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass, the last of an update, has left gradients to step with."""
        return any(part is not None for part in self.model.optimizer.averaged_gradients.values())

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The norm of the gradient over all parameters; the step clips it to ``max_norm``, and skips one not finite.

        NaN also where it is infinite: DeepSpeed does not tell them apart.
        """
        zero = self.model.optimizer
        zero.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        norm = zero.scaled_global_norm() if self.has_gradients else torch.zeros(())
        return norm.where(norm.isfinite() & (norm >= 0), math.nan)  # one of them is a norm of -1

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Without gradients a step only counts, as those of torch's optimizers do."""
        if self.lightning_module.automatic_optimization or self.has_gradients:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        return closure()

    # ---- checkpoints -------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state of torch's optimizer, put together from all processes; received by the first."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero, state, groups, numbers = self.model.optimizer, {}, [], range(0)
        for group, weights in zip(zero.param_groups, zero.bit16_groups):
            (part,) = group["params"]
            numbers = range(numbers.stop, numbers.stop + len(weights))
            for i, weight in zip(numbers, weights):
                whole = {
                    key: safe_get_full_optimizer_state(weight, key) if is_moment(value, part) else deepcopy(value)
                    for key, value in zero.state.get(part, {}).items()
                }
                if self.is_global_zero:
                    state[i] = move_data_to_device(whole, "cpu")
            groups.append({**group, "params": list(numbers)})
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From the state of torch's optimizer, this process's part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        zero, saved = self.model.optimizer, checkpoint["optimizer_states"][0]
        state, groups = {}, [{**group, "params": [i]} for i, group in enumerate(saved["param_groups"])]
        whole = [[saved["state"].get(n, {}) for n in group["params"]] for group in saved["param_groups"]]
        for i, (group, weights) in enumerate(zip(zero.param_groups, zero.bit16_groups)):
            (part,), some = group["params"], [(w, m) for w, m in zip(weights, whole[i]) if m][:1]
            state[i] = {k: torch.zeros_like(part) if is_moment(v, w) else v for w, m in some for k, v in m.items()}
        zero.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if not any(state.values()):  # no step was taken
            return
        zero._lazy_init_hp_params_optimizer_state()
        for weights, moments in zip(zero.bit16_groups, whole):
            for weight, of_weight in zip(weights, moments):
                for key, value in of_weight.items():
                    if is_moment(value, weight):
                        safe_set_full_optimizer_state(weight, value.to(weight.device), key)


def is_moment(value: Any, weight: Tensor) -> bool:
    """Whether an entry of an optimizer's state has a number for every weight."""
    return isinstance(value, Tensor) and value.shape == weight.shape
