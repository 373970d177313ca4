"""Calling verifiers that others wrote: whatever a function can do is a verdict, or a failure with a reason."""

import math
from collections.abc import Callable
from functools import partial
from inspect import isawaitable, iscoroutinefunction, signature

from espo_lightning.tasks.base import Verdict, VerifierUnavailable

LARGEST = 1e16  # of a reward: the squares of a group's sum still fit into float32, in which advantages are computed


class BrokenVerifier(ValueError):
    """A verifier failed on every text of a rollout: no completion can ever count."""


class Failed(dict):
    """The verdict on a text on which verifiers failed. ``causes``: their names, and why."""

    def __init__(self, verdict: Verdict, causes: dict[str, str]):
        super().__init__(verdict)
        self.causes = causes

    def __reduce__(self):
        return Failed, (dict(self), self.causes)


def name_of(function: Callable) -> str:
    """The import path of a function or of an object's class, without the arguments that are bound to it."""
    while isinstance(function, partial):
        function = function.func
    if not hasattr(function, "__qualname__"):  # an object; `TRLReward` tells what it calls
        function = getattr(function, "__wrapped__", type(function))
    module = getattr(function, "__module__", None)  # methods of built-in types have none
    return f"{module}.{function.__qualname__}" if module else function.__qualname__


def number(value: object) -> float:
    """A number of any library as a float: also an array or tensor of one element. Raises TypeError or ValueError."""
    return float(value.item() if callable(getattr(value, "item", None)) else value)


def checked(verify: Callable[[str], Verdict], text: str) -> tuple[Verdict, str]:
    """The verdict as floats plus "failed", and why it failed, "" if it did not.

    A verifier that raises (anything but Ctrl-C), or whose verdict has no reward, a value that is no finite number or a
    reward beyond ±1e16, costs one completion its reward (`Failed`: ``{"failed": 1, "reward": 0}``) and nothing else.

    Raises:
        VerifierUnavailable: from the verifier.
    """
    try:
        verdict = verify(text)
        if isawaitable(verdict):
            getattr(verdict, "close", bool)()  # nobody will wait for it
            raise TypeError("it is an async function, which is never run; make it a plain one")
        if not hasattr(verdict, "items"):
            kind = type(verdict).__name__
            raise AttributeError(f"it returned a {kind}, not a dictionary such as {{'reward': 1.0}}")
        causes = verdict.causes if isinstance(verdict, Failed) else {}
        verdict = {key: number(value) for key, value in verdict.items()}
        wrong = [f"{key} is {value}" for key, value in verdict.items() if not math.isfinite(value)]
        cause = ", ".join(wrong) if "reward" in verdict else "its verdict has no reward"
        if not cause and abs(verdict["reward"]) > LARGEST:
            cause = f"reward is {verdict['reward']:g}, beyond {LARGEST:g}, where advantages overflow"
    except (VerifierUnavailable, KeyboardInterrupt):
        raise
    except BaseException as error:  # functions of users are not trusted to be total, and time limits raise any class
        cause = f"{type(error).__name__}: {error}"
    if cause:
        return Failed({"failed": 1.0, "reward": 0.0}, {name_of(verify): cause}), cause
    verdict = {"failed": 0.0, **verdict}
    return (Failed(verdict, causes) if causes else verdict), ""


def check_works(verdicts: list[Verdict]) -> None:
    """Refuse to go on with a verifier that failed on every one of at least two texts.

    Raises:
        BrokenVerifier: names it, and why it failed on the first.
    """
    causes = [verdict.causes if isinstance(verdict, Failed) else {} for verdict in verdicts]
    if len(causes) > 1 and (always := [name for name in causes[0] if all(name in other for other in causes)]):
        raise BrokenVerifier(
            f"the verifier {always[0]} failed on every one of {len(causes)} texts ({causes[0][always[0]]}): "
            f"no completion can ever get its reward"
        )


def check_signature(function: Callable, *arguments: str) -> None:
    """Refuse a verifier that cannot be called with ``arguments`` in this order, before anything is started.

    Raises:
        ValueError: names it, its parameters and what is called; a function in TRL's style is sent to `TRLReward`.
    """
    if not callable(function):
        raise ValueError(f"a verifier is a function of ({', '.join(arguments)}), got {function!r}")
    name = name_of(function)
    if iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise ValueError(f"the verifier {name} is an async function, which is never run: make it a plain one")
    try:
        parameters = signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # written in C: nothing is known
        return
    try:
        parameters.bind(*arguments)
        fits = not {"completions", "prompts"} & set(parameters.parameters)
    except TypeError:
        fits = False
    if not fits:
        trl = "; a reward function of TRL goes into TRLReward" if "completions" in parameters.parameters else ""
        raise ValueError(
            f"the verifier {name} takes {parameters}, but is called with ({', '.join(arguments)}), for a dictionary "
            f"with 'reward'{trl}"
        )
