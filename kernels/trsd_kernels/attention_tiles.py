"""Tile lists of a packed layout: what each program of the attention kernels computes, heaviest first.

A tile never crosses a segment, so it has one trunk, one cut and one causal diagonal. A trunk's keys are read by two
contiguous runs of queries, the rest of the trunk and the branches cut after the keys, because branches follow their
trunk in rising order of their cuts. Everything here is vectorised on the host, O(tiles + tokens).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.layout import PackedLayout

QUERY_FIELDS = ("query_start", "query_end", "prefix_start", "prefix_length", "own_start")
KEY_FIELDS = ("key_start", "key_end", "own_end", "branches_start", "branches_end")


class Tiling(NamedTuple):
    """Block sizes and launch parameters of one kernel."""

    block_m: int
    """Queries in a tile."""
    block_n: int
    """Keys in a tile."""
    num_warps: int
    num_stages: int


def query_tiles(layout: PackedLayout, block: int) -> Tensor:
    """Tiles of up to ``block`` queries: int32 [num_tiles, 5], ``QUERY_FIELDS``, on the layout's device.

    Queries ``query_start`` to ``query_end`` see the ``prefix_length`` tokens from ``prefix_start`` on, and then the
    tokens from ``own_start`` on up to themselves.
    """
    return layout.derived(("query_tiles", block), lambda: _query_tiles(layout, block))


def key_tiles(layout: PackedLayout, block: int, window: int) -> Tensor:
    """Tiles of up to ``block`` keys: int32 [num_tiles, 5], ``KEY_FIELDS``, on the layout's device.

    Keys ``key_start`` to ``key_end`` are seen by the queries of their own segment from ``key_start`` to ``own_end``,
    causally, and by those of the branches from ``branches_start`` to ``branches_end``, up to ``prefix_ends``.
    ``window`` (0: none) leaves out queries that are too far away.
    """
    return layout.derived(("key_tiles", block, window), lambda: _key_tiles(layout, block, window))


def prefix_ends(layout: PackedLayout) -> Tensor:
    """For each token of a branch, where the trunk it sees ends: int32 [num_tokens], indices into the row."""
    return layout.derived(
        "prefix_ends",
        lambda: (
            torch.repeat_interleave(layout.starts[layout.trunks] + layout.cuts, layout.lengths)
            .to(torch.int32)
            .to(layout.device)
        ),
    )


def positions(layout: PackedLayout) -> Tensor:
    """The layout's position ids as int32 [num_tokens]."""
    return layout.derived("positions", lambda: layout.position_ids.to(torch.int32))


def _split(layout: PackedLayout, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(segment, start, end) of each tile of up to ``block`` tokens."""
    counts = (layout.lengths + block - 1) // block
    segment = torch.repeat_interleave(torch.arange(layout.num_segments), counts)
    first = counts.cumsum(0) - counts
    start = layout.starts[segment] + (torch.arange(len(segment)) - first[segment]) * block
    end = torch.minimum(start + block, (layout.starts + layout.lengths)[segment])
    return segment, start, end


def _heaviest_first(work: Tensor, columns: list[Tensor], device: torch.device) -> Tensor:
    order = work.argsort(descending=True, stable=True)
    return torch.stack(columns, 1)[order].to(torch.int32).contiguous().to(device)


def _query_tiles(layout: PackedLayout, block: int) -> Tensor:
    segment, start, end = _split(layout, block)
    prefix, own = layout.cuts[segment], layout.starts[segment]
    work = prefix + end - own
    return _heaviest_first(work, [start, end, layout.starts[layout.trunks][segment], prefix, own], layout.device)


def _key_tiles(layout: PackedLayout, block: int, window: int) -> Tensor:
    segment, start, end = _split(layout, block)
    is_trunk = layout.trunks == torch.arange(layout.num_segments)
    own_end = (layout.starts + layout.lengths)[segment]
    if window:
        own_end = torch.minimum(own_end, end - 1 + window)

    # Branches of all trunks, ascending by (trunk, cut): one search finds the first branch past any key of any trunk.
    branches = (~is_trunk).nonzero()[:, 0]
    span = layout.num_tokens + window + 2
    keys = layout.trunks[branches] * span + layout.cuts[branches]
    begins = torch.cat([layout.starts[branches], torch.tensor([layout.num_tokens])])
    group_end = torch.zeros(layout.num_segments, dtype=torch.int64)
    group_end.scatter_reduce_(0, layout.trunks, layout.starts + layout.lengths, "amax")

    def first_branch(after: Tensor) -> Tensor:
        """Start of the tile's first branch cut at ``after`` or later; the group's end when there is none."""
        place = torch.searchsorted(keys, segment * span + after.clamp(max=span - 1))
        return torch.minimum(begins[place], group_end[segment])

    first, last = first_branch(start - layout.starts[segment] + 1), group_end[segment]
    if window:
        last = first_branch(end - layout.starts[segment] - 1 + window)
    # A branch's own tokens are seen by no other segment.
    alone = ~is_trunk[segment]
    first, last = torch.where(alone, 0, torch.minimum(first, last)), torch.where(alone, 0, last)
    work = own_end - start + last - first
    return _heaviest_first(work, [start, end, own_end, first, last], layout.device)
