"""Flags of earlier versions: refused with their new spelling."""

import re

OBJECTIVE = ("ratio", "clip_range", "clip_nats", "kl", "beta")
MOVED = {f"model.{name}": f"model.objective.{name}" for name in OBJECTIVE} | {"beta": "objective.beta"}


def advice(message: str) -> str:
    """The message of a parser, with the new spelling of a flag that it does not know because it has moved."""
    flag = re.search(r"--([\w.]+)", message)  # on the command line
    option = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)  # in a file
    old = flag.group(1) if flag else ".".join(option.groups()) if option else ""
    if old not in MOVED:
        return message
    return f"{message}\n{old} is now {MOVED[old]}: on the command line, and in files, where it moves into `objective:`"
