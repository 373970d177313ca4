"""Methods as presets: what a file in ``experiments/methods/`` maximises, and its loss on given numbers.

method = read_method("experiments/methods/wd1.yaml")
loss, statistics = method.loss(new, old, ref, masks.weight, length, rewards)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.objectives.advantages import equal_groups
from espo_lightning.objectives.objective import Objective, Scores, Statistics
from espo_lightning.scoring.likelihood import Likelihood
from espo_lightning.training.command_line import publish
from espo_lightning.training.module import ESPOModule


@dataclass(frozen=True)
class Method:
    """The arguments of `ESPOModule` that make a method; see there."""

    objective: Objective
    likelihood: Likelihood
    advantage: Callable[[Tensor], Tensor]
    decoding: Decoder
    updates: int
    fresh_masks: bool

    def advantages(self, rewards: Tensor) -> Tensor:
        """[Q, G] -> [Q, G]; 0 in groups with equal rewards."""
        return self.advantage(rewards).masked_fill(equal_groups(rewards).unsqueeze(-1), 0.0)

    def loss(
        self, new: Tensor, old: Tensor | None, ref: Tensor | None, weight: Tensor, length: Tensor, rewards: Tensor
    ) -> tuple[Tensor, Statistics]:
        """The loss of a whole batch, as `ESPOModule` computes it, in the dtype of ``new``.

        Args:
            new, old, ref: log-probabilities [M, B, L] under policy, rollout policy and reference; ``old`` and ``ref``
                may be None where the objective does not ask for them. ``old`` = ``new.detach()`` at the first update.
            weight: [M, B, L] of the masks, 0 = not scored.
            length: int64 [B], tokens up to and including the first end-of-text token.
            rewards: [Q, G], B = Q G.

        Returns:
            The scalar to be minimised, and the objective's statistics [B].
        """
        scores = Scores(new, old, ref, weight.to(new.dtype), length)
        losses, statistics = self.objective(scores, self.advantages(rewards).flatten(), rewards.shape[1])
        count = self.objective.count(length).to(new.dtype)
        return (count / count.mean() * losses).mean(), statistics


NAMES = {field.name for field in fields(Method)}


def read_method(path: str | Path, *changes: str) -> Method:
    """The method of a preset.

    Args:
        path: a YAML file with a ``model`` section; what is not a method's (optimizer, group size) is left aside.
        changes: flags without ``model.``, such as ``--objective.beta=0``.

    Raises:
        SystemExit: with code 2 and a message, if the file or a flag does not fit.
    """
    return make_method(method_settings(path), *changes)


def method_settings(path: str | Path) -> dict[str, Any]:
    """What a preset says of its method, as plain data: the arguments of `ESPOModule` that are fields of `Method`."""
    settings = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("model", {})
    return {key: value for key, value in settings.items() if key in NAMES}


def make_method(settings: dict[str, Any], *changes: str) -> Method:
    """The method of what `method_settings` returns; see `read_method`."""
    others = set(signature(ESPOModule).parameters) - NAMES
    publish()
    parser = ArgumentParser()
    parser.add_class_arguments(ESPOModule, "model", skip=others, instantiate=False)
    parser.add_argument("--config", action="config")
    flags = [change.replace("--", "--model.", 1) for change in changes]
    known = yaml.safe_dump({"model": settings})
    return Method(**vars(parser.instantiate(parser.parse_args(["--config", known, *flags])).model))
