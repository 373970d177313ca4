"""Small policies, tasks and trainers shared by the tests."""

import os
import random
import re
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from espo_lightning import Decoding, ESPOModule, PolicyGradient, Problem, PromptDataModule, Task, new_policy

# whose failures then show their values, as those of test files do
pytest.register_assert_rewrite("two_processes", *(path.stem for path in Path(__file__).parent.glob("*_cases.py")))
torch.set_num_threads(1)  # many small matrices: threads cost more than they bring, and results stay comparable

FIRST = ("test_distributed", "test_runs")  # the longest files, so that no worker is left with one at the end


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Without -n there is a worker for each core, 2 GB of memory and file; a file's tests keep to one of them.

    So a fixture is made once, and tests of one file never run at the same time. `-n 0` and `-p no:xdist` do without.
    """
    options = config.option
    if not hasattr(options, "numprocesses") or hasattr(config, "workerinput"):
        return
    if options.numprocesses is None and not (options.usepdb or options.tx):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
        files = {argument.split("::")[0] for argument in config.args}
        most = len(files) if all(path.endswith(".py") for path in files) else cores
        options.numprocesses = min(cores, gigabytes // 2, most) if most > 1 else 0
    if options.numprocesses and options.dist == "no":
        options.dist, options.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; and no test for a GPU, whatever else it is, unless -m speaks of gpu.

    A -m on the command line is instead of the suite's own, which leaves them out.
    """
    if not re.search(r"\bgpu\b", config.option.markexpr):
        unasked = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=unasked)
        items[:] = [item for item in items if item not in unasked]
    items.sort(key=lambda item: item.path.stem not in FIRST)


def name_of(value: object) -> str:
    """What a parameter is called: its repr, without addresses of functions, which differ between workers."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", repr(value))


def share_of_a(prompt: str, text: str) -> dict[str, float]:
    share = text.count("a") / 4
    return {"reward": share, "exact": float(share == 1)}


@dataclass(frozen=True)
class Letters(Task):
    """Write "aaaa": any correct policy gradient solves it. Prompts differ in length, so that batches are padded."""

    verify: object = share_of_a

    def problem(self, split: str, seed: int, index: int) -> Problem:
        prompt = string.ascii_lowercase[: 1 + (index + seed) % 3]
        return Problem(prompt, partial(self.verify, prompt), "aaaa")


def small_policy(seed: int = 0):
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, seed=seed)


def small_module(policy=None, **changes) -> ESPOModule:
    """A small module; settings of `PolicyGradient` may stand among its own."""
    decoding = Decoding(length=4, block_length=4, steps=4)
    own = {field.name for field in fields(PolicyGradient)} & changes.keys()
    if own:
        changes["objective"] = PolicyGradient(**{name: changes.pop(name) for name in own})
    settings = {"decoding": decoding, "group_size": 4, "optimizer": partial(torch.optim.Adam, lr=3e-3)} | changes
    return ESPOModule(policy or small_policy(), **settings)


def fit(module, batches: int = 2, task: Task | None = None, seed: int = 0, folder=None, **trainer) -> Trainer:
    """Run some rollouts without any output; the module is trained in place."""
    data = PromptDataModule(
        task or Letters(), batch_size=2, batches=batches, eval_problems=4, eval_batch_size=4, seed=seed
    )
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    } | trainer
    trainer = Trainer(**settings)
    trainer.fit(module, data)
    return trainer


def parameters(module) -> torch.Tensor:
    """All policy parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


def global_states() -> tuple:
    """The states of Python's, NumPy's and torch's global generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def assert_linear(function: Callable[[str], object], text: str) -> None:
    """Half of a text takes at least a third of the processor time, the best of five tries each, on any machine."""
    half = text[len(text) // 2 :]  # with what stands at its end

    def seconds(part: str) -> float:
        started = time.thread_time()
        function(part)
        return time.thread_time() - started

    tries = [(seconds(half), seconds(text)) for _ in range(5)]
    short, whole = (min(times) for times in zip(*tries))
    assert whole < 3 * short + 1e-3  # the clock's own resolution


@pytest.fixture
def global_generators_untouched():
    """Training may not change a global generator: randomness is an argument."""
    before = global_states()
    yield
    assert global_states() == before
