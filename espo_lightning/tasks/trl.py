"""Reward functions of TRL as verifiers: bring them unchanged."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, isawaitable, signature

from espo_lightning.tasks.base import Verdict
from espo_lightning.tasks.files import Row
from espo_lightning.tasks.rewards import check_weights, imported, weighted
from espo_lightning.tasks.verifiers import name_of, number

OWN = ("prompt", "completion", "completion_ids")  # columns that TRL does not hand on as they are
FOREIGN = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # what TRL's trainer adds, and nobody else has

TRLFunction = Callable[..., Sequence[float | None]]


class TRLReward:
    """A verifier of `Rows` made of reward functions in the signature of TRL's GRPOTrainer.

    Such a function is called as ``f(prompts=[...], completions=[...], **columns)``, where ``columns`` are those of the
    rows, and returns one number per completion. A completion is a text, or, where the prompt is a list of messages, a
    list of one message of the assistant. Functions may be async. None counts as 0, as in TRL's sum.

    Each call here is about one completion: functions that compare the completions of a batch see one.

    Args:
        function: the reward function; in YAML by its import path.
        weight: of its reward.
        extra: import path -> weight of more such functions. The reward is then the weighted sum, and each is logged
            under the function's name.

    Raises:
        ValueError: a function that does not take ``completions``, or needs what only TRL's trainer has; a weight that
            is no number; two functions of one name.
    """

    def __init__(self, function: TRLFunction, weight: float = 1.0, extra: dict[str, float] | None = None):
        functions = [(function, weight), *((imported(path), share) for path, share in (extra or {}).items())]
        check_weights(weight, extra or {})
        calls = [(partial(reward, function, accepted(function)), share) for function, share in functions]
        self.parts = {name_of(f).rpartition(".")[2]: call for (f, _), call in zip(functions, calls)}
        if len(self.parts) < len(functions):
            raise ValueError(f"two reward functions share a name: {', '.join(name_of(f) for f, _ in functions)}")
        if len(self.parts) == 1:
            self.__wrapped__ = function  # whose name messages show

    def __call__(self, row: Row, text: str) -> Verdict:
        """The verdict on one completion of a row's prompt."""
        if len(self.parts) > 1:
            return weighted(text, {name: (share, partial(call, row)) for name, (call, share) in self.parts.items()})
        ((call, share),) = self.parts.values()
        return {"reward": share * call(row, text)["reward"]}


def reward(function: TRLFunction, takes: set[str] | None, row: Row, text: str) -> Verdict:
    """What one function gives one completion. Raises TypeError if that is not one number, or None."""
    chat = isinstance(row["prompt"], list)
    completion = [{"role": "assistant", "content": text}] if chat else text
    columns = {key: [value] for key, value in row.items() if key not in OWN}
    arguments = {"prompts": [row["prompt"]], "completions": [completion], **columns}
    if takes is not None:
        arguments = {key: value for key, value in arguments.items() if key in takes}
    rewards = function(**arguments)
    if isawaitable(rewards):
        rewards = asyncio.run(_awaited(rewards))
    if hasattr(rewards, "tolist"):  # an array or tensor of them
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple) or len(rewards) != 1:
        raise TypeError(f"it is to return a list of one reward per completion, got {str(rewards)[:80]} for one")
    return {"reward": 0.0 if rewards[0] is None else number(rewards[0])}


async def _awaited(rewards):
    return await rewards


def accepted(function: TRLFunction) -> set[str] | None:
    """The arguments that a reward function takes by name; None: whatever comes.

    Raises:
        ValueError: no function, or not one in TRL's signature.
    """
    if not callable(function):
        raise ValueError(f"{function!r} is no function: TRLReward needs f(completions, **columns)")
    parameters, name = signature(function).parameters, name_of(function)
    free = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "completions" not in parameters and not free:
        raise ValueError(f"{name} takes {signature(function)}, a reward function of TRL takes (completions, **columns)")
    for key in FOREIGN:
        if key in parameters and parameters[key].default is Parameter.empty:
            raise ValueError(f"{name} needs {key!r}, which only TRL's trainer has: give it a default, or do without")
    return None if free else set(parameters)
