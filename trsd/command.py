"""The way into every command but training: flags from a dataclass, exit code 2 for input that cannot be used.

What a command with a model needs beside that is imported after its flags are read, so that a command without one, and
a flag that is none, need not wait for torch.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from trsd.errors import InputError, message_of
from trsd.flags import parse_flags
from trsd.launch import refuse_ranks

Run = Callable[[Any], Any]


def run_command(arguments: type, run: Run, *, prog: str, argv: Sequence[str] | None) -> None:
    """Parse ``argv`` (None: the process's) into ``arguments`` and ``run`` them; bad input is printed, exit code 2."""
    args = parse_flags(arguments, argv, prog=prog)
    try:
        refuse_ranks(prog)
        run(args)
    except (InputError, OSError, ImportError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def run_model_command(arguments: type, run: Run, *, prog: str, argv: Sequence[str] | None) -> None:
    """``run_command`` of what loads models: transformers says less, and memory that runs out exits with code 1."""

    def guarded(args: Any) -> None:
        from trsd.memory import OutOfMemory, out_of_memory_says
        from trsd.models import quieten_transformers

        quieten_transformers()
        try:
            with out_of_memory_says(_less_at_a_time(args)):
                run(args)
        except OutOfMemory as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    run_command(arguments, guarded, prog=prog, argv=argv)


def _less_at_a_time(args: Any) -> str:
    """What to turn when memory runs out."""
    sizes = [name for name in ("batch_size", "max_tokens_per_batch") if hasattr(args, name)]
    return " or ".join(f"lower --{name} (now {getattr(args, name)})" for name in sizes) or "this machine has too little"
