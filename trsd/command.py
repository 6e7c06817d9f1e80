"""The way into every command but training: flags from a dataclass, exit code 2 for input that cannot be used."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from trsd.errors import InputError
from trsd.flags import parse_flags
from trsd.models import quieten_transformers
from trsd.ranks import refuse_ranks


def run_command(arguments: type, run: Callable[[Any], Any], *, prog: str, argv: Sequence[str] | None) -> None:
    """Parse ``argv`` (None: the process's) into ``arguments`` and ``run`` them; bad input is printed, exit code 2."""
    args = parse_flags(arguments, argv, prog=prog)
    quieten_transformers()
    try:
        refuse_ranks(prog)
        run(args)
    except (InputError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
