"""The pipe between harness and program: calls by reference, results as plain data. See `inner`."""

import json
import operator
import os
import select
import time

from wire import LENGTH, MESSAGE_LIMIT, adopt, decode, derived, encode, is_known, known, rebuilt


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
        return self._peer.request("bool", self._ref) is True

    def __str__(self) -> str:
        return str(self._peer.request("str", self._ref))


OPERATIONS = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "bool": bool,
}


class Peer:
    """One end of the pipe. ``operations``: what the other end may do to objects of this end."""

    def __init__(self, read: int, write: int, operations: tuple[str, ...], deadline: float = float("inf")) -> None:
        self.read, self.write, self.operations, self.deadline = read, write, operations, deadline
        self.objects: list[object] = []  # exported; kept alive, so that a ref stays valid
        self.remotes: dict[int, Remote] = {}
        self.errors: dict[int, type[BaseException]] = {}  # classes that stand for the other end's exception classes
        self.given: list[
            object
        ] = []  # arguments of the call that is being made or answered: a result may be one of them

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
        """Plain data as tagged JSON, see `wire`; a callable or, from the program, any object as a reference."""
        for place, argument in enumerate(self.given):
            if argument is value:
                return ["given", place]
        return encode(value, self.encode, self._refer)

    def _refer(self, value: object) -> object:
        if isinstance(value, Remote):
            return ["yours", value._ref]
        if isinstance(value, BaseException):
            return ["exception", self._describe(value)]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["error", self._lineage(value)]
        if "getattr" not in self.operations and not callable(value):
            raise TypeError(f"a {type(value).__name__} cannot be sent to the program")
        return ["mine", self._export(value)]

    def _export(self, value: object) -> int:
        for ref, object_ in enumerate(self.objects):
            if object_ is value:
                return ref
        self.objects.append(value)
        return len(self.objects) - 1

    def decode(self, data: object) -> object:
        return decode(data, self._resolve)

    def _resolve(self, tag: str, body: object) -> object:
        if tag == "mine":
            return self.remotes.setdefault(body, Remote(self, body))
        if tag == "yours":
            return self.objects[body]
        if tag == "given":
            return self.given[body]
        if tag == "error":
            return self._class(body)
        if tag == "exception":
            return self._exception(body)
        raise ValueError(f"{tag} is no value")

    def _lineage(self, kind: type[BaseException]) -> list:
        """The classes of an exception down to the first that both ends have: what a test can catch it by."""
        lineage = []
        for base in kind.__mro__:
            if is_known(base):
                return [*lineage, [base.__module__, base.__qualname__]]
            theirs = next((ref for ref, error in self.errors.items() if error is base), None)
            lineage.append(["yours", theirs] if theirs is not None else [self._export(base), base.__name__])
        return lineage

    def _class(self, lineage: list) -> type[BaseException]:
        *own, base = lineage
        kind = known(*base)
        for ref, name in reversed(own):
            kind = self.objects[name] if ref == "yours" else self.errors.setdefault(ref, derived(str(name), kind))
        return kind

    def _describe(self, error: BaseException) -> list:
        """Class, arguments, attributes and text of an exception; without what cannot be sent."""
        parts = []
        known_here = is_known(type(error))  # then what its constructor takes is known too: an OSError's file name, say
        for value in (list(error.__reduce__()[1] if known_here else error.args), vars(error)):
            try:
                parts.append(self.encode(value))
            except (TypeError, ValueError, RecursionError):
                parts.append(self.encode([str(error)[:500]] if isinstance(value, list) else {}))
        return [self._lineage(type(error)), *parts, str(error)[:500]]

    def _exception(self, body: list) -> BaseException:
        lineage, args, attributes, text = body
        return rebuilt(self._class(lineage), tuple(self.decode(args)), self.decode(attributes), text)

    def request(self, operation: str, ref: int, args: tuple = (), kwargs: dict | None = None) -> object:
        """Have the other end do something. Raises what it raised."""
        values, outer = [list(args), dict(kwargs or {})], self.given
        self.given = []
        self.send([operation, ref, *map(self.encode, values)])
        while (answer := self.receive())[0] not in ("return", "raise"):
            self.serve(answer)  # the program calls a function that the test passed to it
        self.given = [*values[0], *values[1].values()]
        try:
            if answer[2] is not None:
                adopt(values, self.decode(answer[2]))
            if answer[0] == "return":
                return self.decode(answer[1])
            raise self._exception(answer[1])
        finally:
            self.given = outer

    def serve(self, message: list) -> None:
        """Do one thing for the other end and answer with its value or its exception, and its arguments if changed."""
        outer, self.given, given, after = self.given, [], [], None
        try:
            operation, ref, *sent = message
            if operation not in self.operations:
                raise PermissionError(f"{operation} is not offered")
            values, named = map(self.decode, sent)
            given = [*values, *named.values()]
            try:
                kind, result = "return", OPERATIONS[operation](self.objects[ref], *values, **named)
            except Cut:
                raise
            except BaseException as error:  # whatever a program raises, SystemExit too, is its answer
                kind, result = "raise", error
            changed = [self.encode(values), self.encode(named)]
            after = ["list", changed] if changed != sent else None
            self.given = given
            self.send([kind, self.encode(result) if kind == "return" else self._describe(result), after])
        except Cut:
            raise
        except BaseException as error:  # what cannot be sent
            self.given = []
            self.send(["raise", self._describe(error), None])
        finally:
            self.given = outer
