"""How many threads of a CPU a program computes with.

Threads wait for one another after every operation on a tensor. Those of torch spin while they wait, and where other
programs want the cores, too, the thread that is waited for may not be running: with two threads a policy of 0.46 M then
took 39 times the processor time of one, and one of 135 M 7 times. Threads that sleep while they wait took 1.2 times as
much or less. So the package lets them sleep where it runs as a program (``OMP_WAIT_POLICY``, before torch is loaded),
and a program takes one thread for a small policy, and all of them from the size on at which they cost nothing.
benchmarks/threads.py measures it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts

LARGE = 19_000_000  # parameters from which on two threads that sleep cost as much as one, on a busy machine
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
