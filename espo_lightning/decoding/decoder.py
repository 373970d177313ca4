"""What every way of decoding has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor


class Decoder(ABC):
    """How completions are decoded, and of which policies. length: canvas width L. temperature: 0 is greedy."""

    length: int
    temperature: float

    @property
    def greedy(self) -> "Decoder":
        """The same at temperature 0."""
        return replace(self, temperature=0.0)

    @abstractmethod
    def check(self, policy) -> None:
        """Raise a ValueError if the policy cannot be decoded this way."""

    @abstractmethod
    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        """Token ids [B, L] of completions with int64 keys [B]; each depends on its key and its prompt only.

        Args:
            agree: "does any process still need a step?", asked before every step whose need depends on the data, so
                that all processes of a sharded policy run equally many forwards.
        """
