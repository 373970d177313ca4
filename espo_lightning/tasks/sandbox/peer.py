"""The pipe between harness and program: calls by reference, results as plain data. See `inner`."""

import builtins
import collections
import contextlib
import json
import operator
import os
import select
import struct
import time

LENGTH = struct.Struct("<I")
MESSAGE_LIMIT = 16 << 20  # bytes of one message


class Cut(BaseException):
    """The conversation is over: ``reason`` is "timeout" or "crash". Not an Exception, so that no test swallows it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Remote:
    """An object of the other process. Compares by identity only: no ``__eq__`` written by a model decides a test.

    Nor does a ``__contains__``: ``x in remote`` falls back to iteration, which does not tell the program what x is.
    """

    def __init__(self, peer: "Peer", ref: int) -> None:
        self.__dict__.update(_peer=peer, _ref=ref)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._peer.request("call", self._ref, args, kwargs)

    def __getattr__(self, name: str) -> object:
        return self._peer.request("getattr", self._ref, (name,))

    def __setattr__(self, name: str, value: object) -> None:
        self._peer.request("setattr", self._ref, (name, value))

    def __getitem__(self, key: object) -> object:
        return self._peer.request("getitem", self._ref, (key,))

    def __len__(self) -> int:
        return self._peer.request("len", self._ref)

    def __iter__(self) -> object:
        return self._peer.request("iter", self._ref)

    def __next__(self) -> object:
        return self._peer.request("next", self._ref)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._peer.request("str", self._ref))


SEQUENCES = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque"}
SEQUENCE_OF = {name: kind for kind, name in SEQUENCES.items()}
OPERATIONS = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
}


class Peer:
    """One end of the pipe. ``operations``: what the other end may do to objects of this end."""

    def __init__(self, read: int, write: int, operations: tuple[str, ...], deadline: float = float("inf")) -> None:
        self.read, self.write, self.operations, self.deadline = read, write, operations, deadline
        self.objects: list[object] = []  # exported; kept alive, so that a ref stays valid
        self.remotes: dict[int, Remote] = {}

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        if len(data) > MESSAGE_LIMIT:
            raise ValueError("value too large")
        view = memoryview(LENGTH.pack(len(data)) + data)
        while view:
            if not select.select([], [self.write], [], self._left())[1]:
                raise Cut("timeout")
            try:
                view = view[os.write(self.write, view[:4096]) :]  # at most what a writable pipe takes without blocking
            except BrokenPipeError:
                raise Cut("crash") from None

    def receive(self) -> list:
        (size,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if size > MESSAGE_LIMIT:
            raise Cut("crash")
        return json.loads(self._exactly(size))

    def _left(self) -> float | None:
        return None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not select.select([self.read], [], [], self._left())[0]:
                raise Cut("timeout")
            if not (part := os.read(self.read, min(size - len(data), 1 << 20))):
                raise Cut("crash")
            data += part
        return bytes(data)

    def encode(self, value: object) -> object:
        """Plain data as tagged JSON, subclasses as their base; a callable or, from the program, any object by ref."""
        if value is None or isinstance(value, bool) or type(value) in (str, float):
            return value
        if isinstance(value, int):
            return int(value) if abs(value) < 1 << 53 else ["int", hex(value)]
        for base in (str, float):
            if isinstance(value, base):
                return base(value)
        for kind, name in SEQUENCES.items():
            if isinstance(value, kind):
                return [name, [self.encode(item) for item in value]]
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(item)] for key, item in value.items()]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, bytes | bytearray):
            return ["bytes", value.hex()]
        if isinstance(value, range):
            return ["range", [self.encode(part) for part in (value.start, value.stop, value.step)]]
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return ["type", value.__name__]
        if isinstance(value, Remote):
            return ["yours", value._ref]
        if "getattr" not in self.operations and not callable(value):
            raise TypeError(f"a {type(value).__name__} cannot be sent to the program")
        for ref, known in enumerate(self.objects):
            if known is value:
                return ["mine", ref]
        self.objects.append(value)
        return ["mine", len(self.objects) - 1]

    def decode(self, data: object) -> object:
        if not isinstance(data, list):
            return data
        tag, body = data
        if tag in SEQUENCE_OF:
            return SEQUENCE_OF[tag](self.decode(item) for item in body)
        if tag == "dict":
            return {self.decode(key): self.decode(item) for key, item in body}
        if tag == "mine":
            return self.remotes.setdefault(body, Remote(self, body))
        if tag == "yours":
            return self.objects[body]
        if tag == "range":
            return range(*map(self.decode, body))
        if tag == "type" and isinstance(found := getattr(builtins, body), type):
            return found
        return {"int": lambda: int(body, 16), "complex": lambda: complex(*body), "bytes": lambda: bytes.fromhex(body)}[
            tag
        ]()

    def request(self, operation: str, ref: int, args: tuple = (), kwargs: dict | None = None) -> object:
        """Have the other end do something. Raises what it raised, if that is a built-in exception."""
        self.send([operation, ref, self.encode(args), self.encode(kwargs or {})])
        while (answer := self.receive())[0] not in ("return", "raise"):
            self.serve(answer)  # the program calls a function that the test passed to it
        if answer[0] == "return":
            for mine, changed in zip(args, self.decode(answer[2]) if answer[2] else ()):
                if isinstance(mine, list):  # sorted in place, say
                    mine[:] = changed
                elif isinstance(mine, dict | set):
                    mine.clear()
                    mine.update(changed)
            return self.decode(answer[1])
        error, kind = RuntimeError(f"{answer[1]}: {answer[2]}"), getattr(builtins, str(answer[1]), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # UnicodeDecodeError wants five arguments
                error = kind(answer[2])
        raise error

    def serve(self, message: list) -> None:
        """Do one thing for the other end and answer with its value, its arguments if changed, or its exception."""
        try:
            operation, ref, args, kwargs = message
            if operation not in self.operations:
                raise PermissionError(f"{operation} is not offered")
            values = self.decode(args)
            result = OPERATIONS[operation](self.objects[ref], *values, **self.decode(kwargs))
            after = self.encode(values)
            self.send(["return", self.encode(result), after if after != args else None])
        except Cut:
            raise
        except BaseException as error:  # whatever a program raises, SystemExit too, is its answer
            self.send(["raise", type(error).__name__, str(error)[:500]])
