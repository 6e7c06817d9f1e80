"""Teacher traces: ``python -m trsd.generate --model MODEL --data QUESTIONS --output traces.jsonl``.

The model thinks and answers by itself; what it writes is split at the close tag, graded against the reference answer
where there is one, and stored as a ``Trace`` file. Traces that cannot be used are dropped, counted by reason.

Any engine writes (``trsd/engines``). Every finished trace goes at once to a journal beside the output
(``journal.py``): a job that was stopped, however it was stopped, goes on when the same command is given again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trsd.command import at_work, run_command
from trsd.decoding_arguments import DecodingArguments

Filter = Literal["none", "correct_only"]


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(DecodingArguments):
    """Let a model think about and answer questions, and store its traces."""

    data: str = "bundled:questions/train.jsonl"
    """Questions: .jsonl, .parquet, a hub data set, or the short name of a benchmark."""
    output: Path
    """The trace file to write, .jsonl or .parquet; OUTPUT.journal beside it holds what is finished so far."""
    close_unfinished: bool = False
    """Close thinking that has no close tag (limit reached, or EOS) with the closer, instead of dropping the trace."""
    filter: Filter = "none"
    """Which traces to keep."""


def main(argv: list[str] | None = None) -> None:
    """Generate traces from the command line; input that cannot be used exits with code 2."""
    run_command(GenerateArguments, run, prog="python -m trsd.generate", argv=argv)


def run(args: GenerateArguments) -> None:
    """Generate, store, and say what was dropped."""
    with at_work(args):
        from trsd import generation

        generation.run(args)


if __name__ == "__main__":
    main()
