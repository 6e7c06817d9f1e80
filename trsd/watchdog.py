"""Ends a process in which nothing moves any more, and says where every thread of it stood."""

import faulthandler
import sys
from typing import Self


class Watchdog:
    """As a context: unless ``beat`` is called every ``seconds``, all stacks are printed and the process exits with 1.

    The clock runs outside of Python, so that code which holds the interpreter, or waits for a GPU, is caught too.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Begin to count anew."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)
