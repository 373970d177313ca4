"""How many threads of a CPU a program computes with.

Threads wait for one another after every operation on a tensor, and those that wait spin. Where other programs want the
cores, too, a thread that is waited for may not be running: a small policy then takes many times the processor time of
one thread, for no gain. A large one has work enough between two waits. benchmarks/threads.py measures both.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts

LARGE = 20_000_000  # parameters from which on threads pay on a busy machine
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user, torchrun or a cluster says how many


def threads_for(parameters: int, most: int) -> int:
    """How many threads a policy of this size is worth: one, or all that there are."""
    return most if parameters >= LARGE else 1


def choose_threads(given: int | None, policy: Policy, processes: int = 1, earlier: int | None = None) -> int:
    """The number of threads of this program on a CPU.

    Args:
        given: what the user says, which is taken; else what the environment says is; else what is chosen.
        policy: whose size decides.
        processes: of this program on this machine, which share its cores.
        earlier: the number in the part of the run that is over; kept, as another rounds sums differently.

    Raises:
        ValueError: ``given`` is no number of threads.
    """
    check_counts(1, threads=given)
    if given is not None:
        return given
    if any(os.environ.get(name) for name in ENVIRONMENT):
        return torch.get_num_threads()
    parameters = sum(weight.numel() for weight in policy.parameters())
    return earlier or threads_for(parameters, max(1, torch.get_num_threads() // processes))


@contextmanager
def computing_with(number: int | None = None) -> Iterator[int]:
    """Compute with so many threads, None for as many as there are, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def counted(number: int) -> str:
    """In words."""
    return f"{number} thread{'s' * (number != 1)}"


class Threads(Callback):
    """Gives every process of a trainer the same number of threads, once the processes are there: Lightning shares the
    cores among those that it starts, whatever there is to compute.
    """

    def __init__(self, number: int):
        self.number = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.set_num_threads(trainer.strategy.broadcast(self.number))
