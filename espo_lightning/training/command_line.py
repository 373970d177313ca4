"""Command lines: from a typed function to a program whose errors are one message and exit code 2."""

import inspect
import json
import sys
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from espo_lightning.training.moved import with_advice
from espo_lightning.training.screen import quiet

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
    usage = f"python -m {command} [--config FILE] [--KEY=VALUE ...]"
    parser = with_short_names(with_advice(ArgumentParser(prog=f"python -m {command}", usage=usage)))
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
    """Arguments with short names of this library's functions, ``--model.objective.kl=k3``, as import paths.

    Classes have short names in jsonargparse already. A name is taken for a function's only where one is expected.
    """
    spelt, expected = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if expected and not flag:
            argument = callables().get(value, value)
        takes = flag.removeprefix("--").removesuffix(".class_path").rsplit(".", 1)[-1] in functions_expected()
        if equals and takes:
            argument = f"{flag}={callables().get(value, value)}"
        expected = bool(flag) and not equals and takes
        spelt.append(argument)
    return spelt


def spelt_out_in(value: Any, expected: bool = False) -> Any:
    """The same for what was read from a file: short names of functions, where one is expected, as import paths.

    Args:
        value: any part of the file.
        expected: whether it stands where a function is expected.
    """
    if isinstance(value, str) and expected:
        return callables().get(value, value)
    if isinstance(value, list):
        return [spelt_out_in(part, expected) for part in value]
    if isinstance(value, dict):
        return {
            key: spelt_out_in(part, expected if key == "class_path" else key in functions_expected())
            for key, part in value.items()
        }
    return value


def with_short_names(parser: Any) -> Any:
    """A parser that reads short names of functions in YAML, too."""
    read = get_loader("yaml")
    set_loader(SHORT, lambda text: spelt_out_in(read(text)), (yaml.YAMLError,))
    parser.parser_mode = SHORT
    return parser


@cache
def _public() -> dict[str, Any]:
    import espo_lightning  # which imports this module

    return {name: getattr(espo_lightning, name) for name in espo_lightning.__all__}


@cache
def callables() -> dict[str, str]:
    """The public functions of this library, and classes whose objects are in the place of one: name -> import path."""
    return {name: f"espo_lightning.{name}" for name, thing in _public().items() if _function_like(thing)}


def _function_like(thing: Any) -> bool:
    return inspect.isfunction(thing) or (
        inspect.isclass(thing) and thing.__bases__ == (object,) and "__call__" in vars(thing)
    )


@cache
def functions_expected() -> set[str]:
    """The names of parameters of public classes and functions that are functions, or are made by one."""
    classes = [thing for thing in _public().values() if inspect.isclass(thing)]
    functions = [thing for thing in _public().values() if inspect.isfunction(thing)]
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
