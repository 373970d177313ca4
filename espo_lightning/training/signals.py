"""Ctrl-C and SIGTERM: at once outside of training, after the batch and its checkpoint within it."""

import os
import signal
import sys
import threading
from types import FrameType

from lightning.pytorch.utilities.rank_zero import rank_zero_only

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """A signal ended the program; like KeyboardInterrupt, no handler of ordinary errors catches it."""


class Signals:
    """Takes SIGINT and SIGTERM over for as long as the context lasts.

    While `patient`, the first signal is only noted, in ``received``, and whoever trains looks there between two
    batches; any other signal raises `Stopped` where the program is. Signals can be taken over in the main thread only;
    elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.patient = False
        self.at_once = False  # whether `Stopped` was raised wherever the program was

    def __enter__(self) -> "Signals":
        self.main = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.getsignal(number) for number in NAMES}
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def take(self) -> None:
        """Handle both signals here; again, wherever Lightning may have put its own handlers in this place."""
        if self.main:
            for number in NAMES:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if not (self.patient and first):
            self.at_once = True
            raise Stopped
        if rank_zero_only.rank == 0:
            advice = "press again" if number == signal.SIGINT else "send it again"
            text = f"\n{NAMES[number]}: finishing this batch, then saving a checkpoint; {advice} to stop at once.\n"
            os.write(sys.__stderr__.fileno(), text.encode())  # a buffered writer may be in the middle of a line


def exit_code(number: signal.Signals | None) -> int:
    """Of a program that a signal ended, as shells count."""
    return 128 + (number or signal.SIGINT)
