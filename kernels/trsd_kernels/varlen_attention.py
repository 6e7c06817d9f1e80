"""Attention over packed sequences: each sequence attends to itself alone, by scaled-dot-product attention.

    o_i = sum_{j in seq(i), j <= i} softmax_j(q_i . k_j * softmax_scale) v_j                                  (1)

Runs on every device and dtype; memory O(tokens * heads) beside the output, never tokens^2 of the packed row.
"""

import torch
from torch import Tensor

from trsd_kernels.checks import check_cu_seqlens


def varlen_attention(
    query: Tensor,  # [total_tokens, num_heads, head_dim]
    key: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    value: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    cu_seqlens: Tensor,  # int32 [num_seqs + 1]
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention that never crosses a sequence end.

    Args:
        query: [total_tokens, num_heads, head_dim].
        key, value: [total_tokens, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        cu_seqlens: int32 [num_seqs + 1] on the same device; an empty sequence is fine.
        softmax_scale: multiplies the scores; None is head_dim ** -0.5.
        causal: a token sees itself and what came before it in its own sequence.

    Returns:
        [total_tokens, num_heads, head_dim].

    Raises:
        ValueError: shapes, heads or ``cu_seqlens`` that do not fit.
    """
    if query.ndim != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "expected query [total_tokens, num_heads, head_dim] and key, value [total_tokens, num_kv_heads, head_dim], "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    groups, rest = divmod(query.shape[1], key.shape[1])
    if rest:
        raise ValueError(f"expected num_kv_heads to divide num_heads, got {key.shape[1]} and {query.shape[1]}")
    check_cu_seqlens(cu_seqlens, total_tokens=query.shape[0], device=query.device)

    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = cu_seqlens.diff().tolist()
    parts = (tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value))
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=causal, scale=softmax_scale
        )
        for q, k, v in zip(*parts, strict=True)
    ]  # each [1, num_heads, length, head_dim]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
