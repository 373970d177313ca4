"""Values keep their meaning between a program and its tests."""

import pytest
from program_cases import (
    box_fixture,  # noqa: F401
    isolated,
)

PROGRAM = """
import collections, datetime, decimal, enum, fractions, itertools, json, pathlib, uuid
Point = collections.namedtuple("Point", "x y")
class Mine(ValueError):
    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code
class Other(Mine):
    pass
class Colour(enum.Enum):
    RED = 1
class Empty:
    def __len__(self): return 0
def value(name): return VALUES[name]
def same(x): return x
def kind(x): return type(x).__name__
def fail(what):
    if what == "json": json.loads("{")
    if what == "key": {}["k"]
    if what == "index": [][1]
    if what == "mine": raise Mine(5)
    if what == "other": raise Other(6)
    if what == "decimal": decimal.Decimal(1) / 0
    if what == "file": open("no such file")
    if what == "exit": raise SystemExit(3)
    if what == "stop": raise StopIteration(7)
    if what == "unicode": b"\\xff".decode()
    if what == "two": raise ValueError(1, [2, {"a": fractions.Fraction(1, 2)}])
    raise TypeError(what)
def change(*args, **kwargs):
    for x in [*args, *kwargs.values()]:
        if isinstance(x, tuple): x = x[0]
        if isinstance(x, bytearray): x[:] = b"changed"
        elif isinstance(x, dict): x["new"] = 1
        elif isinstance(x, set): x.add(9)
        elif isinstance(x, list) and x and isinstance(x[0], list): x[0].append(9)
        elif isinstance(x, (list, collections.deque)): x.append(9)
def change_and_fail(x): x.append(1); raise KeyError("k")
def first(x): return x
VALUES = {
    "fraction": fractions.Fraction(1, 2), "decimal": decimal.Decimal("0.10"), "date": datetime.date(2024, 2, 29),
    "datetime": datetime.datetime(2024, 2, 29, 12, 30, 1, 5), "delta": datetime.timedelta(days=-1, seconds=5),
    "aware": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "time": datetime.time(1, 2), "counter": collections.Counter("aab"), "ordered": collections.OrderedDict(b=1, a=2),
    "default": collections.defaultdict(list, {1: [2]}), "deque": collections.deque([1, 2], maxlen=2),
    "keys": {}.keys(), "some keys": {1: 2}.keys(), "values": {1: 2}.values(), "items": {1: 2}.items(),
    "bytearray": bytearray(b"ab"), "point": Point(1, 2), "uuid": uuid.UUID(int=5), "path": pathlib.PurePath("a/b"),
    "slice": slice(1, 2), "empty": Empty(), "red": Colour.RED, "ellipsis": ...,
    "nested": [{fractions.Fraction(1, 3): (decimal.Decimal(1),)}],
    "lambda": collections.defaultdict(lambda: 5), "error": Mine(5), "match": itertools.count(3), "big": 10**400,
    "nan": decimal.Decimal("NaN"),
}
"""  # fmt: skip
NAMES = (
    "Point",
    "Mine",
    "Other",
    "Colour",
    "Empty",
    "value",
    "same",
    "kind",
    "fail",
    "change",
    "change_and_fail",
    "first",
)
IMPORTS = "import collections, datetime, decimal, fractions, json, pathlib, uuid\n"
CROSSING = [
    "assert value('fraction') == fractions.Fraction(1, 2) == 0.5 and value('fraction').denominator == 2",
    "assert value('decimal') == decimal.Decimal('0.1') and str(value('decimal')) == '0.10'",
    "assert value('date') == datetime.date(2024, 2, 29) and value('date').year == 2024",
    "assert value('datetime') == datetime.datetime(2024, 2, 29, 12, 30, 1, 5)",
    "assert value('aware').utcoffset() == datetime.timedelta(hours=2)",
    "assert value('time') == datetime.time(1, 2) and value('delta') == datetime.timedelta(days=-1, seconds=5)",
    "assert value('counter') == {'a': 2, 'b': 1} and value('counter')['missing'] == 0",
    "assert value('counter').most_common(1) == [('a', 2)]",
    "assert value('ordered') == collections.OrderedDict(b=1, a=2) != collections.OrderedDict(a=2, b=1)",
    "d = value('default'); d[7].append(1); assert d == {1: [2], 7: [1]}",
    "assert value('lambda')['x'] == 5",
    "d = value('deque'); d.append(3); assert d == collections.deque([2, 3])",
    "assert not value('keys') and value('some keys') == {1} and list(value('items')) == [(1, 2)]",
    "assert list(value('values')) == [2] and len(value('values')) == 1",
    "assert isinstance(value('bytearray'), bytearray) and value('bytearray') == b'ab'",
    "assert repr(value('point')) == 'Point(x=1, y=2)'",
    (
    "p = value('point'); assert p == (1, 2) and p.x == 1 and "
        "p._fields == ('x', 'y') and p._asdict() == {'x': 1, 'y': 2}"
    ),
    "assert value('uuid') == uuid.UUID(int=5) and value('path') == pathlib.PurePath('a/b')",
    "assert value('slice') == slice(1, 2) and value('ellipsis') is ...",
    "assert not value('empty') and value('red')",
    "assert value('red') is Colour.RED",
    "assert value('nested') == [{fractions.Fraction(1, 3): (decimal.Decimal(1),)}]",
    "assert value('big') == 10**400 and value('nan') != value('nan')",
    "assert isinstance(value('error'), ValueError) and value('error').code == 5",
    "assert next(value('match')) == 3",
    *(
        f"x = {x}; assert same(x) == x and kind(x) == type(x).__name__"
        for x in (
            *("fractions.Fraction(1, 3)", "decimal.Decimal('1.5')", "datetime.date(2000, 1, 1)", "b'x'"),
            *("collections.OrderedDict(a=1)", "collections.deque([1])", "bytearray(b'x')", "datetime.timedelta(1)"),
            "collections.Counter('aa')",
            *("frozenset({1})", "slice(3)", "range(3)", "collections.defaultdict(int, a=1)", "1j", "uuid.UUID(int=1)"),
        )
    ),
    # exceptions: class hierarchy, arguments, attributes
    (
        "try: fail('json')\n"
        "except ValueError as e: assert isinstance(e, json.JSONDecodeError) and e.pos == 1 and 'line 1' in str(e)\n"
        "else: assert 0"
    ),
    "try: fail('key')\nexcept LookupError as e: assert e.args[0] == 'k' and type(e) is KeyError\nelse: assert 0",
    "try: fail('decimal')\nexcept ArithmeticError as e: assert isinstance(e, decimal.DivisionByZero)\nelse: assert 0",
    (
        "try: fail('file')\n"
        "except OSError as e: assert (e.errno, e.filename) == (2, 'no such file') and type(e) is FileNotFoundError\n"
        "else: assert 0"
    ),
    "try: fail('exit')\nexcept SystemExit as e: assert e.code == 3\nelse: assert 0",
    "try: fail('unicode')\nexcept UnicodeDecodeError as e: assert e.object == b'\\xff' and e.reason\nelse: assert 0",
    (
        "try: fail('two')\n"
        "except ValueError as e: assert e.args == (1, [2, {'a': fractions.Fraction(1, 2)}])\nelse: assert 0"
    ),
    "try: fail('stop')\nexcept StopIteration as e: assert e.value == 7\nelse: assert 0",
    (
        "try: fail('mine')\n"
        "except Mine as e: assert e.code == 5 and str(e) == 'code 5' and isinstance(e, ValueError)\nelse: assert 0"
    ),
    "try: fail('other')\nexcept Mine as e: assert isinstance(e, Other) and e.code == 6\nelse: assert 0",
    "try: fail('mine')\nexcept Other: assert 0\nexcept ValueError: pass\nelse: assert 0",
    "assert issubclass(Other, Mine) and issubclass(Mine, ValueError) and not issubclass(Mine, KeyError)",
    "try: fail('x')\nexcept ValueError: assert 0\nexcept TypeError as e: assert e.args == ('x',)\nelse: assert 0",
    # changes in place
    "x = [1]; change(x); assert x == [1, 9]",
    "x = [1]; change(items=x); assert x == [1, 9]",
    "x = bytearray(b'ab'); change(x); assert x == b'changed'",
    "x = bytearray(b'ab'); change(data=x); assert x == b'changed'",
    "x = {}; change(x); assert x == {'new': 1}",
    "x = collections.Counter(); change(x); assert x == {'new': 1} and type(x) is collections.Counter",
    "x = collections.OrderedDict(); change(a=x); assert x == {'new': 1}",
    "x = collections.deque([1]); change(x); assert list(x) == [1, 9]",
    "x = {1}; change(x); assert x == {1, 9}",
    "x = [1]; change((x,)); assert x == [1, 9]",
    "x = [[1]]; y = x[0]; change(x); assert x == [[1, 9]] and y == [1, 9]",
    "x = [];\ntry: change_and_fail(x)\nexcept KeyError: pass\nassert x == [1]",
    "x = [1]; assert first(x) is x",
    "x = {'a': []}; assert first(x) is x and x == {'a': []}",
]  # fmt: skip


@isolated
@pytest.mark.parametrize("test", CROSSING)
def test_values_keep_their_meaning(box, test):
    result = box.test(PROGRAM, (test,), setup=IMPORTS, exports=NAMES)
    assert result.passed == (True,), result


LIES = {
    "a fraction that equals everything": (
        "class X(fractions.Fraction):\n"
        " __eq__ = lambda s, o: True\ndef f(): return X(7)"
    ),
    "a date that equals everything": (
        "class X(datetime.date):\n __eq__ = lambda s, o: True\n"
        "def f(): return X(2000, 1, 1)"
    ),
    "a Counter that equals everything": (
        "class X(collections.Counter):\n"
        " __eq__ = lambda s, o: True\ndef f(): return X()"
    ),
    "a namedtuple that equals everything": (
        "class X(tuple):\n _fields = ('a',)\n"
        " __eq__ = lambda s, o: True\ndef f(): return X((1,))"
    ),
    "fields that are code": "class X(tuple):\n _fields = ('__eq__', 'a=1): exit()', 3)\ndef f(): return X((1, 2, 3))",
    "an exception class of another module": (
        "class X(Exception): pass\n"
        "X.__module__, X.__qualname__ = 'os', 'system'\ndef f(): raise X('true')"
    ),
    "a made-up exception class": (
        "class X(Exception): pass\n"
        "X.__module__, X.__qualname__ = 'json.decoder', 'scanner'\ndef f(): raise X(1)"
    ),
    "an error that equals everything": "class X(ValueError):\n __eq__ = lambda s, o: True\ndef f(): return X()",
    "a decimal that never ends": "def f(): return decimal.Decimal('1e999999999999999999')",
    "a made-up tag": (
        "import os, struct, json\ndef f():\n d = json.dumps(['return', ['exec', ['1']], None]).encode()\n"
        " os.write(61, struct.pack('<I', len(d)) + d)"
    ),
    "a reference to nothing": (
        "import os, struct, json\ndef f():\n d = json.dumps(['return', ['given', 99], None]).encode()\n"
        " os.write(61, struct.pack('<I', len(d)) + d)"
    ),
    "numbers that are no numbers": "class X(fractions.Fraction):\n numerator = denominator = 0\ndef f(): return X(1)",
}  # fmt: skip


@isolated
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_about_values_pass_no_test(box, lie):
    source = f"import collections, datetime, decimal, fractions\n{lie}"
    tests = ("assert f() == 1234567", "assert 1234567 in [f()]", "assert f() == fractions.Fraction(1, 3)")
    assert box.test(source, tests, setup="import fractions", exports=("f",), timeout=2.0).passed == (False,) * 3
    assert box.run("print(1)").stdout == "1\n"
