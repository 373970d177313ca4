"""Evaluating a policy: decode, judge, and what an evaluation was made with."""

import pickle
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding
from espo_lightning.policies.fingerprint import fingerprint
from espo_lightning.policies.policy import Policy
from espo_lightning.policies.precision import tell_slow_type
from espo_lightning.tasks.base import Problem, Verdict
from espo_lightning.tasks.judge import judge_all


def solve(
    policy: Policy, problems: list[Problem], keys: Tensor, decoding: Decoder, *, must_work: bool = False
) -> tuple[list[str], list[Verdict]]:
    """Decode one completion per problem with keys [B], and judge it (`judge_all`): texts and verdicts."""
    texts = policy.decode(decoding.generate(policy, policy.encode([p.prompt for p in problems]), keys))
    return texts, judge_all(problems, texts, must_work=must_work)


def place(policy: Policy, device: str, local: int = 0) -> None:
    """Put a policy on a device, "auto" = GPU number ``local`` or the CPU if there is none, in eval mode.

    The first process warns if its type of numbers is slow there (`slow_type`).

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        policy.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without it, or no such name
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device} is not possible ({reason}): use auto, cpu, or cuda:0 and so on") from error
    if local == 0:
        tell_slow_type(policy)


def as_json(decoding: Decoding) -> dict:
    """The settings as plain data, functions by their import path."""
    values = {field.name: getattr(decoding, field.name) for field in fields(decoding)}
    return {k: f"{v.__module__}.{v.__qualname__}" if callable(v) else v for k, v in values.items()}


def load_weights(policy: Policy, checkpoint: str) -> None:
    """Put the weights of a Lightning checkpoint of `ESPOModule` or `SFTModule` into a policy of the same architecture.

    Raises:
        ValueError: it is no such checkpoint, one of another architecture, or of adapters for another base.
    """
    import torch.distributed.checkpoint as dcp

    from espo_lightning.training.strategies import weights_in  # Lightning, which nothing else here needs

    path = Path(checkpoint)
    frozen = {f"policy.{n}": p for n, p in policy.named_parameters(remove_duplicate=False) if not p.requires_grad}
    weights = {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
    weights = {name: weight for name, weight in weights.items() if name not in frozen}
    try:
        if path.is_dir():
            content = torch.load(path / "meta.pt", weights_only=True)
            part, names = weights_in(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            names = content["state_dict"]
        if wrong := weights.keys() ^ {name for name in names if name.startswith("policy.")}:
            raise ValueError(f"{len(wrong)} weights are in only one of them, such as {min(wrong)}")
        if frozen and content["base"] != fingerprint(frozen.values()):
            raise ValueError("its adapters are for another base")
        if path.is_dir():
            dcp.load({part: weights}, checkpoint_id=path, no_dist=True)  # in place
        else:
            weights = {name: content["state_dict"][name] for name in weights}
        policy.load_state_dict({name.removeprefix("policy."): weight for name, weight in weights.items()}, strict=False)
    except (pickle.UnpicklingError, KeyError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint} does not fit the policy: {error}") from error
