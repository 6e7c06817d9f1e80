"""``Trace``: a question, what a teacher thought and answered, as token ids; and the files traces live in.

Files are jsonl (one object a line) or parquet, chosen by suffix. Ids mean nothing without their tokenizer, so every
row carries its fingerprint and reading with another tokenizer is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from trsd.errors import InputError

ROWS_PER_GROUP = 1024  # of a parquet file, held in memory together
FILE_TYPES = (".jsonl", ".json", ".parquet")
MEND = "mend or remove this line"
ID_FIELDS = ("prompt_ids", "reasoning_ids", "close_ids", "answer_ids")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One prompt, reasoning and answer; see ``thinking.py`` for how the parts follow each other."""

    id: str
    """Key of the content: question, reasoning and answer."""
    question: str
    gold: str | None
    """The reference answer, when one is known."""
    prompt_ids: list[int]
    """Ends with the think opener."""
    reasoning_ids: list[int]
    close_ids: list[int]
    """What ended the thinking: the tag and the whitespace behind it, or the closer of a forced close."""
    answer_ids: list[int]
    """Ends with EOS."""
    reasoning: str
    answer: str
    closed: bool
    """The model ended its thinking by itself."""
    correct: bool | None
    """Whether the answer matches ``gold``; None when it is unknown."""
    tokenizer: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """How the trace was sampled; empty for a trace that was given."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole trace."""
        return len(self.prompt_ids) + len(self.reasoning_ids) + len(self.close_ids) + len(self.answer_ids)


def content_key(*parts: str) -> str:
    """A short stable key of texts."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def trace_from_row(row: dict[str, Any], *, where: str, tokenizer_fingerprint: str) -> Trace:
    """A ``Trace`` from a stored row, every field checked; ``where`` names the row in errors."""
    if isinstance(row.get("sampling"), str):  # parquet holds it as text
        try:
            row = {**row, "sampling": json.loads(row["sampling"])}
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: sampling is no JSON ({error})") from None
    known = {entry.name for entry in fields(Trace)}
    missing, extra = known - {"sampling"} - row.keys(), row.keys() - known
    if missing or extra:
        raise InputError(f"{where}: not a trace row; missing {sorted(missing)}, unknown {sorted(extra)}")
    for name in ID_FIELDS:
        ids = row[name]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"{where}: {name} must be a list of token ids")
    for name in ("id", "question", "reasoning", "answer", "tokenizer"):
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name} must be text")
    if not isinstance(row["gold"], str | None) or not isinstance(row["correct"], bool | None):
        raise InputError(f"{where}: gold must be text or null, correct true, false or null")
    if not isinstance(row["closed"], bool) or not isinstance(row.get("sampling", {}), dict):
        raise InputError(f"{where}: closed must be true or false, sampling an object")
    if not row["answer_ids"] or not row["prompt_ids"] or not row["close_ids"]:
        raise InputError(f"{where}: prompt_ids, close_ids and answer_ids must not be empty")
    if row["tokenizer"] != tokenizer_fingerprint:
        raise InputError(
            f"{where}: these ids were made by tokenizer {row['tokenizer']}, the model's is {tokenizer_fingerprint}; "
            "generate the traces again with this model"
        )
    return Trace(**row)


def _type(path: Path) -> str:
    """What a file is by its ending, in capitals or not."""
    return path.suffix.lower()


def check_trace_path(path: Path) -> None:
    """Raise when traces could not be written to or read back from ``path`` by its type."""
    if _type(path) not in FILE_TYPES:
        raise InputError(f"{path}: expected a .jsonl or .parquet file")
    if _type(path) == ".parquet":
        _parquet()


def write_traces(path: Path, traces: Iterable[Trace]) -> int:
    """Write ``traces`` to a .jsonl or .parquet file, one after the other, whole or not at all; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        count = (_write_parquet if _type(path) == ".parquet" else _write_jsonl)(temporary, map(asdict, traces))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    pyarrow, parquet = _parquet()
    schema = pyarrow.schema(
        [
            *((name, pyarrow.string()) for name in ("id", "question", "gold")),
            *((name, pyarrow.list_(pyarrow.int64())) for name in ID_FIELDS),
            *((name, pyarrow.string()) for name in ("reasoning", "answer")),
            *((name, pyarrow.bool_()) for name in ("closed", "correct")),
            *((name, pyarrow.string()) for name in ("tokenizer", "sampling")),
        ]
    )
    count, rows = 0, iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := [{**row, "sampling": json.dumps(row["sampling"])} for row in islice(rows, ROWS_PER_GROUP)]:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def read_traces(path: Path, *, tokenizer_fingerprint: str) -> list[Trace]:
    """Read a trace file back; refuses rows whose ids were made by another tokenizer."""
    return [
        trace_from_row(row, where=where, tokenizer_fingerprint=tokenizer_fingerprint) for where, row in read_rows(path)
    ]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:row``, row) for every row of a .jsonl or .parquet file; a row that is no JSON object raises."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected a .jsonl or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}: check the path (it is taken relative to the current folder)")
    if _type(path) == ".parquet":
        _, parquet = _parquet()
        try:
            rows = parquet.read_table(path).to_pylist()
        except (ValueError, OSError) as error:  # what pyarrow raises is one of them
            raise InputError(f"{path} is no parquet file that can be read ({error})") from None
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", row
        return
    if _type(path) not in FILE_TYPES:
        raise InputError(f"{path}: expected a .jsonl or .parquet file")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless numbers or brackets
                whole = line.lstrip()[:1] in (b"[", b"{") and number == 1 and line.strip()[-1:] in b"[{,"
                hint = "is the file one JSON document? Write one object a line (JSON Lines)" if whole else MEND
                hint = "it is UTF-16: save it as UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else hint
                raise InputError(f"{where}: not a JSON row in UTF-8 ({error}); {hint}") from None
            if row is None:
                continue
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}: write one object a line")
            yield where, row


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("parquet files need pyarrow: pip install 'trsd[data]'") from None
    return pyarrow, pyarrow.parquet
