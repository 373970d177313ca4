"""What every way of decoding has in common, and what it can tell of how it went."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor


class Trace(NamedTuple):
    """How B completions of L tokens were decoded.

    Attributes:
        steps: int64 [B, L], number of the step that committed each position, from 0 to `Decoder.passes` - 1; -1 =
            filled by ``early_stop`` without a forward pass.
        entropy: float32 [B, L], nats of the law that each token was drawn from (at temperature 0, of the law whose best
            token was taken); 0 where there was none.
    """

    steps: Tensor
    entropy: Tensor

    def of_rows(self, rows: Tensor) -> "Trace":
        """The same of some completions."""
        return Trace(self.steps[rows], self.entropy[rows])


class Decoder(ABC):
    """How completions are decoded, and of which policies.

    Attributes:
        length: canvas width L.
        temperature: of the sampled tokens; 0 is greedy.
        passes: the most forward passes of a completion; None = not known.
        order_free: whether the positions that a step commits are drawn without looking at the policy, so that two
            policies give the same law to every order.
    """

    length: int
    temperature: float
    passes: int | None = None
    order_free: bool = False

    @property
    def greedy(self) -> "Decoder":
        """The same at temperature 0."""
        return replace(self, temperature=0.0)

    @abstractmethod
    def check(self, policy) -> None:
        """Raise a ValueError if the policy cannot be decoded this way."""

    @abstractmethod
    def decode(
        self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more
    ) -> tuple[Tensor, Trace]:
        """Token ids [B, L] of completions with int64 keys [B], and their `Trace`, without a forward pass more.

        Each completion and its trace depend on its key and its prompt only.

        Args:
            agree: "does any process still need a step?", asked before every step whose need depends on the data, so
                that all processes of a sharded policy run equally many forwards.
        """

    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        """The same token ids [B, L] as `decode`, which a decoder may make without the work that a trace costs."""
        return self.decode(policy, prompts, keys, agree)[0]
