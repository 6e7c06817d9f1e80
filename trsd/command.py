"""The way into every command but training: flags from a dataclass, exit code 2 for input that cannot be used.

A command's module holds its flags; what it does with models is a module of its own, imported ``at_work``, after the
flags were read. So help and a wrong flag need not wait for torch and transformers.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trsd.errors import InputError, message_of
from trsd.flags import parse_flags
from trsd.launch import refuse_ranks
from trsd.quiet import quiet_imports
from trsd.terminal import at_a_terminal


def run_command(arguments: type, run: Callable[[Any], Any], *, prog: str, argv: Sequence[str] | None) -> None:
    """Parse ``argv`` (None: the process's) into ``arguments`` and ``run`` them; bad input is printed, exit code 2."""
    with at_a_terminal():
        args = parse_flags(arguments, argv, prog=prog)
        try:
            refuse_ranks(prog)
            run(args)
        except (InputError, OSError, ImportError) as error:
            print(f"error: {message_of(error)}", file=sys.stderr)
            raise SystemExit(2) from None


@contextmanager
def at_work(args: Any) -> Iterator[None]:
    """What is done with models: transformers reports errors alone, and memory that runs out exits with code 1."""
    import_quietly()
    from trsd.memory import OutOfMemory, out_of_memory_says

    try:
        with out_of_memory_says(_less_at_a_time(args)):
            yield
    except OutOfMemory as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def import_quietly() -> None:
    """Import transformers, and have it report errors alone from then on."""
    with quiet_imports():
        from trsd.models import quieten_transformers
    quieten_transformers()


def _less_at_a_time(args: Any) -> str:
    """What to turn when memory runs out."""
    sizes = [name for name in ("batch_size", "max_tokens_per_batch") if hasattr(args, name)]
    return " or ".join(f"lower --{name} (now {getattr(args, name)})" for name in sizes) or "this machine has too little"
