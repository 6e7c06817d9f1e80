"""Data sets of the Hugging Face hub: the usual benchmarks by short names, any other as ``OWNER/NAME:CONFIG:SPLIT``.

    gsm8k, math500, aime24, aime25, amc23     the benchmark's test questions with their reference answers
    gsm8k:train                               another split of it
    OWNER/NAME                                the train split of a data set, its columns as ``data.py`` knows them
    OWNER/NAME:CONFIG:SPLIT                   any part of it; CONFIG may be empty

Rows are streamed, so that ``--max_samples`` fetches no more than it needs. A local file of the same name comes first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from trsd.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's questions are on the hub."""

    repository: str
    config: str | None
    split: str
    question: str
    """The column of the question."""
    answer: str
    """The column of the reference answer."""


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": Benchmark("math-ai/aime25", None, "test", "problem", "answer"),
    "amc23": Benchmark("math-ai/amc23", None, "test", "question", "answer"),
}
FORMS = "OWNER/NAME, or OWNER/NAME:CONFIG:SPLIT with nothing for CONFIG where there is none"


def is_hub_source(source: str, *, taken: bool = False) -> bool:
    """Whether ``source``, which is no local file, names a benchmark or a data set of the hub.

    ``taken``: a folder has this name; it does not hide a benchmark, but nobody means ``OWNER/NAME`` by it.
    """
    name, _, _ = source.partition(":")
    return name in BENCHMARKS or (name.count("/") == 1 and not taken and not name.startswith((".", "~", "/")))


def hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``source:row``, row) for every row; those of a benchmark have ``question`` and ``answer`` alone."""
    name, *parts = source.split(":")
    benchmark = BENCHMARKS.get(name)
    if benchmark:
        if len(parts) > 1 or "" in parts:
            raise InputError(f"{source}: expected {name}, or {name}:SPLIT")
        repository, config, split = benchmark.repository, benchmark.config, (parts or [benchmark.split])[0]
    else:
        if len(parts) not in (0, 2) or "" in name.split("/") or (parts and not parts[1]):
            raise InputError(f"{source}: expected a data set of the hub as {FORMS}")
        repository, (config, split) = name, parts or ["", "train"]
    for number, row in enumerate(_stream(source, repository, config or None, split), start=1):
        where = f"{source}:{number}"
        if benchmark:
            missing = {benchmark.question, benchmark.answer} - row.keys()
            if missing:
                raise InputError(f"{where}: {repository} has no {', '.join(sorted(missing))}, but {sorted(row)}")
            row = {"question": row[benchmark.question], "answer": row[benchmark.answer]}
        yield where, row


def _stream(source: str, repository: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{source} is no local file; for data sets of the hub install: pip install 'trsd[data]'"
        ) from None
    what = f"the {split} split of the data set {repository}" + (f", {config}," if config else "")
    try:
        yield from datasets.load_dataset(repository, config, split=split, streaming=True)
    except Exception as error:  # no such set, no network, no access: whatever datasets and its clients raise
        raise InputError(f"{what} could not be read ({error}); save the part you want as .jsonl") from error


def refuse_unknown_name(source: str) -> None:
    """Raise for a word that is neither a path nor a benchmark, with the names there are."""
    close = get_close_matches(source, BENCHMARKS, n=1)
    raise InputError(
        f"{source} is neither a file nor a benchmark"
        + (f"; did you mean {close[0]}?" if close else ".")
        + f" Expected a .jsonl or .parquet file, one of {', '.join(BENCHMARKS)}, or a data set of the hub as {FORMS}"
    )
