"""Packed rows to test attention on, the oracle's answers, and plain varlen kernels without a GPU."""

import torch
from hypothesis import strategies as st

from trsd_kernels import PackedLayout, packed_layout
from trsd_kernels.merged_attention import Piece
from trsd_kernels.reference import packed_attention

ROWS = {
    "one token": ([1], None),
    "one sequence": ([37], None),
    "sequences": ([3, 0, 40, 1, 17], None),
    "one branch": ([20], [[(11, 6)]]),
    "cuts at both ends": ([33], [[(0, 5), (33, 7), (16, 1), (32, 3)]]),
    "branches not sorted, cuts shared": ([50, 30], [[(40, 9), (7, 20), (40, 2), (0, 3)], [(30, 1), (1, 18)]]),
    "traces with and without branches": ([9, 64, 1, 70], [[], [(63, 2), (64, 33), (31, 5)], [(1, 4), (0, 4)], []]),
    "an empty trunk and an empty branch": ([0, 12], [[(0, 6)], [(5, 0), (8, 4)]]),
}


def row(name, device="cpu"):
    """The layout of one of ``ROWS``."""
    lengths, branches = ROWS[name]
    return packed_layout(lengths, branches, device=device)


@st.composite
def rows(draw, longest=60):
    """Trunks with any number of branches, cut anywhere: (lengths, branches)."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=5))
    branches = [
        draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, longest // 2)), max_size=5))
        for length in lengths
    ]
    return lengths, branches


def draw_tensors(layout: PackedLayout, *, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float64, seed=0):
    """(query, key, value, upstream gradient)."""
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [
        torch.randn(layout.num_tokens, count, head_dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .to(layout.device)
        for count in heads
    ]


def with_gradients(attend, query, key, value, grad_out):
    """[out, dquery, dkey, dvalue] of ``attend(query, key, value)``."""
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def expected(layout, query, key, value, grad_out, **options):
    """The oracle's [out, dquery, dkey, dvalue] in float64 on the very inputs."""
    doubles = [x.double() for x in (query, key, value, grad_out)]
    return with_gradients(lambda *qkv: packed_attention(*qkv, layout, **options), *doubles)


def errors(got, exact):
    """Relative error of each tensor; of tensors that are all zero, the absolute one."""
    return [float((a.double() - b).norm() / (b.norm() if b.norm() else 1.0)) for a, b in zip(got, exact, strict=True)]


class PlainKernels:
    """Varlen attention, sequence by sequence in plain torch: what ``merged_attention`` asks of a back end."""

    @staticmethod
    def _scores(query, key, causal, scale, softcap):
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        return scores

    @staticmethod
    def _sequences(piece: Piece):
        bounds = piece.cu_seqlens_q.tolist(), piece.cu_seqlens_k.tolist()
        for (q0, q1), (k0, k1) in zip(*(zip(b, b[1:], strict=False) for b in bounds), strict=True):
            assert q1 - q0 <= piece.max_seqlen_q and k1 - k0 <= piece.max_seqlen_k
            yield slice(q0, q1), slice(k0, k1)

    @classmethod
    def forward(cls, query, key, value, piece: Piece, *, softmax_scale, softcap):
        groups = query.shape[1] // key.shape[1]
        out, lse = torch.full_like(query, torch.nan), query.new_full((query.shape[1], query.shape[0]), torch.nan)
        for q, k in cls._sequences(piece):
            keys, values = (x[k].repeat_interleave(groups, 1) for x in (key, value))
            scores = cls._scores(query[q], keys, piece.causal, softmax_scale, softcap)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse[:, q] = scores.logsumexp(-1)
        return out, lse

    @classmethod
    def backward(cls, grad_out, query, key, value, out, lse, piece: Piece, *, softmax_scale, softcap):
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        for q, k in cls._sequences(piece):
            keys, values = (x[k].repeat_interleave(groups, 1) for x in (key, value))
            scores = cls._scores(query[q], keys, piece.causal, softmax_scale, softcap)
            weights = torch.exp(scores - lse[:, q, None])
            delta = (grad_out[q] * out[q]).sum(-1).T[..., None]
            upstream = softmax_scale * weights * (torch.einsum("qhd,khd->hqk", grad_out[q], values) - delta)
            if softcap:
                upstream *= 1 - (scores.masked_fill(scores == -torch.inf, 0.0) / softcap) ** 2
            parts = [torch.einsum("hqk,khd->qhd", upstream, keys)]
            parts.append(torch.einsum("hqk,qhd->khd", upstream, query[q]).unflatten(1, (-1, groups)).sum(2))
            by_value = torch.einsum("hqk,qhd->khd", weights, grad_out[q])
            parts.append(by_value.unflatten(1, (-1, groups)).sum(2))
            for gradient, where, part in zip(gradients, (q, k, k), parts, strict=True):
                gradient[where] += part
        return gradients
