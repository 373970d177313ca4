"""The worker of `gym`: scores answers with reasoning-gym's own scorers. Runs as a script.

Some of these scorers pass the answer to ``eval`` or to sympy's parser, which is ``eval`` again. Here the first reads
literals only and the second knows arithmetic only, so that no text of a model is ever executed; and every answer is
scored in a forked child that a limit of processor time and memory ends.
"""

import ast
import json
import os
import pickle
import re
import resource
import struct
import sys

LENGTH = struct.Struct("<I")  # of a request, a pickle of (name, options, item, answer); its owner is trusted
REPLY = struct.Struct("<d")  # the score, or one of these
FAILED, TIMEOUT = -1.0, -2.0
CPU_LIMIT, MEMORY_MB = 2, 2048  # seconds of processor time and megabytes for one answer
FUNCTIONS = set("sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi".split())  # noqa: SIM905
# modules of reasoning-gym whose scorers pass answers to eval, and to a parser of theirs
EVALUATE = ("algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens")
PARSE = ("games.countdown", "games.puzzle24")


def arithmetic_only(parse):
    """sympy's parser for texts of numbers, operators, single letters and elementary functions; others raise."""

    def guarded(text, *args, **kwargs):
        names = re.findall(r"[^\W\d]\w*", text)
        if re.search(r"[^\w\s+*/^().-]|[^\W\d]\s*\.|\)\s*\.|\.\s*[^\W\d]", text) or any(
            len(name) > 1 and name not in FUNCTIONS for name in names
        ):
            raise ValueError("no arithmetic")
        return parse(text, *args, **kwargs)

    return guarded


def score(name: str, options: str, item: dict, answer: str) -> float:
    """What reasoning-gym gives an answer to an item of a data set."""
    from reasoning_gym.factory import create_dataset

    return float(create_dataset(name, seed=0, size=1, **json.loads(options)).score_answer(answer, item))


def prepare() -> None:
    """Import what every child then shares, and take its teeth out."""
    import reasoning_gym  # noqa: F401
    import sympy

    for name in EVALUATE:
        sys.modules[f"reasoning_gym.{name}"].eval = ast.literal_eval  # calls find it before the built-in one
    guarded = arithmetic_only(sympy.parse_expr)
    for module in (sympy, *(sys.modules[f"reasoning_gym.{name}"] for name in PARSE)):
        module.parse_expr = guarded


def child(reply: int, request: bytes) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        value = score(*pickle.loads(request))
    except Exception:  # scorers are not total
        value = FAILED
    os.write(reply, REPLY.pack(value))
    os._exit(0)


def serve(reply: int) -> None:
    """Answer requests of standard input until its owner closes it."""
    os.write(reply, REPLY.pack(0.0))  # ready
    with os.fdopen(0, "rb") as requests:
        while len(size := requests.read(LENGTH.size)) == LENGTH.size:
            request = requests.read(LENGTH.unpack(size)[0])
            if (pid := os.fork()) == 0:
                child(reply, request)
            if status := os.waitpid(pid, 0)[1]:
                cpu = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (9, 24)  # SIGKILL, SIGXCPU
                os.write(reply, REPLY.pack(TIMEOUT if cpu else FAILED))


if __name__ == "__main__":
    replies = os.dup(1)  # whatever libraries print goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    prepare()
    serve(replies)
