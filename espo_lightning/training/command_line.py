"""Command lines: from a typed function to a program whose errors are one message and exit code 2."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from inspect import signature
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

import espo_lightning  # names only: what they stand for is imported when it is used
from espo_lightning.shipped import found
from espo_lightning.training.quiet import quiet
from espo_lightning.training.spelling import with_advice

SHORT = "yaml with short names"  # how files are read
BAD_INPUT = (ValueError, OSError, FloatingPointError)  # what is raised when an argument, or a policy, is wrong


def run(function: Callable, command: str, argv: list[str] | None, defaults: dict[str, Any] | None = None) -> Any:
    """Parse ``argv`` into the arguments of ``function``, build the objects among them, and call it.

    Args:
        function: typed and documented; its parameters become the flags. A parameter ``settings`` gets all
            parsed values as a plain dictionary instead.
        command: what the user typed, for the usage line.
        defaults: of parameters whose default cannot stand in the signature.
    """
    quiet()
    rooms = {room(parameter.annotation) for parameter in signature(function).parameters.values()}
    publish(name for name in espo_lightning.__all__ if room(name) in rooms - {""})
    usage = f"python -m {command} [--config FILE] [--KEY=VALUE ...]"
    parser = helpful(ArgumentParser(prog=f"python -m {command}", usage=usage))
    parser.add_argument("--config", action="config", help="a YAML file of these arguments; may be repeated")
    parser.add_function_arguments(function, skip={"settings"})
    parser.set_defaults(defaults or {})
    config = parser.parse_args(spelt_out(sys.argv[1:] if argv is None else argv))
    config.pop("config")
    try:
        arguments = vars(parser.instantiate(config))
        if "settings" in signature(function).parameters:
            arguments["settings"] = json.loads(parser.dump(config, format="json", skip_unset=False))
        return function(**arguments)
    except BrokenPipeError:  # who reads has seen enough, such as ``head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        raise SystemExit(141) from None
    except BAD_INPUT as error:
        parser.error(str(error))


def option(argv: list[str], name: str) -> str | None:
    """The last value of ``--name=VALUE`` or ``--name VALUE`` among arguments."""
    found = None
    for argument, following in zip(argv, [*argv[1:], None]):
        if argument == f"--{name}":
            found = following
        elif argument.startswith(f"--{name}="):
            found = argument.split("=", 1)[1]
    return found


def spelt_out(argv: list[str]) -> list[str]:
    """Arguments with short names of this library's functions, ``--model.objective.kl=k3``, as import paths, and its
    own experiments after ``--config`` as the files that they are.

    Classes have short names in jsonargparse already. A name is taken for a function's only where one is expected.
    """
    spelt, before = [], ""
    for argument in argv:
        head, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        flag = head if equals else before  # whose value this is
        name = flag.removeprefix("--").removesuffix(".class_path").rsplit(".", 1)[-1]
        if known(value) and name in functions_expected():
            argument = f"{head}{equals}{callables()[value]}"
        elif flag == "--config" and value:
            argument = f"{head}{equals}{found(value)}"
        before = "" if equals else head
        spelt.append(argument)
    return spelt


def helpful(parser: Any) -> Any:
    """A parser that takes short names but no short flags, and whose errors say how things are spelt."""
    return with_short_names(with_advice(parser))


def spelt_out_in(value: Any, key: str = "") -> Any:
    """The same for what was read from a file: short names of functions, where one is expected, as import paths.

    Args:
        value: any part of the file.
        key: the name it stands under; of a ``class_path``, the one above.
    """
    if isinstance(value, str) and known(value) and key in functions_expected():
        return callables()[value]
    if isinstance(value, list):
        return [spelt_out_in(part, key) for part in value]
    if isinstance(value, dict):
        return {name: spelt_out_in(part, key if name == "class_path" else name) for name, part in value.items()}
    return value


def with_short_names(parser: Any) -> Any:
    """A parser that reads short names of functions in YAML, too."""
    read = get_loader("yaml")
    set_loader(SHORT, lambda text: spelt_out_in(read(text)), (yaml.YAMLError,))
    parser.parser_mode = SHORT
    return parser


def publish(names: Iterable[str] = espo_lightning.__all__) -> None:
    """Import what public names stand for: jsonargparse knows classes by short names once they are there."""
    for name in names:
        getattr(espo_lightning, name)


def room(thing: Any) -> str:
    """The folder of this package where a public name, or a class or function, is; "" if nowhere."""
    path = espo_lightning.WHERE.get(thing, "") if isinstance(thing, str) else getattr(thing, "__module__", "")
    return path.split(".")[1] if path.startswith("espo_lightning.") else ""


def known(name: str) -> bool:
    """Whether a short name is one of `callables`; no other one imports anything."""
    return name in espo_lightning.WHERE and name in callables()


@cache
def callables() -> dict[str, str]:
    """The public functions of this library, whose names alone begin small, and classes of `objectives` whose objects
    are in the place of one: short name -> import path.
    """
    return {name: f"espo_lightning.{name}" for name in espo_lightning.__all__ if name[0].islower() or _like(name)}


def _like(name: str) -> bool:
    """Whether a public name is a class of which an object is called as a function is."""
    if room(name) != "objectives":
        return False
    thing = getattr(espo_lightning, name)
    return inspect.isclass(thing) and thing.__bases__ == (object,) and "__call__" in vars(thing)


@cache
def functions_expected() -> set[str]:
    """The names of parameters of public classes and functions that are functions, or are made by one."""
    public = [getattr(espo_lightning, name) for name in espo_lightning.__all__]
    functions, classes = (list(filter(kind, public)) for kind in (inspect.isfunction, inspect.isclass))
    made = {signature(function).return_annotation for function in functions} & set(classes)  # as policies are
    return {
        parameter.name
        for thing in [*classes, *functions]
        for parameter in signature(thing).parameters.values()
        if inspect.isfunction(parameter.default) or _callable(parameter.annotation) or parameter.annotation in made
    }


def _callable(annotation: Any) -> bool:
    return get_origin(annotation) is Callable or any(map(_callable, get_args(annotation)[:2]))


def as_list(value: object) -> list:
    """None, one thing or several, as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
