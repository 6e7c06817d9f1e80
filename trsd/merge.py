"""Merge models: average several, or put an adapter into the model it was trained on (``merging.py``).

python -m trsd.merge --models runs/a/checkpoint-150,runs/b/checkpoint-150 --output merged
python -m trsd.merge --adapter runs/a/checkpoint-150/adapter --model BASE --output merged
"""

from dataclasses import dataclass
from pathlib import Path

from trsd.command import at_work, run_command


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Average the weights of models that share an architecture and a tokenizer, or merge an adapter into its model."""

    output: Path
    """The model folder to write."""
    models: tuple[str, ...] = ()
    """To average: model folders or hub names, two or more; the first also gives config and tokenizer."""
    adapter: Path | None = None
    """To merge: the folder of a LoRA adapter in peft's format, or a checkpoint that holds one in adapter/."""
    model: str | None = None
    """The model that the adapter was trained on: a folder or hub name."""
    weights: tuple[float, ...] = ()
    """What each model counts; scaled to sum to 1. Left out: all the same."""


def main(argv: list[str] | None = None) -> None:
    """Average or merge from the command line; input that cannot be used exits with code 2."""
    run_command(MergeArguments, run, prog="python -m trsd.merge", argv=argv)


def run(args: MergeArguments) -> None:
    """Average or merge, and say where."""
    with at_work(args):
        from trsd import merging

        merging.run(args)


if __name__ == "__main__":
    main()
