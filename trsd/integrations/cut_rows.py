"""Cuts as a data transform: what a method makes of its traces, as plain rows of lists that other trainers' data is.

A row is one sequence of the student and the one the teacher runs beside it:

    input_ids           what the student sees: for TRSD the cut trace, for LSP the kept tokens
    labels              of the same length; -100 but at the tokens that are learnt, each predicted one position before
    thinking_labels     alike: the reasoning shown, learnt by cross-entropy alone (TRSD with keep_thinking)
    teacher_input_ids   what the teacher sees: for TRSD the whole trace
    teacher_labels      of the length of teacher_input_ids; -100 but at the tokens that are learnt

Labels are those of Hugging Face: not shifted. Student and teacher belong together by order: the k-th label of a row and
the k-th of its teacher are one answer token at two places. So their states at these places, of a whole batch, row by
row, are aligned, and that is all a loss needs (``row_loss.py``).

Several cuts of a trace (``branches_per_trace``) are several rows. The trainer of this package runs what they share
once; here each row runs all of its tokens, and its teacher's. The loss is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trsd.batching import Branch, Example
from trsd.errors import InputError
from trsd.methods import Method

IGNORE = -100
Row = dict[str, list[int]]
THINKING = "thinking_labels"
CUT = "was it cut to a length by the trainer?"


def cut_rows(method: Method, *, epoch: int = 0, trace_indices: Sequence[int] | None = None) -> list[Row]:
    """The rows of one epoch, ready for ``datasets.Dataset.from_list``.

    Args:
        method: ``trsd.methods.trsd.TRSD``, whose policy and ``branches_per_trace`` say where and how often each trace
            is cut, or ``trsd.methods.lsp.LSP``.
        epoch: whose cuts are drawn; of the same epoch always the same. Rows of several epochs may follow each other in
            one data set, so that a trainer that repeats its data does not repeat its cuts.
        trace_indices: of the traces wanted, in this order; None: all of them.

    Returns:
        Rows, those of a trace one after the other.
    """
    indices = range(len(method.traces)) if trace_indices is None else trace_indices
    found = []
    for index in indices:
        teacher = _teacher_columns(method.teacher_example(index))
        for example in method.examples([(epoch, index)]):
            found += [row | teacher for row in _rows(example)]
    # A data set has the same columns in every row, of every epoch.
    if getattr(method, "keep_thinking", False):
        found = [{THINKING: [IGNORE] * len(row["input_ids"])} | row for row in found]
    return found


def _teacher_columns(example: Example) -> Row:
    row = _row(example.input_ids, example.labels, example.rows)
    return {f"teacher_{name}": row[name] for name in ("input_ids", "labels")}


def _rows(example: Example) -> Iterator[Row]:
    """The example's own sequence and its branches', each as often as it counts."""
    for segment in (example, *example.branches):
        if isinstance(segment, Branch):
            row = _row([*example.input_ids[: segment.cut], *segment.input_ids], segment.labels, None)
            last = segment.cut
        else:
            row = _row(segment.input_ids, segment.labels, segment.rows)
            last = len(segment.input_ids)
        first = example.thinking_start + 1
        if shown := example.thinking_labels[: max(0, last - first)]:
            row[THINKING] = _placed(len(row["input_ids"]), range(first, first + len(shown)), shown)
        yield from (dict(row) for _ in range(segment.count))


def _row(input_ids: Sequence[int], labels: Sequence[int], rows: Sequence[int] | None) -> Row:
    """A sequence whose positions ``rows`` (None: the last ones) predict ``labels``, with its last label as a token."""
    places = range(len(input_ids) - len(labels), len(input_ids)) if rows is None else rows
    assert places[-1] == len(input_ids) - 1  # a method runs nothing behind the last position that learns
    ids = [*input_ids, labels[-1]]
    return {"input_ids": ids, "labels": _placed(len(ids), [place + 1 for place in places], labels)}


def _placed(length: int, places: Sequence[int], labels: Sequence[int]) -> list[int]:
    found = [IGNORE] * length
    for place, label in zip(places, labels, strict=True):
        found[place] = label
    return found


@dataclass(frozen=True, kw_only=True)
class CutRowCollator:
    """Pads rows on the right, student and teacher each to their own length, and checks that they still fit together.

    The batch has every column of the rows, ``attention_mask`` and ``teacher_attention_mask``, all
    [num_rows, num_tokens] int64. Trainers that drop columns their model does not know must be told not to: for Hugging
    Face's, ``remove_unused_columns=False``.
    """

    pad_token_id: int = 0
    """Any token: no mask lets it be seen."""
    pad_to_multiple_of: int | None = None
    """Round lengths up, for processors that like it."""
    max_length: int | None = None
    """Refuse longer rows, the teacher's too; they are never cut, for that would take the answer."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of ``rows``.

        Raises:
            InputError: a row without a label, or whose columns do not fit together, such as one that a trainer cut.
        """
        for number, row in enumerate(rows):
            _check(row, number)
            longest = max(len(row["input_ids"]), len(row["teacher_input_ids"]))
            if self.max_length is not None and longest > self.max_length:
                raise InputError(
                    f"row {number} of the batch has {longest} tokens, more than max_length {self.max_length}: raise "
                    "it, or leave such traces out before cut_rows (Trace.num_tokens)"
                )
        batch = {}
        for who in ("", "teacher_"):
            ids = [row[f"{who}input_ids"] for row in rows]
            batch[f"{who}input_ids"] = self._padded(ids, self.pad_token_id)
            batch[f"{who}attention_mask"] = self._padded([[1] * len(row) for row in ids], 0)
            batch[f"{who}labels"] = self._padded([row[f"{who}labels"] for row in rows], IGNORE)
        if any(THINKING in row for row in rows):
            none = [[IGNORE] * len(row["input_ids"]) for row in rows]
            shown = [row.get(THINKING, instead) for row, instead in zip(rows, none, strict=True)]
            batch[THINKING] = self._padded(shown, IGNORE)
        return batch

    def _padded(self, lists: Sequence[Sequence[int]], value: int) -> Tensor:
        longest = max(map(len, lists))
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in lists], dtype=torch.int64)


def _check(row: dict[str, Any], number: int) -> None:
    """Raise unless ``row`` is one that ``cut_rows`` made."""
    wanted = ("input_ids", "labels", "teacher_input_ids", "teacher_labels")
    if missing := [name for name in wanted if name not in row]:
        raise InputError(
            f"row {number} of the batch has no {', '.join(missing)}: expected a row of cut_rows; a trainer that drops "
            "columns its model does not know must keep them (remove_unused_columns=False)"
        )
    lengths = {name: len(row[name]) for name in (*wanted, THINKING) if name in row}
    pairs = (("labels", "input_ids"), (THINKING, "input_ids"), ("teacher_labels", "teacher_input_ids"))
    for name, like in pairs:
        if name in lengths and lengths[name] != lengths[like]:
            raise InputError(f"row {number} of the batch has {lengths[name]} {name} for {lengths[like]} {like}: {CUT}")
    learnt, taught = (
        [label for label in row[name][1:] if label != IGNORE]  # nothing predicts a first token
        for name in ("labels", "teacher_labels")
    )
    if not learnt:
        raise InputError(f"row {number} of the batch has no label to learn: {CUT}")
    if learnt != taught:
        raise InputError(
            f"row {number} of the batch: the student learns {len(learnt)} tokens and the teacher has {len(taught)}, or "
            f"other ones; expected the same tokens in the same order: {CUT}"
        )
