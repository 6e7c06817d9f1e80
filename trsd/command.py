"""The way into every command but training: flags from a dataclass, exit code 2 for input that cannot be used."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from trsd.errors import InputError, message_of
from trsd.flags import parse_flags
from trsd.memory import OutOfMemory, out_of_memory_says
from trsd.models import quieten_transformers
from trsd.ranks import refuse_ranks


def run_command(arguments: type, run: Callable[[Any], Any], *, prog: str, argv: Sequence[str] | None) -> None:
    """Parse ``argv`` (None: the process's) into ``arguments`` and ``run`` them; bad input is printed, exit code 2."""
    args = parse_flags(arguments, argv, prog=prog)
    quieten_transformers()
    try:
        refuse_ranks(prog)
        with out_of_memory_says(_less_at_a_time(args)):
            run(args)
    except (InputError, OSError, ImportError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OutOfMemory as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def _less_at_a_time(args: Any) -> str:
    """What to turn when memory runs out."""
    sizes = [name for name in ("batch_size", "max_tokens_per_batch") if hasattr(args, name)]
    return " or ".join(f"lower --{name} (now {getattr(args, name)})" for name in sizes) or "this machine has too little"
