"""reasoning-gym's procedural data sets as tasks: more than a hundred, with its own generators and scorers.

Stojanovski et al. 2025 (arXiv:2505.24760); an optional dependency, the extra ``reasoning-gym``.
"""

import atexit
import contextlib
import difflib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from espo_lightning.tasks.base import Problem, Task, Verdict, VerifierUnavailable, answer_part, rng
from espo_lightning.tasks.gym_inner import LENGTH, REPLY, TIMEOUT

INSTRUCTION = "Give your final answer between <answer> and </answer>, in the form that the question asks for."
# data sets that walk over sets of texts, whose order is that of Python's hashes
HASHED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
CHUNK, ATTEMPTS = 1024, 32  # items of one generator, and of these candidates for one problem
TEXT_LIMIT = 20_000  # characters of an answer that are scored


@lru_cache(maxsize=16)
def generator(name: str, options: str, seed: int):
    """A data set of `CHUNK` items. ``options``: JSON, so that this can be cached.

    Raises:
        ValueError: no such data set, or not with these options; reasoning-gym is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ReasoningGym needs the package reasoning-gym ({error}): pip install 'espo-lightning[reasoning-gym]'"
        ) from error
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4)) or "mini_sudoku"
        raise ValueError(f"name {name!r} is none of the {len(DATASETS)} data sets of reasoning-gym, such as {near}")
    try:
        return create_dataset(name, seed=seed % 2**32, size=CHUNK, **json.loads(options))
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"options {options} do not suit {name!r} of reasoning-gym: {error}") from error


def verify(name: str, options: str, item: dict, reward: str, text: str) -> Verdict:
    """Score an answer, the last tag's or else the whole text, with reasoning-gym's scorer of the data set.

    score: what it says, 0 to 1; many data sets pay for parts. An empty answer gets 0, for which some pay a little.
    exact: a score of 1. failed: the scorer raised or met a limit, timeout: that of time. The reward is the score, or
    with ``reward`` "exact" that.
    """
    answer = answer_part(text).strip()[:TEXT_LIMIT]
    score = _scorers().score(name, options, item, answer) if answer else 0.0
    failed, timeout = float(score < 0), float(score == TIMEOUT)
    score = min(max(score, 0.0), 1.0)
    exact = float(score == 1)
    gained = exact if reward == "exact" else score
    return {"reward": gained, "exact": exact, "score": score, "failed": failed, "timeout": timeout}


@dataclass(frozen=True)
class ReasoningGym(Task):
    """A data set of reasoning-gym by its name. A question belongs to either split, by a hash of its text.

    Args:
        name: such as "mini_sudoku"; ``reasoning_gym.factory.DATASETS`` has them all.
        options: of its configuration, such as {"min_empty": 4}.
        prompt: "instruct" (asks for answer tags) or "compact" (the question alone).
        reward: "score" (reasoning-gym's, with parts) or "exact" (all or nothing).

    Raises:
        ValueError: see `generator`; a data set whose questions depend on Python's hash seed, if that is not set.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    prompt: Literal["instruct", "compact"] = "instruct"
    reward: Literal["score", "exact"] = "score"

    def __post_init__(self):
        if taken := {"seed", "size"} & self.options.keys():
            raise ValueError(f"options: {taken.pop()!r} is chosen by this library, leave it out")
        generator(self.name, self._options, 0)
        if self.name in HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"{self.name!r} of reasoning-gym draws other questions in every process: set PYTHONHASHSEED=0 around it"
            )

    @property
    def _options(self) -> str:
        return json.dumps(self.options, sort_keys=True)

    def check_host(self) -> None:
        _scorers().check()

    def _item(self, split: str, seed: int, index: int) -> dict[str, Any]:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        first = rng("reasoning gym", self.name, seed).randrange(2**30)
        chunk, row = divmod(index, CHUNK // ATTEMPTS)
        # items of a data set depend on the sum of its seed and their number only
        candidates = [(first + chunk * CHUNK, row * ATTEMPTS + i) for i in range(ATTEMPTS)]
        candidates += [(first + 2**31 + index * CHUNK, i) for i in range(CHUNK)]
        for start, number in candidates:
            item = generator(self.name, self._options, start)[number]
            held_out = crc32(item["question"].encode()) % 8 == 0
            if held_out == (split == "test"):
                return item
        raise ValueError(f"{self.name!r} has too few different questions for a {split!r} split: change its options")

    def problem(self, split: str, seed: int, index: int) -> Problem:
        item = self._item(split, seed, index)
        question, answer = item["question"], item["answer"] or ""  # some have no answer of their own, only a scorer
        if self.prompt == "instruct":
            question, answer = f"{question}\n\n{INSTRUCTION}", answer and f"<answer>\n{answer}\n</answer>"
        return Problem(question, partial(verify, self.name, self._options, item, self.reward), answer)


class Scorers:
    """A pool of `gym_inner` processes that any number of threads may call, one for each CPU."""

    def __init__(self) -> None:
        self.size = min(8, os.cpu_count() or 1)
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(self.size):
            self._idle.put(None)  # started when first needed

    def score(self, name: str, options: str, item: dict, answer: str) -> float:
        """The score, or `FAILED` or `TIMEOUT`. Raises VerifierUnavailable if no worker can be had."""
        body = pickle.dumps((name, options, item, answer))
        worker = self._idle.get()
        try:
            for attempts_left in (1, 0):
                try:
                    worker = worker or _start()
                    worker.stdin.write(LENGTH.pack(len(body)) + body)
                    return _reply(worker)
                except OSError as error:  # it was killed while idle, say: one more try, with a new one
                    if worker is not None:
                        _end(worker)
                        worker = None
                    if not attempts_left:
                        raise VerifierUnavailable(f"no worker for reasoning-gym: {error}") from error
        finally:
            self._idle.put(worker)

    def check(self) -> None:
        """Start a worker. Raises VerifierUnavailable if that does not work here."""
        worker = self._idle.get()
        try:
            worker = worker or _start()
        except OSError as error:
            raise VerifierUnavailable(f"no worker for reasoning-gym: {error}") from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all idle workers. The pool stays usable."""
        for _ in range(self.size):
            if (worker := self._idle.get()) is not None:
                _end(worker)
        for _ in range(self.size):
            self._idle.put(None)


def _start() -> subprocess.Popen:
    """A worker that has imported reasoning-gym. Raises OSError."""
    script = str(Path(__file__).with_name("gym_inner.py"))
    environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
    worker = subprocess.Popen([sys.executable, "-P", script], env=environment, **pipes)
    _reply(worker)
    return worker


def _reply(worker: subprocess.Popen) -> float:
    data = worker.stdout.read(REPLY.size)
    if len(data) < REPLY.size:
        raise OSError(f"it ended with code {worker.wait()}")
    return REPLY.unpack(data)[0]


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    with contextlib.suppress(OSError):
        worker.stdin.close()
    worker.stdout.close()


_pools: dict[int, Scorers] = {}
_lock = threading.Lock()


def _close(pid: int) -> None:
    if pid == os.getpid():  # a forked child leaves its parent's workers alone
        _pools[pid].close()


def _scorers() -> Scorers:
    """The pool of this process, closed at exit."""
    with _lock:
        if os.getpid() not in _pools:
            _pools[os.getpid()] = Scorers()
            atexit.register(_close, os.getpid())
        return _pools[os.getpid()]
