"""Distil reasoning language models from partial chains of thought."""

import os
import sys

__version__ = "0.1.0"


def _refuse_to_start() -> None:
    """Exit with code 2 where no command could work, before anything else is imported."""
    here, program = os.path.dirname(os.path.abspath(__file__)), sys.argv[0] if sys.argv else ""
    if sys.version_info < (3, 11):  # noqa: UP036 (a tree need not be installed)
        found = sys.version.split()[0]
        print(f"error: trsd needs Python 3.11 or newer, this is {found} ({sys.executable})", file=sys.stderr)
        raise SystemExit(2)
    as_command = program == "-m" or os.path.dirname(os.path.abspath(program)) == here
    if as_command and sys.path and os.path.abspath(sys.path[0]) == here:
        # Python puts the folder of a script, or the one it is started in, first: statistics.py would be ours.
        print(
            f"error: started from {here}, whose files would hide modules of Python's own: run a command as python -m "
            "trsd.train, from another folder",
            file=sys.stderr,
        )
        raise SystemExit(2)


_refuse_to_start()
