"""SIGTERM, SIGINT, SIGHUP: the first lets a step end and its checkpoint be written, the second ends at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A launcher passes on what its processes got as well: a signal that comes again so soon is the same one.
SAME_SECONDS = 2.0


class Interrupted(SystemExit):
    """Ends the process with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Interruption:
    """As a context, takes the signals; where nothing is to be kept, one raises ``Interrupted`` as it comes."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The one that came."""
        self._deferring, self._since = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()  # no other thread may
        for number in SIGNALS if in_main else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted in ``signal``: whoever is inside ends what must not be cut off, and raises."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and time.monotonic() - self._since < SAME_SECONDS:
            return
        if self.signal is not None:
            os.write(2, f"{signal.Signals(number).name} again: ending at once\n".encode())
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        if not self._deferring:
            raise Interrupted(number)
        os.write(2, f"{signal.Signals(number).name}: saving after this step; again ends at once\n".encode())
