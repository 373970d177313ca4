"""Pools of every backend that this host has, and what every one of them must contain."""

import os
import textwrap
import time
from collections.abc import Callable

import pytest
from sandbox_attacks import ESCAPES, FAKES, SECRET

from espo_lightning.tasks.sandbox import run as sandbox
from espo_lightning.tasks.sandbox.run import Sandbox, SandboxUnavailable

AVAILABLE = [backend for backend in sandbox.BACKENDS if not sandbox.probe(backend)]


@pytest.fixture(name="box", scope="module", params=AVAILABLE or ["none"])
def box_fixture(request):
    """A pool of two runners. On a host without any backend each test checks that model code is refused instead."""
    if request.param == "none":
        with pytest.raises(SandboxUnavailable, match="allow_unsafe"):
            Sandbox()
        pytest.skip("no isolation on this host: the refusal was checked instead")
    pool = Sandbox(2, backend=request.param)
    yield pool
    pool.close()


def gone(left: Callable[[], set[int]]) -> set[int]:
    """The processes that are left, once there are none, or after a minute."""
    deadline = time.monotonic() + 60
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def body(source: str) -> str:
    return textwrap.dedent(source)


def assert_not_faked(box, fake: str) -> None:
    """No test passes, and the pool goes on."""
    tests = (
        "assert f(1) == 1234567",
        "assert all([f(1) == 1234567])",
        "assert isinstance(f(1), int) and f(1) > 9**9",
        "assert 1234567 in f(1)",
    )
    result = box.test(body(FAKES[fake]), tests, exports=("f",), timeout=2.0)
    assert result.passed == (False,) * 4, result
    assert box.run("print(1)").stdout == "1\n"


def assert_contained(box, escape: str, monkeypatch) -> None:
    """It ends as it must, nothing of it is left, and the pool goes on."""
    monkeypatch.setenv("ESPO_TEST_SECRET", SECRET)
    source, statuses, expected = ESCAPES[escape]
    timeout = 1.5 if "timeout" in statuses else 30.0  # others end by themselves, late on a loaded machine
    result = box.run(source.replace("PARENT", str(os.getpid())), timeout=timeout, memory_mb=256)
    assert result.status in statuses, result
    assert "DONE" not in result.stdout
    assert expected in result.stdout
    assert len(result.stdout) <= 70_000
    assert result.seconds < timeout + 5
    assert box.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"  # the pool works, nothing of the job is left
