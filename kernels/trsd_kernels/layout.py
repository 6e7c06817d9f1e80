"""Packing metadata: which sequences share a row, what each token may see, and which token predicts which.

A packed row is several sequences laid end to end without padding. In its branch form a row holds **segments**: a
trunk, then the branches that continue it. Branch b of a trunk continues the trunk's first ``cut`` tokens, so the row
stands for the sequences

    trunk    and, for every branch b,    trunk[:cut_b] + branch_b                                               (1)

while it holds len(trunk) + sum_b len(branch_b) tokens instead of len(trunk) + sum_b (cut_b + len(branch_b)). A row
without branches is plain varlen packing. Host cost O(tokens), vectorised, and O(n log n) in the number of sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trsd_kernels.checks import check_cu_seqlens, check_cuts

MAX_TOKENS = 2**31 - 1  # offsets are int32, as flash-attn's are


def pack_sequences(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best-fit-decreasing packing: each sequence, longest first, goes to the fullest row that still has room.

    Args:
        lengths: tokens of each sequence, positive.
        max_tokens: most tokens in a row.

    Returns:
        Rows of indices into ``lengths``; every index appears exactly once, in rising order inside a row. The same
        input always gives the same rows.

    Raises:
        ValueError: a sequence that is empty or longer than ``max_tokens``, by its index.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens: expected 1 to max_tokens={max_tokens}; "
                "raise max_tokens_per_batch or drop the sequence"
            )
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(open_rows, (lengths[index], -1))
        if place == len(open_rows):
            rows.append([])
            room, row = max_tokens, len(rows) - 1
        else:
            room, row = open_rows.pop(place)
        rows[row].append(index)
        insort(open_rows, (room - lengths[index], row))
    return [sorted(row) for row in rows]


def fill_rate(lengths: Sequence[int], num_rows: int, max_tokens: int) -> float:
    """Share of ``num_rows`` rows of ``max_tokens`` tokens that sequences of ``lengths`` fill; 1.0 without rows."""
    return sum(lengths) / (num_rows * max_tokens) if num_rows else 1.0


# Not frozen: of what is, torch.compile guards every field in torch 2.11, and compiles anew for each layout.
@dataclass(eq=False)
class PackedLayout:
    """One packed row of tokens: where each segment lies and what it continues. Made by ``packed_layout``.

    The first four fields are int64 [num_segments] on the host, in the order of the row; the others are made for the
    device. What attention back ends derive from a layout is kept with it, so use one layout in all layers of a model,
    and change none of its fields.
    """

    starts: Tensor
    """First token of each segment."""
    lengths: Tensor
    """Tokens of each segment."""
    trunks: Tensor
    """The segment that each one continues; itself for a trunk."""
    cuts: Tensor
    """How many tokens of its trunk each segment continues; 0 for a trunk."""
    cu_seqlens: Tensor
    """int32 [num_segments + 1], flash-attn's name: trunks and branches alike are segments."""
    position_ids: Tensor
    """int64 [num_tokens]: a branch goes on counting from its cut. Pass it to the model explicitly."""
    predictors: Tensor
    """int64 [num_tokens]: the token whose hidden state predicts this one; -1 for the first token of a sequence."""
    num_trunks: int
    """Segments that continue nothing."""
    branch_order: tuple[tuple[int, ...], ...]
    """For each trunk, which of the branches it was given with lies first, second, ... (they are sorted by cut)."""
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return self.position_ids.numel()

    @property
    def num_segments(self) -> int:
        """Trunks and branches in the row."""
        return self.starts.numel()

    @property
    def device(self) -> torch.device:
        """Where attention over this layout runs."""
        return self.position_ids.device

    @property
    def has_branches(self) -> bool:
        """Whether any segment continues another; without, this is plain varlen packing."""
        return self.num_segments > self.num_trunks

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return self.derived("max_seqlen", lambda: int(self.lengths.max()))

    @property
    def max_position(self) -> int:
        """The highest position of any token; -1 for an empty row."""
        return self.derived("max_position", lambda: int((self.lengths + self.cuts).max()) - 1)

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, once per ``key`` and layout."""
        if key not in self._derived:
            with torch.inference_mode(False):  # what evaluation makes, training may save for its backward
                self._derived[key] = make()
        return self._derived[key]

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(start, length, start of the trunk, cut) of each segment."""
        return self.derived(
            "segments",
            lambda: torch.stack([self.starts, self.lengths, self.starts[self.trunks], self.cuts], 1).tolist(),
        )

    def sequence(self, segment: int) -> Tensor:
        """The tokens of the sequence that ends in ``segment``, (1), as indices into the row: int64, on the host."""
        start, length, trunk, cut = self.segments()[segment]
        return torch.cat([torch.arange(trunk, trunk + cut), torch.arange(start, start + length)])

    def multiplicity(self, segment_weights: Tensor | None = None) -> Tensor:
        """In how many of the sequences (1) each token stands: float64 [num_tokens], on the layout's device.

        Args:
            segment_weights: float64 or int64 [num_segments] on the host: what the sequence that ends in each segment
                counts; None is 1 each. Give a trunk 0 that is no example of its own.
        """
        weights = torch.ones(self.num_segments) if segment_weights is None else segment_weights
        change = torch.zeros(self.num_tokens + 1, dtype=torch.float64)
        weights = weights.to(torch.float64)
        for begin, length in ((self.starts, self.lengths), (self.starts[self.trunks], self.cuts)):
            change.index_add_(0, begin, weights)
            change.index_add_(0, begin + length, -weights)
        return change.cumsum(0)[:-1].to(self.device)

    def to(self, device: torch.device | str) -> "PackedLayout":
        """This layout for another device."""
        moved = [tensor.to(device) for tensor in (self.cu_seqlens, self.position_ids, self.predictors)]
        if moved[0].device == self.device:
            return self
        return PackedLayout(
            *(self.starts, self.lengths, self.trunks, self.cuts, *moved, self.num_trunks, self.branch_order)
        )


def packed_layout(
    lengths: Sequence[int],
    branches: Sequence[Sequence[tuple[int, int]]] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """The layout of trunks laid end to end, each followed by its branches in rising order of their cuts.

    Args:
        lengths: tokens of each trunk (each sequence, where nothing branches).
        branches: for each trunk, its branches as (cut, length): how many of the trunk's tokens the branch continues
            (0 and the whole trunk included), and how many tokens it has itself. None: no branches.
        device: where attention will run.

    Returns:
        The layout; ``branch_order`` tells where given branches lie when their cuts were not sorted.

    Raises:
        ValueError: a negative length, a cut outside its trunk, or more tokens than int32 can count.
        TypeError: a length or cut that is no integer.
    """
    if len(lengths) == 0:
        raise ValueError("lengths: expected at least one trunk, got none")
    given = [list(parts) for parts in branches] if branches is not None else [[] for _ in lengths]
    if len(given) != len(lengths):
        raise ValueError(f"branches: expected one list per trunk, got {len(given)} for {len(lengths)} trunks")
    check_cuts(lengths, given)
    order = tuple(tuple(sorted(range(len(parts)), key=lambda i, p=parts: p[i][0])) for parts in given)
    counts = torch.tensor([1 + len(parts) for parts in given])
    first = counts.cumsum(0) - counts
    trunks = torch.repeat_interleave(first, counts)
    table = []  # (cut, length) of each segment
    for length, parts, places in zip(lengths, given, order, strict=True):
        table += [(0, length), *(parts[place] for place in places)]
    cuts, sizes = torch.tensor(table, dtype=torch.int64).unbind(1)
    if int(sizes.sum()) > MAX_TOKENS:
        raise ValueError(f"expected at most {MAX_TOKENS:,} tokens in a row, got {int(sizes.sum()):,}: pack fewer")
    return _build(sizes, trunks, cuts, order).to(device)


def layout_of(cu_seqlens: Tensor, *, total_tokens: int | None = None) -> PackedLayout:
    """The plain layout of flash-attn's ``cu_seqlens``, on its device; on a GPU this waits to read it.

    Args:
        cu_seqlens: int32 [num_seqs + 1], from 0 to the number of tokens.
        total_tokens: tokens of the row, where known, to check against.

    Raises:
        ValueError: offsets that are no cumulative sum of lengths.
    """
    offsets = check_cu_seqlens(cu_seqlens, total_tokens=total_tokens)
    sizes = torch.tensor(offsets).diff()
    count = torch.arange(len(sizes))
    order = ((),) * len(sizes)
    return _build(sizes, count, torch.zeros_like(sizes), order).to(cu_seqlens.device)


def _build(sizes: Tensor, trunks: Tensor, cuts: Tensor, order: tuple[tuple[int, ...], ...]) -> PackedLayout:
    ends = sizes.cumsum(0)
    starts, num_tokens = ends - sizes, int(ends[-1])
    tokens = torch.arange(num_tokens)
    predictors = tokens - 1
    occupied = sizes > 0
    before = torch.where(cuts > 0, starts[trunks] + cuts - 1, -1)
    predictors[starts[occupied]] = before[occupied]
    return PackedLayout(
        starts=starts,
        lengths=sizes,
        trunks=trunks,
        cuts=cuts,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        position_ids=tokens + torch.repeat_interleave(cuts - starts, sizes),
        predictors=predictors,
        num_trunks=len(order),
        branch_order=order,
    )


def shift_labels(labels: Tensor, layout: PackedLayout, *, ignore_index: int = -100) -> Tensor:
    """Labels moved to the token that predicts them, never across a sequence end.

    Args:
        labels: [num_tokens] int64, label i the target at token i itself.
        layout: of a row without branches: in a row with them a trunk token may predict several (``predicting_rows``).
        ignore_index: what the last token of each sequence gets.

    Returns:
        [num_tokens] int64: what each token's hidden state is to predict.
    """
    if layout.has_branches:
        raise ValueError("shift_labels: with branches one token may predict several; use predicting_rows")
    _check_labels_of_row(labels, layout)
    # The token after i is predicted by i unless it begins a sequence, as the first of the row, rolled to the end, does.
    return torch.where(layout.predictors.roll(-1) >= 0, labels.roll(-1), ignore_index)


def predicting_rows(labels: Tensor, layout: PackedLayout, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Which hidden states to feed a loss, and their labels; works with branches.

    Args:
        labels: [num_tokens] int64, label i the target at token i itself; ``ignore_index`` where there is none.
        layout: of the row.
        ignore_index: marks tokens that nobody has to predict.

    Returns:
        (rows, labels), each int64 [num_labels]: ``hidden_states[rows]`` predict ``labels``. A trunk token before
        several cuts appears once for each token it predicts. The first token of a sequence has no predictor and is
        left out. On a GPU this waits for the count.
    """
    _check_labels_of_row(labels, layout)
    chosen = ((labels != ignore_index) & (layout.predictors >= 0)).nonzero()[:, 0]
    return layout.predictors[chosen], labels[chosen]


def _check_labels_of_row(labels: Tensor, layout: PackedLayout) -> None:
    if labels.shape != (layout.num_tokens,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({layout.num_tokens},), one per token of the row, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
