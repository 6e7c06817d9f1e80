"""How a command meets its terminal: output that nobody reads any more, and Ctrl-C, end it as they should.

Training goes on when the program behind its pipe has ended, as it does when a logger fails.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


class _Lasting:
    """A stream whose reader may leave: what is written after that goes nowhere, and who writes it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):  # a text that a terminal cannot show ends nothing
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is still in the stream's buffer goes there, too
        os.close(nowhere)


@contextmanager
def at_a_terminal() -> Iterator[None]:
    """Inside, output may be piped into what stops reading, and Ctrl-C ends the process with 130 and one word."""
    with redirect_stdout(_Lasting(sys.stdout)), redirect_stderr(_Lasting(sys.stderr)):
        try:
            yield
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
