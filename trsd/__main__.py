"""All commands in one: ``python -m trsd`` lists them, ``python -m trsd train ...`` is ``python -m trsd.train ...``.

Nothing here imports torch, so the list and a mistyped name are answered at once.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn

from trsd import __doc__ as summary
from trsd import __version__

# Modules of this package that are commands, in the order in which one meets them.
COMMANDS = {
    "train": "distil a model from partial traces; without arguments the demo, on a CPU",
    "plan": "what a recipe would take: memory, time, whether it fits a card, and what to turn",
    "generate": "let a teacher write traces",
    "cache": "make a run's traces and teacher targets, without training",
    "evaluate": "accuracy of any model against its thinking budget; or grade what others generated",
    "compare": "two evaluations, paired by question: difference, interval, exact test",
    "report": "write report.html of a run again",
    "analyze": "what traces are made of: sections, first derivation, reflection, rank-surprisal",
    "sweep": "train and evaluate at several fractions of each sequence",
    "merge": "the mean of several models, or an adapter put into its model",
    "export": "a checkpoint as GGUF, for llama.cpp",
}


def overview() -> str:
    """What ``python -m trsd`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    usage = "usage: python -m trsd COMMAND [flags]        python -m trsd COMMAND --help"
    return "\n".join([f"trsd {__version__}: {summary}", "", usage, "", *lines, ""])


def fail(word: str) -> NoReturn:
    """Say that there is no command ``word``, and which one may be meant; exit code 2."""
    near = difflib.get_close_matches(word.lower(), COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    print(f"error: no command {word!r}; {hint}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: its first word names the command, which gets the rest; exit code 2 where there is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
    elif words[0] in ("-V", "--version"):
        print(f"trsd {__version__}")
    elif words[0] in COMMANDS:
        run(words[0], words[1:])
    else:
        fail(words[0])


def run(command: str, words: Sequence[str]) -> None:
    """``python -m trsd.COMMAND words`` in this process."""
    sys.argv = [f"python -m trsd.{command}", *words]
    runpy.run_module(f"trsd.{command}", run_name="__main__", alter_sys=True)


def train() -> None:
    """The shell's ``trsd-train``: ``trsd train``."""
    main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
