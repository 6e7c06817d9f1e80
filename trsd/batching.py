"""Examples, packed batches, and which traces an optimizer step learns from.

A step takes ``train_batch_size`` traces. Their examples are packed, without padding, into as many rows of at most
``max_tokens_per_batch`` tokens as they need; the rows' gradients add up, normalised by the step's count of supervised
tokens, so the row size changes memory and speed and never the loss. Examples that begin alike, such as several cuts of
one trace, are one example with branches: what they share runs once.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from trsd.row_shares import share_rows
from trsd_kernels import PackedLayout, pack_sequences, packed_layout


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A further sequence that begins like its example: it continues the first ``cut`` of the example's tokens."""

    cut: int
    input_ids: list[int]
    labels: list[int]
    """What the last ``len(labels)`` positions predict."""
    count: int = 1
    """How many equal sequences this one stands for."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence to run and the tokens it learns: the positions ``rows`` predict ``labels``.

    The positions from ``thinking_start`` on predict ``thinking_labels``, which are learnt as they stand, by
    cross-entropy, without teacher targets. A branch learns, beside its own labels, the thinking it shares.
    """

    trace_index: int
    """The trace whose teacher targets belong to the labels, one target row per label; a branch has the same."""
    input_ids: list[int]
    labels: list[int]
    rows: Sequence[int] | None = None
    """Ascending positions in ``input_ids``, one per label; None: the last ones."""
    count: int = 1
    """How many equal sequences this one stands for, branches not counted."""
    thinking_start: int = 0
    thinking_labels: list[int] = field(default_factory=list)
    branches: tuple[Branch, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens the example takes in a row, branches included."""
        return len(self.input_ids) + sum(len(branch.input_ids) for branch in self.branches)

    @property
    def num_items(self) -> int:
        """Labels, each as often as sequences learn it."""
        return self.count * len(self.labels) + sum(branch.count * len(branch.labels) for branch in self.branches)

    @property
    def num_thinking(self) -> int:
        """Thinking labels, each as often as sequences show it: a branch those before its cut."""
        first, num = self.thinking_start + 1, len(self.thinking_labels)
        shown = (branch.count * min(max(branch.cut - first, 0), num) for branch in self.branches)
        return self.count * num + sum(shown)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Several examples in one row of tokens."""

    input_ids: Tensor  # [num_tokens] int64
    layout: PackedLayout
    rows: Tensor  # [num_labels] int64: the positions that predict the labels
    labels: Tensor  # [num_labels] int64
    weights: Tensor  # [num_labels] fp32: how many sequences each label stands for
    thinking_rows: Tensor  # [num_thinking_labels] int64
    thinking_labels: Tensor  # [num_thinking_labels] int64
    thinking_weights: Tensor  # [num_thinking_labels] fp32
    num_items: int
    """Sum of ``weights``."""
    num_thinking: int
    """Sum of ``thinking_weights``."""
    num_pairs: int
    """Pairs of a query and a key it sees."""
    trace_indices: tuple[int, ...]
    """Trace of each sequence, in the order of the rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return self.input_ids.numel()


def pack_examples(
    examples: Sequence[Example],
    max_tokens: int,
    device: torch.device | str,
    *,
    num_ranks: int = 1,
    rank: int = 0,
) -> list[PackedBatch]:
    """Pack ``examples`` into rows of at most ``max_tokens`` tokens; every example is in exactly one.

    Of several ranks each gets its share of the rows, as many as any other; one for which none is left gets a row of
    weight 0.
    """
    lengths = [example.num_tokens for example in examples]
    rows = share_rows(pack_sequences(lengths, max_tokens), lengths, num_ranks=num_ranks, rank=rank)
    shortest = min(examples, key=lambda example: example.num_tokens, default=None)
    return [
        _packed([examples[index] for index in row], device) if row else _weightless(_packed([shortest], device))
        for row in rows
    ]


def _weightless(batch: PackedBatch) -> PackedBatch:
    """A row that runs as any other and teaches nothing."""
    nothing = {name: torch.zeros_like(getattr(batch, name)) for name in ("weights", "thinking_weights")}
    return replace(batch, **nothing, num_items=0, num_thinking=0)


def _packed(examples: list[Example], device: torch.device | str) -> PackedBatch:
    layout = packed_layout(
        [len(example.input_ids) for example in examples],
        [[(branch.cut, len(branch.input_ids)) for branch in example.branches] for example in examples],
    )
    # Trunks and branches in the order of the row.
    segments: list[Example | Branch] = []
    trace_indices, thinking_rows = [], []
    for example, order in zip(examples, layout.branch_order, strict=True):
        first = int(layout.starts[len(segments)]) + example.thinking_start
        thinking_rows.extend(range(first, first + len(example.thinking_labels)))
        segments += [example, *(example.branches[place] for place in order)]
        trace_indices += [example.trace_index] * (1 + len(order))
    rows, weights = [], []
    for segment, end in zip(segments, (layout.starts + layout.lengths).tolist(), strict=True):
        rows.extend(_label_rows(segment, end))
        weights.extend([segment.count] * len(segment.labels))

    def tensor(values: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).to(device)

    lengths, cuts = layout.lengths, layout.cuts
    # A reasoning token is learnt once for every sequence that shows it.
    shown = layout.multiplicity(torch.tensor([segment.count for segment in segments]))
    thinking_weights = shown[torch.tensor(thinking_rows, dtype=torch.int64) + 1]
    return PackedBatch(
        input_ids=tensor(chain.from_iterable(segment.input_ids for segment in segments)),
        layout=layout.to(device),
        rows=tensor(rows),
        labels=tensor(chain.from_iterable(segment.labels for segment in segments)),
        weights=tensor(weights, torch.float32),
        thinking_rows=tensor(thinking_rows),
        thinking_labels=tensor(chain.from_iterable(example.thinking_labels for example in examples)),
        thinking_weights=thinking_weights.to(device=device, dtype=torch.float32),
        num_items=sum(example.num_items for example in examples),
        num_thinking=sum(example.num_thinking for example in examples),
        num_pairs=int((lengths * cuts + lengths * (lengths + 1) // 2).sum()),
        trace_indices=tuple(trace_indices),
    )


def _label_rows(segment: Example | Branch, end: int) -> Iterable[int]:
    """Where in the row of tokens the labels of a segment that ends at ``end`` are predicted."""
    if isinstance(segment, Example) and segment.rows is not None:
        return [end - len(segment.input_ids) + row for row in segment.rows]
    return range(end - len(segment.labels), end)


class TraceStream:
    """The endless order of traces: every epoch a new permutation, steps cut from the stream across epoch edges.

    Traces that are ``held_out`` never come. Stateless: the step number alone tells what a step holds, so a resumed run
    sees exactly what it would have seen.
    """

    def __init__(self, num_traces: int, *, batch_size: int, seed: int, held_out: Collection[int] = ()) -> None:
        self._learnt = sorted(set(range(num_traces)) - set(held_out))
        if not self._learnt:
            raise ValueError("no traces to train on")
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def num_traces(self) -> int:
        """Traces of an epoch."""
        return len(self._learnt)

    def step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, trace index) of every trace in optimizer step ``step``, counted from 0."""
        first = step * self.batch_size
        return [self._at(index) for index in range(first, first + self.batch_size)]

    def _at(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.num_traces)
        if self._order[0] != epoch:
            order = list(self._learnt)
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return epoch, self._order[1][place]
