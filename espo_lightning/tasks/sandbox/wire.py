"""Values as JSON: how the built-in and the standard library's own types cross the pipe between harness and program.

What arrives is made anew, of plain data and by constructors of this table; nothing is unpickled, and no name that comes
through the pipe is looked up outside of `TYPES` and `ERROR_MODULES`. Standard library only.
"""

import builtins
import collections
import collections.abc
import contextlib
import datetime
import decimal
import fractions
import importlib
import operator
import pathlib
import struct
import uuid
from collections.abc import Callable, Sequence

LENGTH = struct.Struct("<I")
MESSAGE_LIMIT = 16 << 20  # bytes of one message

Encode = Callable[[object], object]

# tag: (type, parts of a value, value of parts). A subclass goes as the first type here that it is derived from.
SIMPLE = {
    "fraction": (fractions.Fraction, lambda v: [v.numerator, v.denominator], lambda a, b: fractions.Fraction(a, b)),
    "decimal": (decimal.Decimal, lambda v: [decimal.Decimal.__str__(v)], decimal.Decimal),
    "datetime": (datetime.datetime, lambda v: [v.isoformat(), v.fold], lambda t, f: _moment(datetime.datetime, t, f)),
    "date": (datetime.date, lambda v: [v.isoformat()], datetime.date.fromisoformat),
    "time": (datetime.time, lambda v: [v.isoformat(), v.fold], lambda t, f: _moment(datetime.time, t, f)),
    "timedelta": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds], datetime.timedelta),
    "timezone": (datetime.timezone, lambda v: [v.utcoffset(None)], datetime.timezone),
    "complex": (complex, lambda v: [v.real, v.imag], complex),
    "bytes": (bytes, lambda v: [v.hex()], bytes.fromhex),
    "bytearray": (bytearray, lambda v: [v.hex()], bytearray.fromhex),
    "range": (range, lambda v: [v.start, v.stop, v.step], range),
    "slice": (slice, lambda v: [v.start, v.stop, v.step], slice),
    "uuid": (uuid.UUID, lambda v: [v.hex], uuid.UUID),
    "path": (pathlib.PurePosixPath, lambda v: [pathlib.PurePosixPath.__str__(v)], pathlib.PosixPath),
    "ellipsis": (type(...), lambda v: [], lambda: ...),
    "keys": (collections.abc.KeysView, lambda v: [list(v)], lambda items: dict.fromkeys(items).keys()),
    "values": (collections.abc.ValuesView, lambda v: [list(v)], lambda items: dict(enumerate(items)).values()),
    "items": (collections.abc.ItemsView, lambda v: [list(v)], lambda items: dict(items).items()),
    "list": (list, None, lambda *items: list(items)),
    "set": (set, None, lambda *items: set(items)),
    "frozenset": (frozenset, None, lambda *items: frozenset(items)),
    "deque": (collections.deque, lambda v: [list(v), v.maxlen], collections.deque),
    "counter": (collections.Counter, lambda v: [_pairs(v)], lambda pairs: _filled(collections.Counter(), pairs)),
    "ordered": (collections.OrderedDict, lambda v: [_pairs(v)], collections.OrderedDict),
    "default": (
        collections.defaultdict,
        lambda v: [v.default_factory, _pairs(v)],
        lambda factory, pairs: collections.defaultdict(factory, pairs),
    ),
    "dict": (dict, lambda v: [_pairs(v)], dict),
    "named": (tuple, None, lambda name, fields, *items: _named(name, fields, items)),
    "tuple": (tuple, None, lambda *items: items),
}
TYPES = {
    f"{kind.__module__}.{kind.__qualname__}": kind for kind, _, _ in SIMPLE.values() if kind.__module__ != "builtins"
}
TYPES |= {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
# Where the exceptions live that programs raise and tests catch, by the ``__module__`` that they say they have.
ERROR_MODULES = (
    "builtins", "_csv", "_queue", "_struct", "asyncio.exceptions", "binascii", "calendar", "concurrent.futures._base",
    "configparser", "copy", "csv", "dataclasses", "decimal", "email.errors", "http.client", "inspect", "ipaddress",
    "json.decoder", "pickle", "queue", "re", "shutil", "socket", "sqlite3", "ssl", "statistics", "string", "struct",
    "subprocess", "tarfile", "tokenize", "urllib.error", "uuid", "xml.etree.ElementTree", "zipfile", "zlib", "zoneinfo",
)  # fmt: skip


def _pairs(value: dict) -> list:
    return [list(pair) for pair in dict.items(value)]


def _filled(counter: collections.Counter, pairs: list) -> collections.Counter:
    dict.update(counter, pairs)  # Counter(pairs) would count the pairs
    return counter


def _moment(kind: type, text: str, fold: int) -> object:
    return kind.fromisoformat(text).replace(fold=fold)


def _named(name: str, fields: Sequence[str], items: Sequence[object]) -> tuple:
    """A tuple whose fields have names, as a namedtuple has, without the code that namedtuple compiles."""
    space = {str(f): property(operator.itemgetter(n)) for n, f in enumerate(fields) if not str(f).startswith("_")}
    space |= {"_fields": tuple(fields), "_asdict": lambda self: dict(zip(self._fields, self)), "__slots__": ()}
    space["__repr__"] = lambda self: f"{name}({', '.join(f'{f}={x!r}' for f, x in zip(fields, self))})"
    return type(str(name), (tuple,), space)(items)


def encode(value: object, inner: Encode, refer: Encode) -> object:
    """Tagged JSON. inner: encodes the parts of a value. refer: encodes what has no value, as a reference."""
    if value is None or isinstance(value, bool) or type(value) in (str, float):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else ["int", hex(value)]
    for base in (str, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, tuple) and isinstance(fields := getattr(type(value), "_fields", None), tuple):
        return ["named", [type(value).__name__, ["list", list(fields)], *map(inner, value)]]
    for tag, (kind, parts, _) in SIMPLE.items():
        if isinstance(value, kind) and tag != "named":
            return [tag, [inner(part) for part in (value if parts is None else parts(value))]]
    if isinstance(value, type) and TYPES.get(name := _name(value)) is value:
        return ["type", name]
    return refer(value)


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def decode(data: object, resolve: Callable[[str, object], object]) -> object:
    """The value of tagged JSON. resolve: what a tag of the peer's own refers to. Raises what constructors raise."""
    if not isinstance(data, list):
        return data
    tag, body = data
    if tag == "int":
        return int(body, 16)
    if tag == "type":
        return TYPES[body]
    if tag in SIMPLE:
        return SIMPLE[tag][2](*(decode(part, resolve) for part in body))
    return resolve(tag, body)


# ---- changes in place ---------------------------------------------------------------------------------------------


def adopt(mine: object, changed: object) -> object:
    """``mine`` with the content of ``changed``, in place where its type allows that; else ``changed``."""
    if type(mine) is not type(changed):
        return changed
    if isinstance(mine, list | collections.deque):
        kept = [adopt(old, new) for old, new in zip(mine, changed)] + list(changed)[len(mine) :]
        mine.clear()
        mine.extend(kept)
    elif isinstance(mine, bytearray):
        mine[:] = changed
    elif isinstance(mine, dict):
        kept = {key: adopt(mine[key], new) if key in mine else new for key, new in changed.items()}
        mine.clear()
        dict.update(mine, kept)
    elif isinstance(mine, set):
        mine.clear()
        mine.update(changed)
    elif type(mine) is tuple and len(mine) == len(changed):
        parts = [adopt(old, new) for old, new in zip(mine, changed)]
        return mine if all(old is new for old, new in zip(mine, parts)) else changed
    else:
        return mine if mine == changed else changed
    return mine


# ---- exceptions ---------------------------------------------------------------------------------------------------


def is_known(kind: type) -> bool:
    """Does an exception class say that it is one of the standard library's? `known` looks whether there is one."""
    return kind.__module__ in ERROR_MODULES


def known(module: str, name: str) -> type[BaseException]:
    """The exception class of this name, or Exception."""
    found = getattr(importlib.import_module(module), name, None) if module in ERROR_MODULES else None
    return found if isinstance(found, type) and issubclass(found, BaseException) else Exception


def derived(name: str, base: type[BaseException]) -> type[BaseException]:
    """A class that stands for an exception class of the program."""
    return type(name, (base,), {"__str__": lambda self: vars(self).get("_text") or base.__str__(self)})


def rebuilt(kind: type[BaseException], args: tuple, attributes: dict, text: str) -> BaseException:
    """An exception as it was raised: class, arguments and attributes."""
    try:
        error = kind(*args)
    except Exception:  # json.JSONDecodeError takes three arguments and keeps one, say
        error = kind.__new__(kind)
        error.args = args
    if not is_known(kind):
        attributes = {**attributes, "_text": text}
    for key, value in attributes.items():
        with contextlib.suppress(AttributeError, TypeError):
            setattr(error, key, value)
    return error
