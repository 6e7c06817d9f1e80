"""Examples, packed batches, and which traces an optimizer step learns from.

A step takes ``train_batch_size`` traces. Their examples are packed, without padding, into as many rows of at most
``max_tokens_per_batch`` tokens as they need; the rows' gradients add up, normalised by the step's count of supervised
tokens, so the row size changes memory and speed and never the loss.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from trsd_kernels import cu_seqlens_of, pack_sequences, position_ids_of


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence to run and the tokens it learns: the last ``len(labels)`` positions predict ``labels``.

    The positions from ``thinking_start`` on predict ``thinking_labels``, which are learnt as they stand, by
    cross-entropy, without teacher targets.
    """

    trace_index: int
    """The trace whose teacher targets belong to the labels, one target row per label."""
    input_ids: list[int]
    labels: list[int]
    thinking_start: int = 0
    thinking_labels: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Several examples in one row of tokens."""

    input_ids: Tensor  # [total_tokens] int64
    position_ids: Tensor  # [total_tokens] int64
    cu_seqlens: Tensor  # [num_seqs + 1] int32
    rows: Tensor  # [num_labels] int64: the positions that predict the labels
    labels: Tensor  # [num_labels] int64
    thinking_rows: Tensor  # [num_thinking_labels] int64
    thinking_labels: Tensor  # [num_thinking_labels] int64
    trace_indices: tuple[int, ...]
    """Trace of each sequence, in the order of the rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return self.input_ids.numel()


def pack_examples(examples: Sequence[Example], max_tokens: int, device: torch.device | str) -> list[PackedBatch]:
    """Pack ``examples`` into rows of at most ``max_tokens`` tokens; every example is in exactly one."""
    rows = pack_sequences([len(example.input_ids) for example in examples], max_tokens)
    return [_packed([examples[index] for index in row], device) for row in rows]


def _packed(examples: list[Example], device: torch.device | str) -> PackedBatch:
    lengths = [len(example.input_ids) for example in examples]
    rows, thinking_rows, start = [], [], 0
    for example, length in zip(examples, lengths, strict=True):
        rows.extend(range(start + length - len(example.labels), start + length))
        first = start + example.thinking_start
        thinking_rows.extend(range(first, first + len(example.thinking_labels)))
        start += length

    def tensor(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    return PackedBatch(
        input_ids=tensor(chain.from_iterable(example.input_ids for example in examples)),
        position_ids=position_ids_of(lengths, device),
        cu_seqlens=cu_seqlens_of(lengths, device),
        rows=tensor(rows),
        labels=tensor(chain.from_iterable(example.labels for example in examples)),
        thinking_rows=tensor(thinking_rows),
        thinking_labels=tensor(chain.from_iterable(example.thinking_labels for example in examples)),
        trace_indices=tuple(example.trace_index for example in examples),
    )


class TraceStream:
    """The endless order of traces: every epoch a new permutation, steps cut from the stream across epoch edges.

    Stateless: the step number alone tells what a step holds, so a resumed run sees exactly what it would have seen.
    """

    def __init__(self, num_traces: int, *, batch_size: int, seed: int) -> None:
        if num_traces < 1:
            raise ValueError("no traces to train on")
        self.num_traces = num_traces
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, trace index) of every trace in optimizer step ``step``, counted from 0."""
        first = step * self.batch_size
        return [self._at(index) for index in range(first, first + self.batch_size)]

    def _at(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.num_traces)
        if self._order[0] != epoch:
            order = list(range(self.num_traces))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return epoch, self._order[1][place]
