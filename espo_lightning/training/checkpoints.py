"""What training checkpoints hold, how they are written, and whether there is room for them."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import TorchCheckpointIO

from espo_lightning.policies.fingerprint import fingerprint
from espo_lightning.policies.precision import tell_slow_type
from espo_lightning.training.run_folder import amount, write_text


class PolicyModule(LightningModule):
    """A module with a ``policy``, whose checkpoints hold what training changes, and of the rest a fingerprint.

    The rest is made again from where it came: the base under adapters, and a frozen reference.
    """

    def leave_out_frozen(self, but: str | None = None) -> None:
        """Leave frozen weights out of checkpoints; to be called once, before anything is trained or sharded.

        Args:
            but: names that begin like this are stored nevertheless.
        """
        weights = self.named_parameters(remove_duplicate=False)
        frozen = {n: p for n, p in weights if not (p.requires_grad or (but and n.startswith(but)))}
        self.left_out, self.base = set(frozen), fingerprint(frozen.values())
        self.strict_loading = not frozen
        self.register_load_state_dict_post_hook(_do_not_miss_frozen)  # in a copy, too, as WeightAveraging makes one
        self.trained = [name for name, p in self.named_parameters() if p.requires_grad]

    def on_fit_start(self) -> None:
        """Warn, once, if the type that this computes in is slow on its device."""
        if self.trainer.is_global_zero:
            tell_slow_type(self.policy, mixed=self.trainer.precision == "bf16-mixed")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        for name in self.left_out & state.keys():
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Optimizers number the weights that they train, FSDP all of them: names mean the same to both."""
        checkpoint["base"] = self.base
        for state in checkpoint.get("optimizer_states", []):
            groups = state.get("param_groups", [])
            names = dict(zip((i for group in groups for i in group["params"]), self.trained))
            if all(isinstance(i, int) for i in names):
                state["state"] = {names[i]: moments for i, moments in state.get("state", {}).items()}
                for group in groups:
                    group["params"] = [names[i] for i in group["params"]]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raises ValueError if what the checkpoint leaves out was something else."""
        if checkpoint["base"] != self.base:
            raise ValueError(
                f"the checkpoint belongs to another base ({checkpoint['base']}, this one is {self.base}): give "
                "model.policy the path and the dtype with which the run began"
            )


def _do_not_miss_frozen(module: PolicyModule, incompatible: Any) -> None:
    """What checkpoints leave out is not missing in them, whatever the module is a part of."""
    left_out = tuple(module.left_out)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(left_out)]


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its disk, where Lightning makes two copies first: in memory and in /tmp."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def check_space(folder: Path, module: PolicyModule, checkpoints: int) -> None:
    """Refuse to begin a run whose checkpoints will not fit.

    A checkpoint is counted as the module's state and two moments of each trainable weight, as Adam has.

    Args:
        checkpoints: at most on the disk at once.

    Raises:
        OSError: the folder cannot be written to, or there is not enough space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ".probe", "whether anything can be written at all")
    (folder / ".probe").unlink()
    state = module.state_dict()
    stored = sum(weight.nbytes for weight in state.values())
    policy = sum(weight.nbytes for name, weight in state.items() if name.startswith("policy."))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    needed, free = checkpoints * (stored + 2 * trained) + policy, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"run_dir {folder} has {amount(free)} free, but {checkpoints} checkpoints at once and the final policy "
            f"need about {amount(needed)}: free some, name another run_dir, or lower keep_checkpoints"
        )
