"""Cuts and branches as a data transform: traces become rows that any trainer's collator can take.

A row is a dict of lists: ``input_ids`` and ``labels`` (-100 where nothing is learnt), as everywhere in transformers.
Where the teacher reads something else than the student, as in TRSD, where it has seen the whole trace, the row also has
``teacher_input_ids`` and ``teacher_labels``, with the same labels in the same order. ``DistillCollator`` pads rows to a
batch, and ``batch_targets`` runs the teacher on it.

The reasoning that a row shows is not learnt here (``thinking_weight`` of the trainer's own loop), for its count in a
step is nothing that other trainers normalise by. Several cuts of one trace become rows of their own: the tokens they
share run once for each, which the packed rows of ``python -m trsd.train`` avoid.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.batching import Example
from trsd.integrations.causal_lm import IGNORE, teacher_targets
from trsd.methods import Method
from trsd.methods.lsp import LSP

TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels", "teacher_attention_mask")


def cut_rows(method: Method, *, epoch: int = 0) -> Iterator[dict[str, list[int]]]:
    """The rows of one epoch of ``method``: of every trace, or of every cut of it.

    Args:
        method: ``TRSD`` or ``LSP`` of ``trsd.methods``, or another of their protocol, with its traces.
        epoch: cuts that are drawn are drawn anew in each.

    Yields:
        ``input_ids``, ``labels`` and, of all but LSP, whose teacher reads what the student does,
        ``teacher_input_ids`` and ``teacher_labels``. Equal cuts of one trace are as many equal rows.
    """
    for index in range(len(method.traces)):
        whole = None if isinstance(method, LSP) else method.teacher_example(index)
        teacher = {} if whole is None else {f"teacher_{name}": ids for name, ids in _row(whole).items()}
        for example in method.examples([(epoch, index)]):
            for row, count in _sequences(example):
                yield from (row | teacher for _ in range(count))


def _sequences(example: Example) -> Iterator[tuple[dict[str, list[int]], int]]:
    """Trunk and branches as sequences of their own, with how often each stands there."""
    yield _row(example), example.count
    for branch in example.branches:
        ids = [*example.input_ids[: branch.cut], *branch.input_ids]
        yield _row(Example(trace_index=example.trace_index, input_ids=ids, labels=branch.labels)), branch.count


def _row(example: Example) -> dict[str, list[int]]:
    """An example's sequence, with the last label as a token of its own, and its labels where they stand."""
    ids = [*example.input_ids, example.labels[-1]]
    first = len(example.input_ids) - len(example.labels)
    rows = range(first, len(example.input_ids)) if example.rows is None else example.rows
    labels = [IGNORE] * len(ids)
    for row, label in zip(rows, example.labels, strict=True):
        labels[row + 1] = label
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class DistillCollator:
    """Pads rows of ``cut_rows`` on the right to a batch of tensors, those of the teacher to a length of their own."""

    pad_token_id: int
    """What stands at padding; nothing sees it."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """[batch, length] ``input_ids``, ``labels`` and ``attention_mask``; with ``teacher_`` before them, if there."""
        batch = self._padded(rows, "")
        return batch | self._padded(rows, "teacher_") if "teacher_input_ids" in rows[0] else batch

    def _padded(self, rows: Sequence[dict[str, Any]], who: str) -> dict[str, Tensor]:
        lengths = [len(row[f"{who}input_ids"]) for row in rows]

        def padded(lists: Iterable[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*ids, *[value] * (max(lengths) - len(ids))] for ids in lists])

        return {
            f"{who}input_ids": padded((row[f"{who}input_ids"] for row in rows), self.pad_token_id),
            f"{who}labels": padded((row[f"{who}labels"] for row in rows), IGNORE),
            f"{who}attention_mask": padded(([1] * length for length in lengths), 0),
        }


def batch_targets(teacher: PreTrainedModel | None, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What ``teacher`` says of a batch of ``DistillCollator``, as arguments of ``forward_distill``."""
    if teacher is None:
        return {}
    if "teacher_input_ids" not in batch:
        return teacher_targets(teacher, batch["input_ids"], attention_mask=batch.get("attention_mask"))
    return teacher_targets(
        teacher,
        batch["teacher_input_ids"],
        batch["teacher_labels"],
        attention_mask=batch.get("teacher_attention_mask"),
    )
