"""What a set of traces is made of: ``python -m trsd.analyze --data TRACES --tokenizer MODEL --output_dir DIR``.

Writes analysis.json, analysis.md, analysis.png and a row for every trace, measures.jsonl; what is in them:
``analysis.py``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trsd.command import at_work, run_command


@dataclass(frozen=True, kw_only=True)
class AnalyzeArguments:
    """Measure what a set of traces is made of."""

    data: str
    """Traces: .jsonl, .parquet or a hub data set, in any form that training reads, or problem and response."""
    output_dir: Path
    """Where analysis.json, analysis.md, analysis.png and measures.jsonl go."""
    tokenizer: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Model or tokenizer folder (no weights needed), hub name or bundled model; needed unless a student is named."""
    student: str | None = None
    """A model to take the Rank-Surprisal Ratio under; its tokenizer must be the traces'."""
    solutions: bool = False
    """Rows are question and answer, the answer column a worked solution and then #### and the final answer."""
    open_tag: str = "<think>"
    """The tag that opens thinking."""
    close_tag: str = "</think>"
    """The tag that ends thinking."""
    max_samples: int | None = None
    """Use only so many rows of the data."""
    max_tokens_per_batch: int = 8192
    """Tokens of a packed row under the student."""
    judge_url: str | None = None
    """OpenAI-compatible server that is asked for the first derivation too; a key is taken from OPENAI_API_KEY."""
    judge_model: str = ""
    """The model that server should use; needed with judge_url."""
    judge_samples: int = 100
    """Ask about only so many traces."""
    judge_timeout: float = 120.0
    """Seconds an attempt may take."""


def main(argv: list[str] | None = None) -> None:
    """Analyse from the command line; input that cannot be used exits with code 2."""
    run_command(AnalyzeArguments, run, prog="python -m trsd.analyze", argv=argv)


def run(args: AnalyzeArguments) -> None:
    """Measure, print and store."""
    with at_work(args):
        from trsd import analysis

        analysis.run(args)


if __name__ == "__main__":
    main()
