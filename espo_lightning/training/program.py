"""A training program from its first line to its exit code."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from espo_lightning.tasks.verifiers import BrokenVerifier
from espo_lightning.training.signals import NAMES, Signals, Stopped, exit_code
from espo_lightning.training.threads import computing_with

if TYPE_CHECKING:
    from espo_lightning.training.cli import TrainingCLI


EXPECTED = (OSError, FloatingPointError, BrokenVerifier, MisconfigurationException)  # no faults of the code


def _of_a_callback(error: Exception) -> bool:
    """Whether one of Lightning's callbacks gave up, as EarlyStopping does on a metric that there is not."""
    innermost = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1]
    return Path(innermost).parent == Path(callbacks.__file__).parent


def _stopped(signals: Signals, cli: "TrainingCLI | None") -> SystemExit:
    """Say what a signal left behind; the exit that follows."""
    first = rank_zero_only.rank == 0
    if first:
        left = "nothing was written" if cli is None else cli.left_behind()
        sys.stdout.write(f"\nstopped by {NAMES[signals.received]}; {left}\n")
    # another code than 0 from a process that Lightning started would have all others killed
    return SystemExit(exit_code(signals.received) if first else 0)


def program(make: Callable[[Signals], "TrainingCLI"], work: Callable[["TrainingCLI"], None]) -> None:
    """Run a training program from its first line to its exit code, whatever happens when.

    Exit codes: 0 finished; 1 failed; 2 refused before anything was written; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    cli = None
    with Signals() as signals, computing_with():
        try:
            cli = make(signals)
            work(cli)
        except Stopped:
            raise _stopped(signals, cli) from None
        except (Exception, SystemExit) as error:
            if signals.at_once:  # it was raised inside of a library, which made another error of it
                raise _stopped(signals, cli) from None
            if isinstance(error, SystemExit):
                raise
            if cli is not None and rank_zero_only.rank == 0:
                sys.stderr.write(f"\n{type(error).__name__}: {error}\n{cli.left_behind()}\n")
            if isinstance(error, EXPECTED) or _of_a_callback(error):
                raise SystemExit(2 if isinstance(error, BrokenVerifier) else 1) from None
            raise
        finally:
            if cli is not None:
                cli.close()
