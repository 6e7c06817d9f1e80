"""Packing metadata: which sequences share a row, where each begins, and the position of every token.

A packed row is several sequences laid end to end without padding. ``cu_seqlens`` (int32 [num_seqs + 1], flash-attn's
name) holds their offsets; attention never crosses one. Host cost O(n log n) in the number of sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor


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


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Offsets of sequences laid end to end: int32 [num_seqs + 1], from 0 to the sum of ``lengths``."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets.to(device=device, dtype=torch.int32)


def position_ids_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Positions that start again at 0 with each sequence: int64 [sum of ``lengths``]."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.cumsum(counts, 0) - counts
    return (torch.arange(int(counts.sum())) - torch.repeat_interleave(starts, counts)).to(device)
