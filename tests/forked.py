"""The end of a forked child: its output in a file, and its exit code whatever happens."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def run_and_exit(call: Callable[[], None], log: Path) -> None:
    """In a forked child: ``call``, with one thread and what it prints in ``log``; then the end of the process."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    code = 1
    try:
        call()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
