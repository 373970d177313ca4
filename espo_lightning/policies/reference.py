"""References: what a policy was, or is without its adapters."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from espo_lightning.policies.policy import Policy
from espo_lightning.policies.prefix import Prefix


class FrozenReference(nn.Module):
    """A frozen copy of a policy, called like it.

    Args:
        stored: whether it is part of checkpoints; a copy that never changes can be made again.
    """

    def __init__(self, policy: Policy, stored: bool = False):
        super().__init__()
        self.stored = stored
        shared = {id(policy.tokenizer): policy.tokenizer}
        self.policy = deepcopy(policy, shared).requires_grad_(False).eval()  # of the policy's own class
        self.mask_id, self.lengths, self.layout = policy.mask_id, self.policy.lengths, policy.layout
        self.check_tokens = self.policy.check_tokens

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy(*args, **kwargs)

    @property
    def resumes(self) -> bool:
        return self.policy.selective  # nothing is differentiated

    def prefix(self, start: int | None = None, room: int | None = None) -> Prefix:
        return self.policy.prefix(start, room)

    def train(self, mode: bool = True) -> "FrozenReference":
        """Stays in eval mode, whatever its parent does."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict | None = None, **kwargs: Any) -> dict:
        if self.stored:
            return super().state_dict(*args, destination=destination, **kwargs)
        return {} if destination is None else destination


class AdapterOff:
    """The policy without its adapters: the base that they started from, without a second copy.

    No nn.Module on purpose, so that its owner does not hold the policy's parameters twice.
    """

    def __init__(self, policy: Policy):
        self.policy, self.mask_id, self.lengths = policy, policy.mask_id, policy.lengths
        self.layout, self.prefix, self.resumes = policy.layout, policy.prefix, policy.selective
        self.check_tokens = policy.check_tokens

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy.model.disable_adapter():
            return self.policy(*args, **kwargs)


def make_reference(policy: Policy, *, stored: bool = False) -> FrozenReference | AdapterOff:
    """The policy as it is now, or, if it has adapters, the base without them. stored: see `FrozenReference`."""
    return AdapterOff(policy) if policy.has_adapters else FrozenReference(policy, stored)
