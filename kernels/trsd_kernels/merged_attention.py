"""Branches on kernels that only know plain varlen attention: exact, in pieces merged by their log-sum-exp.

Sorted cuts divide a trunk into parts, and each part is seen by the branches cut at its end or later, which lie next to
each other. So a row is one causal piece, every segment alone, and for every depth d one piece in which the branches of
all trunks meet the d-th part of theirs. With o_p and lse_p of each piece p that a query takes part in,

    lse = ln sum_p exp(lse_p),    o = sum_p exp(lse_p - lse) o_p                                                (1)

and the backward of each piece, given the merged o and lse, is its exact share of the gradient (as in ring attention,
arXiv 2310.01889). Beyond the saved state: fp32 copies of the output and of the gradients, O(tokens * heads).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trsd_kernels.layout import PackedLayout
from trsd_kernels.linear_ops import refuse_second_derivative


class Piece(NamedTuple):
    """One varlen call: which queries meet which keys, sequence by sequence."""

    query_rows: Tensor | None  # int64 [num_queries] on the device; None: all of them, and all keys
    key_rows: Tensor | None  # int64 [num_keys]
    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]
    cu_seqlens_k: Tensor  # int32 [num_seqs + 1]
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


class PieceKernels(Protocol):
    """A back end's raw forward and backward; ``lse`` is fp32 [num_heads, num_queries], natural logarithm."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, piece: Piece, *, softmax_scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the piece alone."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: Piece,
        *,
        softmax_scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dquery, dkey, dvalue) of the piece, where ``out`` and ``lse`` are those of the whole."""
        ...


def pieces(layout: PackedLayout) -> list[Piece]:
    """The varlen calls that make up a row, the causal one first."""
    return layout.derived("pieces", lambda: _pieces(layout))


def _pieces(layout: PackedLayout) -> list[Piece]:
    whole = Piece(None, None, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen, True)
    depths: list[list[tuple[int, int, int, int]]] = []  # (query start, end, key start, end) of each sequence
    groups: dict[int, list[tuple[int, int, int]]] = {}  # start of a trunk: its branches (start, end, cut)
    for start, length, trunk, cut in layout.segments():
        if cut and length:
            groups.setdefault(trunk, []).append((start, start + length, cut))
    for trunk, branches in groups.items():
        end, before = branches[-1][1], 0
        for depth, cut in enumerate(sorted({cut for _, _, cut in branches})):
            if depth == len(depths):
                depths.append([])
            first = next(start for start, _, other in branches if other >= cut)
            depths[depth].append((first, end, trunk + before, trunk + cut))
            before = cut
    return [whole, *(_piece_of(runs, layout.device) for runs in depths)]


def _piece_of(runs: list[tuple[int, int, int, int]], device: torch.device) -> Piece:
    table = torch.tensor(runs)

    def packed(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, int]:
        lengths = ends - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths)
        return rows.to(device), offsets.to(torch.int32).to(device), int(lengths.max())

    query_rows, cu_seqlens_q, max_seqlen_q = packed(table[:, 0], table[:, 1])
    key_rows, cu_seqlens_k, max_seqlen_k = packed(table[:, 2], table[:, 3])
    return Piece(query_rows, key_rows, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, False)


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    kernels: PieceKernels,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Causal branch attention by ``kernels``, differentiable; [num_tokens, num_heads, head_dim]."""
    return _Merged.apply(query, key, value, layout, kernels, softmax_scale, softcap)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, kernels, softmax_scale, softcap):
        options = dict(softmax_scale=softmax_scale, softcap=softcap)
        whole, *rest = pieces(layout)
        first, lse = kernels.forward(query, key, value, whole, **options)
        wide = torch.promote_types(query.dtype, torch.float32)
        merged, lse = first.to(wide), lse.clone()
        for piece in rest:
            rows, seen = piece.query_rows, piece.key_rows
            out, more = kernels.forward(query[rows], key[seen], value[seen], piece, **options)
            before = lse[:, rows]
            total = torch.logaddexp(before, more)
            merged[rows] = merged[rows] * _share(before, total) + out.to(wide) * _share(more, total)
            lse[:, rows] = total
        out = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.kernels, ctx.options = layout, kernels, options
        return out

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivative()
        query, key, value, out, lse = ctx.saved_tensors
        whole, *rest = pieces(ctx.layout)
        grad_out = grad_out.contiguous()
        parts = ctx.kernels.backward(grad_out, query, key, value, out, lse, whole, **ctx.options)
        sums = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        for piece in rest:
            rows, seen = piece.query_rows, piece.key_rows
            parts = ctx.kernels.backward(
                *(grad_out[rows], query[rows], key[seen], value[seen], out[rows], lse[:, rows].contiguous(), piece),
                **ctx.options,
            )
            for gradient, where, part in zip(sums, (rows, seen, seen), parts, strict=True):
                gradient[where] += part.to(gradient.dtype)
        return *(x.to(query.dtype) for x in sums), None, None, None, None


def _share(part: Tensor, total: Tensor) -> Tensor:
    """exp(part - total), [num_queries, num_heads, 1]."""
    return torch.exp(part - total).T[..., None]
