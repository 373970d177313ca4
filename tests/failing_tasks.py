"""A task that fails in one process, for the tests of several processes."""

import os
import signal
import time
from dataclasses import dataclass
from functools import partial

from espo_lightning import Problem, Task


def verify(mode: str, text: str) -> dict[str, float]:
    if mode == "sleep":
        time.sleep(1000)
    return {"reward": text.count("a") / 4, "exact": 0.0}


@dataclass(frozen=True)
class Failing(Task):
    """Problems that are harmless until the third batch of two, where one process meets something else.

    Args:
        mode: "raise", "sleep" (in the verifier), "kill", "interrupt" (Ctrl-C) or "none".
        rank: of the process.
    """

    mode: str = "none"
    rank: int = 1

    def problem(self, split: str, seed: int, index: int) -> Problem:
        bad = split == "train" and index >= 4 and os.environ.get("LOCAL_RANK", "0") == str(self.rank)
        if bad and self.mode == "raise":
            raise KeyError("the third batch")
        if bad and self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if bad and self.mode == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return Problem("abc", partial(verify, self.mode if bad else "none"), "aaaa")
