"""The worker of `maths`: judges equivalence with math-verify. Runs as a script, so that it never imports torch.

The script imports sympy once, then forks a child that serves requests and replaces it whenever it dies: a call that
hangs or eats memory costs its caller one killed child, and the next child is there within milliseconds.
"""

import json
import os
import resource
import signal
import struct
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # for `equivalence`, without the package and its torch
REQUEST = struct.Struct("<Ii")  # length of the JSON [gold, answer], two trees of `grammar`, and the request number
# b"R", pid, signal that ended the child before: a child is ready; b"V", 1 equal | 0 not | -1 failed, request number
REPLY = struct.Struct("<cii")
CPU_LIMIT = 1.0  # seconds of processor time for one comparison; then SIGPROF ends the child


def equivalent(gold: list, answer: list) -> int:
    """1 if equal, 0 if not, -1 if math-verify failed. The gold answer comes first: the relation is not symmetric."""
    from equivalence import Undefined, equal

    try:
        return int(equal(gold, answer))
    except (Undefined, ZeroDivisionError):
        return 0
    except Exception:  # whatever arithmetic on arbitrary trees raises, MemoryError too: counted as failed by the owner
        return -1


def read_request(data: bytearray) -> tuple[int, bytes]:
    """Number and body of the next request; ``data`` keeps what was read beyond it.

    In one read, as a rule: a child that is killed then leaves no half request to its successor.
    """
    while len(data) < REQUEST.size or len(data) < (end := REQUEST.size + REQUEST.unpack_from(data)[0]):
        if not (part := os.read(0, 1 << 20)):
            os._exit(0)  # the owner closed the pipe or is gone
        data += part
    number, body = REQUEST.unpack_from(data)[1], bytes(data[REQUEST.size : end])
    del data[:end]
    return number, body


def reply(kind: bytes, value: int, number: int) -> None:
    """Answer the owner. If it is gone, end, and the server with this child (another one would fare no better)."""
    try:
        os.write(REPLIES, REPLY.pack(kind, value, number))
    except BrokenPipeError:
        os._exit(0)


def child(memory_mb: int, ended_by: int) -> None:
    """Serve requests until killed. ``ended_by``: the signal that killed the child before, 0 for the first."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply(b"R", os.getpid(), ended_by)
    data = bytearray()
    while True:
        request, body = read_request(data)
        gold, answer = json.loads(body)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
        verdict = equivalent(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(b"V", verdict, request)


if __name__ == "__main__":
    REPLIES = os.dup(1)  # whatever libraries print goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:] = [*json.loads(sys.argv[2]), sys.path[-1]]  # the owner's
    equivalent(
        ["symbol", "x"], ["+", ["symbol", "x"], ["number", "0"]]
    )  # imports and warms up what every child then shares
    status = 0
    while True:
        if (pid := os.fork()) == 0:
            child(int(sys.argv[1]), os.WTERMSIG(status))
        if (status := os.waitpid(pid, 0)[1]) == 0:
            sys.exit()
