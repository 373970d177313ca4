"""The inside of the sandbox: the processes that run and judge a program. Only ever runs as a script of its own.

``sandbox.py`` starts this file as a *runner*: a warm, clean Python that holds no secrets. For every job it forks

    runner -> cage (new namespaces) -> harness (pid 1 there) -> program (the model's code)

The harness executes the tests, the program executes the model's code, and only values cross the pipe between them: a
function under test is a proxy whose call is sent to the program and whose result comes back as plain data. The program
is forked before the harness reads the job, so neither the tests nor the expected values are ever in its memory, and
the channel on which verdicts leave is not among its file descriptors. Standard library only.
"""

import contextlib
import importlib
import json
import math
import os
import random
import select
import signal
import struct
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for these imports: programs must not find this folder
from isolation import (
    LAYERS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    TASK_LIMIT,
    drop_capabilities,
    enter_namespaces,
    landlock,
    limit_tasks,
    mount_private,
    prctl,
    seccomp,
    set_limits,
)
from peer import OPERATIONS, Cut, Peer
from wire import LENGTH, MESSAGE_LIMIT

del sys.path[0], sys.modules["isolation"], sys.modules["peer"], sys.modules["wire"]

HEADER = struct.Struct("<dII")  # seconds for the job, megabytes of memory, bytes of the job; as in sandbox.py
ALIASES = {"np": "numpy"}  # a name that tests use without an import, and its module
COUNT_EVERY = 0.02  # seconds between two looks at how many threads there are
STDOUT_LIMIT = 64 << 10  # bytes of output that are reported


def program_main(read: int, write: int) -> None:
    """The process of the model's code: compiles, executes, then answers calls until it is killed."""
    space: dict[str, object] = {}

    def compile_source(source: str) -> None:
        space["code"] = compile(source, "program.py", "exec", dont_inherit=True)

    def execute(name: str, wanted: list[str]) -> dict[str, object]:
        module = sys.modules[name] = types.ModuleType(name)  # dataclasses look their module up
        try:
            exec(space.pop("code"), module.__dict__)
        except SystemExit as stop:
            if name != "__main__" or stop.code not in (None, 0):
                raise
        finally:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # the program may have closed or replaced it
                sys.stdout.flush()
        return {key: module.__dict__[key] for key in wanted if key in module.__dict__}

    random.seed(0)  # with the fixed hash seed: the same text gets the same verdict
    peer = Peer(read, write, tuple(OPERATIONS))
    peer.objects += [compile_source, execute]
    while True:
        peer.serve(peer.receive())


def stub_numpy() -> types.ModuleType:
    """As much of numpy as the test scripts of HumanEval+ and MBPP+ use; real numpy is not in the sandbox."""
    module = types.ModuleType("numpy")

    def allclose(a: object, b: object, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
        rows = [isinstance(x, list | tuple) for x in (a, b)]
        if all(rows):
            a, b = (x * max(len(a), len(b)) if len(x) == 1 else x for x in (a, b))
            if len(a) != len(b):
                raise ValueError(f"operands could not be broadcast together with shapes ({len(a)},) ({len(b)},)")
            return all(allclose(x, y, rtol, atol, equal_nan) for x, y in zip(a, b))
        if any(rows):  # a number is compared with every element
            return all(
                allclose(x, y, rtol, atol, equal_nan)
                for x, y in ([(x, b) for x in a] if rows[0] else [(a, y) for y in b])
            )
        if a != a or b != b:
            return bool(equal_nan and a != a and b != b)
        if abs(a) == float("inf") or abs(b) == float("inf"):
            return bool(a == b)
        return bool(abs(a - b) <= atol + rtol * abs(b))

    module.allclose = module.isclose = allclose
    module.inf, module.nan, module.pi = math.inf, math.nan, math.pi
    for name in ("ndarray", "float32", "float64"):
        setattr(module, name, type(name, (), {}))
    return module


def harness_main(job: dict, peer: Peer, report) -> None:
    """Execute the tests of ``job`` against the program at the other end; ``report`` each step as it happens."""
    stage = "syntax"
    try:
        peer.request("call", 0, (job["source"],))
        stage = "error"
        found = peer.request("call", 1, ("solution" if job["tests"] else "__main__", job["exports"]))
        report(loaded=True)
        if not job["tests"]:
            return
        stage = "setup"
        sys.modules["numpy"] = stub_numpy()
        # The tests see built-ins and standard modules of their own; from the program only the names they ask for.
        space: dict[str, object] = {"__name__": "tests"}
        for name in job["modules"]:
            space[name] = importlib.import_module(ALIASES.get(name, name))
        space.update((name, value) for name, value in found.items() if name in job["exports"])
        if job["entry_point"]:
            space["candidate"] = found.get(job["entry_point"])
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), space)
        for name in job["exports"]:  # the program's, or none: never what the setup has under that name
            space.pop(name, None)
        space.update((name, value) for name, value in found.items() if name in job["exports"])
        for index, test in enumerate(job["tests"]):
            try:
                exec(compile(test, "test.py", "exec", dont_inherit=True), space)
                report(test=index, passed=True)
            except Cut:
                raise
            except BaseException as error:  # a failed test, whatever it raised, and the next one follows
                report(test=index, passed=False, error=f"{type(error).__name__}: {error}"[:300])
    except Cut as cut:
        report(stopped=cut.reason)
    except BaseException as error:  # the program's own error, or one of the set-up code
        report(stopped=stage, error=f"{type(error).__name__}: {error}"[:300])


def read_job(fd: int, size: int) -> bytes:
    job = bytearray()
    while len(job) < size:
        if not (part := os.read(fd, size - len(job))):
            os._exit(0)  # the owner is gone
        job += part
    return bytes(job)


def cage(mode: str, workdir: str, job_fd: int, size: int, event_fd: int, seconds: float, memory_mb: int) -> None:
    """Isolate this process, fork the program, then be the harness. Never returns."""
    required = {"stdlib": LAYERS, "bwrap": (seccomp,), "unsafe": ()}[mode]  # bwrap has made namespaces and a view
    missing: list[str] = []

    def layer(function, *args: object) -> None:
        try:
            function(*args)
        except OSError as error:
            if function in required:
                raise
            missing.append(f"{function.__name__} ({error.strerror or error})")

    def report(**event: object) -> None:
        os.write(event_fd, json.dumps(event).encode() + b"\n")

    os.setsid()
    try:
        layer(enter_namespaces)
        with contextlib.suppress(OSError):  # after unshare, which clears it
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if child := os.fork():
            os._exit(os.waitpid(child, 0)[1] and 1)  # the first process of the pid namespace lives below
        if not missing:  # only ever in a mount namespace of our own
            layer(mount_private, workdir)
        os.chdir(workdir)
        output = os.open("stdout", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink("stdout")
        null = os.open("/dev/null", os.O_RDWR)
        to_program, from_harness = os.pipe(), os.pipe()  # named by what the program's side does: write / read
        with contextlib.suppress(OSError):
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        if mode != "unsafe":
            with contextlib.suppress(OSError, ValueError):
                limit_tasks()
        layer(landlock, workdir)
        layer(drop_capabilities)
        with contextlib.suppress(OSError):
            prctl(PR_SET_DUMPABLE, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        set_limits(seconds, memory_mb)
        if (child := os.fork()) == 0:
            os.dup2(null, 0), os.dup2(output, 1), os.dup2(output, 2)
            read, write = os.dup2(from_harness[0], 60), os.dup2(to_program[1], 61)
            os.closerange(3, 60)  # the job and the event channel are gone before any code of the model runs
            layer(seccomp)
            program_main(read, write)
        os.close(from_harness[0]), os.close(to_program[1])
        deadline = time.monotonic() + seconds
        job = read_job(job_fd, size)
        layer(seccomp)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        report(ready=True, missing=missing)
        harness_main(json.loads(job), Peer(to_program[0], from_harness[1], ("call",), deadline), report)
        report(stdout=os.pread(output, STDOUT_LIMIT, 0).decode("utf-8", "replace"), done=True)
    except BaseException as error:  # a layer is missing, or the harness itself broke: say so, and let nothing run on
        report(broken=f"{type(error).__name__}: {error}"[:300])
    finally:
        os._exit(0)


def tasks_below(pid: int) -> int:
    """Threads of a process and of its descendants, 0 where there is no /proc."""
    count, found = 0, [pid]
    while found:
        task = f"/proc/{found.pop()}/task"
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            count += os.stat(task).st_nlink - 2
            with open(f"{task}/{task.split('/')[2]}/children") as file:
                found += file.read().split()
    return count


def kill_descendants(group: int) -> None:
    """Kill the job's process group, then adopt and kill until no child is left (the runner is a subreaper)."""
    for kill in (os.killpg, os.kill):  # by number too: it may not have made its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(group, signal.SIGKILL)
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
        except OSError:
            pass  # no /proc here, or the child is gone already; waitpid below knows
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def clean(workdir: str) -> None:
    """Remove what a job left behind; nothing, where the directory was a tmpfs of its own."""
    for entry in list(os.scandir(workdir)):
        if entry.is_dir(follow_symlinks=False):
            importlib.import_module("shutil").rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def runner_main(mode: str, workdir: str) -> None:
    """Serve jobs from stdin to stdout until stdin closes. The job's body is read by the harness, never here."""
    with contextlib.suppress(OSError):
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    jobs, replies, parent = os.dup(0), os.dup(1), os.getppid()
    while True:
        while not select.select([jobs], [], [], 5.0)[0]:
            if os.getppid() != parent:  # the owner died while a fork of it holds the pipe open
                return
        header = b""
        while len(header) < HEADER.size:
            if not (part := os.read(jobs, HEADER.size - len(header))):
                return
            header += part
        seconds, memory_mb, size = HEADER.unpack(header)
        read, write = os.pipe()
        if (group := os.fork()) == 0:
            os.close(read)
            os.close(replies)
            cage(mode, workdir, jobs, size, write, seconds, memory_mb)
        os.close(write)
        events, deadline = bytearray(), time.monotonic() + seconds + 0.5  # the harness itself stops at ``seconds``
        poller = select.poll()
        poller.register(read, select.POLLIN)
        poller.register(jobs, 0)  # reports only that the owner is gone
        while (left := deadline - time.monotonic()) > 0 and tasks_below(group) <= TASK_LIMIT:
            if not (ready := poller.poll(1000 * min(left, COUNT_EVERY))):
                continue
            if ready[0][0] == jobs or not (part := os.read(read, 65536)) or len(events) > MESSAGE_LIMIT:
                break
            events += part
        if tasks_below(group) > TASK_LIMIT:
            events += b'{"stopped": "crash", "error": "too many threads"}\n'
        os.close(read)
        kill_descendants(group)
        clean(workdir)
        os.write(replies, LENGTH.pack(len(events)))
        view = memoryview(events)
        while view:
            view = view[os.write(replies, view) :]


if __name__ == "__main__":
    for warm in ("bisect", "functools", "heapq", "itertools", "math", "re", "string", "typing"):
        importlib.import_module(warm)  # shared by fork with every program that imports them
    runner_main(sys.argv[1], sys.argv[2])
