"""Unknown flags and keys: refused with the one that may be meant, or with the new spelling of one that has moved."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from inspect import signature
from pydoc import locate
from typing import Any

from espo_lightning.training.moved import advice


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that one with a slip may stand for; None if none is near.

    Part by part, so that what two names share does not make them alike; else any whose last part is (nearly) the same,
    as ``max_epochs`` is that of ``trainer.max_epochs``.

    Args:
        name: dotted, such as ``trainer.max_epoch``, and not among the known ones.
        known: dotted names.
    """
    spelt: list[str] = []
    for part in name.split("."):
        beside = {tuple(other.split("."))[len(spelt)] for other in known if other.startswith(".".join([*spelt, ""]))}
        near = [part] if part in beside or not beside else get_close_matches(part, sorted(beside), 1)
        if not near:
            break
        spelt += near
    else:
        if (found := ".".join(spelt)) != name:
            return found
    last = [other.rsplit(".", 1)[-1] for other in known]
    near = get_close_matches(name.rsplit(".", 1)[-1], last, 1, cutoff=0.8)
    return next(iter(get_close_matches(name, [o for o, end in zip(known, last) if [end] == near], 1, cutoff=0)), None)


def meant(message: str, known: Collection[str]) -> list[str]:
    """What may be meant by the unknown flags and keys that a message of jsonargparse names.

    Args:
        known: flags without their dashes. Keys of a class that the message names are the arguments of that class.
    """
    if message.startswith("unrecognized arguments: "):
        flags = [word[2:].partition("=")[0] for word in message.split() if word.startswith("--")]
        return [f"--{near}" for flag in flags if (near := nearest(flag, known))]
    if group := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = ".".join(group.groups())
    elif option := re.search(r"Option '([\w.]+)' is not accepted", message):
        name = option.group(1)
        if classes := re.findall(r"class_path '([\w.]+)'", message[: option.start()]):
            thing = locate(classes[-1])
            known = list(signature(thing).parameters) if callable(thing) else []
    else:
        return []
    near = nearest(name, known)
    return [near] if near else []


def names(parser: Any) -> list[str]:
    """All that a parser of jsonargparse knows: flags without dashes, and arguments of the classes it has by default.

    As one writes them: of ``model.objective.init_args.kl``, ``model.objective.kl``.
    """
    flags = [flag.removeprefix("--") for flag in parser._option_string_actions if flag.startswith("--")]
    keys = [key.replace(".init_args", "") for key, _ in parser.get_defaults().items()]
    return [name for name in dict.fromkeys([*flags, *keys]) if not name.endswith(("+", ".help", ".class_path"))]


def with_advice(parser: Any) -> Any:
    """A parser of jsonargparse that takes no abbreviated flags, and whose errors say how flags and keys are spelt."""
    error = parser.error
    parser.allow_abbrev = False  # which would be a slip that goes unnoticed

    def advised(message: Any, *rest: Any) -> Any:
        text = advice(str(message))
        hints = meant(text, names(parser)) if text == str(message) else []
        return error(f"{text}\ndid you mean {' and '.join(hints)}?" if hints else text, *rest)

    parser.error = advised
    return parser
