"""Going on from a checkpoint: with which settings, which of them may differ, and how a change takes effect."""

import pickle
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from espo_lightning.training.checkpoints import PolicyModule
from espo_lightning.training.run_checkpoint import RECORD
from espo_lightning.training.run_folder import checkpoints_in, run_of
from espo_lightning.training.strategies import weights_in

# What a run is made of: its random keys, the order of its problems, the shape of what a checkpoint holds, and its
# clocks. Everything else may change, takes effect, and is recorded.
FIXED = (
    "seed",
    "data.batch_size",
    "data.task*",
    "model.group_size",
    "model.updates",
    "model.length",
    "model.policy*",
    "model.optimizer",
    "model.reference_sync",
)
FREE = ("*.path", "*.attention", "*.gradient_checkpointing", "*.compile", "*.allow_unsafe")  # of these, nevertheless
EVALUATION = ("data.task*", "data.eval_problems", "model.decoding*", "model.policy*", "trainer.limit_val_batches")
SCHEDULE = ("model.optimizer*", "model.warmup", "data.batches", "trainer.max_epochs", "trainer.max_steps")
Changes = dict[str, tuple[Any, Any]]  # setting -> its value in the run so far, and from now on


def header(checkpoint: Path) -> dict:
    """What a checkpoint says beside its tensors, which stay on the disk.

    Raises:
        ValueError: it is no checkpoint, or damaged.
    """
    try:
        if checkpoint.is_dir():
            weights_in(checkpoint)
            return torch.load(checkpoint / "meta.pt", weights_only=True)
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        others = [str(p) for p in checkpoints_in(checkpoint.parent) if p != checkpoint]
        advice = f"resume from another, such as {others[-1]}" if others else "there is no other beside it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"ckpt_path {checkpoint} is damaged, or no checkpoint ({reason}): {advice}") from error


def settings_of(checkpoint: Path, content: dict, command: str) -> str:
    """The configuration, as YAML, with which the run of a checkpoint was going.

    Raises:
        ValueError: the checkpoint does not say, or is another program's.
    """
    record = content.get(RECORD, {})
    if (writer := record.get("command", command)) != command:
        raise ValueError(f"ckpt_path {checkpoint} was written by {writer}: resume it with python -m {writer}")
    if "config" in record:
        return record["config"]
    folder = run_of(checkpoint)
    if folder is None:
        raise ValueError(f"ckpt_path {checkpoint} does not say with which settings it was made, nor is a run around it")
    return (folder / "config.yaml").read_text()


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested settings by their names on the command line; a class stands under the name of its object."""
    if not isinstance(settings, dict):
        return {name: settings}
    found = {} if settings else {name: {}}
    for key, value in settings.items():
        inner = name if key in ("class_path", "init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
        found |= flat(value, inner) if inner != name or isinstance(value, dict) else {name: value}
    return found


def changes(before: dict, now: dict) -> Changes:
    """The settings in which two configurations differ."""
    old, new = flat(before), flat(now)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def matching(found: Changes, patterns: tuple[str, ...]) -> Changes:
    """Those changes whose names match one of the patterns."""
    return {name: values for name, values in found.items() if any(fnmatch(name, p) for p in patterns)}


def refuse_fixed(found: Changes, checkpoint: Path) -> None:
    """Raise ValueError, with both values, if something has changed that a run cannot change."""
    fixed = matching(found, FIXED).keys() - matching(found, FREE).keys()
    if fixed:
        named = "; ".join(f"{name} is {found[name][0]!r} there, {found[name][1]!r} here" for name in sorted(fixed))
        raise ValueError(
            f"ckpt_path {checkpoint} belongs to a run with other settings, which cannot change on the way: {named}. "
            "Leave them out to go on with the run's own, or start a new run"
        )


def check_weights(checkpoint: Path, content: dict, module: PolicyModule) -> None:
    """Refuse a checkpoint whose weights are not this module's, before anything is loaded.

    Raises:
        ValueError: names or shapes differ, or what the checkpoint leaves out was something else.
    """
    PolicyModule.on_load_checkpoint(module, content)
    if checkpoint.is_dir():
        return
    there, here = content["state_dict"], module.state_dict()
    odd = sorted(there.keys() ^ here.keys()) or [n for n in here if there[n].shape != here[n].shape]
    if odd:
        sizes = [tuple(weights[odd[0]].shape) if odd[0] in weights else "absent" for weights in (there, here)]
        raise ValueError(
            f"ckpt_path {checkpoint} does not fit model.policy: {len(odd)} weights differ, such as {odd[0]}, "
            f"{sizes[0]} in the checkpoint, {sizes[1]} in the policy"
        )


def renew_schedule(trainer: Trainer, module: LightningModule) -> None:
    """Give optimizer and schedule their present settings, as if these had been those of the whole run.

    Restoring a checkpoint brings back the old ones; moments and the clock stay.
    """
    (fresh,), (schedule,) = module.configure_optimizers()
    schedule = schedule["scheduler"] if isinstance(schedule, dict) else schedule
    (config,) = trainer.lr_scheduler_configs
    steps = config.scheduler.last_epoch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps between these
        for _ in range(steps):
            schedule.step()
    for group, renewed in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({key: value for key, value in renewed.items() if key != "params"})
    config.scheduler.load_state_dict(schedule.state_dict())


class Renewal(Callback):
    """Lets changed settings of optimizer and schedule take effect, over those that a checkpoint brings back."""

    def __init__(self, changes: Changes):
        self.needed = bool(matching(changes, SCHEDULE))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.needed:
            renew_schedule(trainer, pl_module)


def history(record: dict, checkpoint: Path, batches: int, found: Changes) -> list[dict]:
    """The run's resumes so far, and this one: where it goes on, and what changed."""
    changed = {name: list(values) for name, values in found.items()}
    return [*record.get("history", []), {"checkpoint": str(checkpoint), "batches": batches, "changed": changed}]


def as_settings(text: str) -> dict:
    """A configuration without what is not part of the run itself."""
    settings = yaml.safe_load(text)
    return {key: value for key, value in settings.items() if key not in ("config", "ckpt_path", "run_dir")}
