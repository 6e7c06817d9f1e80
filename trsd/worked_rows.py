"""Rows with reasoning as traces to be analysed: those of ``data.py``, and worked solutions, of which none is trained.

With ``solutions``, the answer column of question + answer holds a worked solution, then ``#### final`` (GSM8K): what
stands before ``####`` is the reasoning.
"""

from typing import Any

from trsd.data import Loaded, describe_drops, load_data
from trsd.errors import InputError
from trsd.thinking import ThinkFormat

NO_FINAL_ANSWER = "no #### and final answer behind the worked solution"
NO_REASONING = "no reasoning tokens"


def load_traces(
    source: str, *, tokenizer: Any, think: ThinkFormat, solutions: bool = False, max_rows: int | None = None
) -> Loaded:
    """The traces among the first ``max_rows`` rows of ``source``; what is left out is counted by reason.

    Args:
        source: a .jsonl or .parquet file, or a hub data set.
        tokenizer: of the traces' ids.
        think: the tags around the thinking.
        solutions: rows are questions with worked solutions as above.
        max_rows: of the source.

    Raises:
        InputError: a malformed row, rows without reasoning, or no usable row at all.
    """
    adapt = _as_solution if solutions else None
    loaded = load_data(source, tokenizer=tokenizer, think=think, max_rows=max_rows, adapt=adapt)
    if loaded.questions:
        raise InputError(
            f"{source} holds questions without reasoning; generate traces first (python -m trsd.generate), or pass "
            "--solutions True when its answer column holds worked solutions that end in #### and the answer"
        )
    kept = [trace for trace in loaded.traces if trace.reasoning_ids]
    if len(kept) < len(loaded.traces):
        loaded.dropped[NO_REASONING] += len(loaded.traces) - len(kept)
    if not kept:
        raise InputError(f"{source} holds no usable row ({describe_drops(loaded.dropped)})")
    loaded.traces = kept
    return loaded


def _as_solution(row: dict[str, Any], where: str) -> dict[str, Any] | str:
    """A question with a worked solution as prompt, reasoning and answer; a reason where it has no final answer."""
    name = _question_column(row)
    if name is None or not isinstance(row.get("answer"), str):
        raise InputError(
            f"{where}: --solutions expects question (or problem) and a worked solution as answer, got {sorted(row)}"
        )
    solution, tag, final = row["answer"].rpartition("####")
    if not tag or not final.strip():
        return NO_FINAL_ANSWER
    return {name: row[name], "reasoning": solution.rstrip(), "answer": final.strip(), "gold": final.strip()}


def _question_column(row: dict[str, Any]) -> str | None:
    return next((name for name in ("question", "problem") if name in row), None)
