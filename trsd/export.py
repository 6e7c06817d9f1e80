"""Export for llama.cpp: ``python -m trsd.export --model runs/mine/checkpoint-200 --output mine.gguf``.

Needs the extra ``gguf``. What may be exported, and how: ``gguf_export.py``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trsd.command import at_work, run_command


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a model folder as a GGUF file for llama.cpp."""

    model: str
    """A checkpoint, another model folder, or a hub name; an adapter is merged first (trsd.merge)."""
    output: Path
    """The .gguf file to write; it must not exist."""
    dtype: Literal["bf16", "f16", "f32"] = "bf16"
    """Of the matrices; f32 is exact for what training wrote."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for how texts are cut before merges (qwen2, llama-bpe, smollm, gpt-2); left out, it is found."""
    texts: Path | None = None
    """A .jsonl or .parquet file, such as a run's traces/train.jsonl: texts that must come out in the same tokens."""


def main(argv: list[str] | None = None) -> None:
    """Export from the command line; input that cannot be used exits with code 2."""
    run_command(ExportArguments, run, prog="python -m trsd.export", argv=argv)


def run(args: ExportArguments) -> None:
    """Export, and say where."""
    with at_work(args):
        from trsd import gguf_export

        gguf_export.run(args)


if __name__ == "__main__":
    main()
