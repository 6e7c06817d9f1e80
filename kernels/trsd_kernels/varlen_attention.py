"""Attention over packed rows: one function, flash-attn's argument names, several back ends.

    o_i = sum_{j in visible(i)} softmax_j(q_i . k_j * softmax_scale) v_j                                          (1)

A token sees the sequence it stands in, up to itself if causal. A row may hold branches that continue a trunk
(``packed_layout``); then a branch sees the first ``cut`` tokens of its trunk and its own tokens. Memory beside the
output is O(tokens * heads) but for what ``sdpa_attention`` says of itself; never tokens^2 of the packed row.
"""

import warnings

import torch
from torch import Tensor

from trsd_kernels.attention_backends import BACKENDS, AttentionRequest, choose_backend
from trsd_kernels.checks import check_attention, check_tensors
from trsd_kernels.layout import PackedLayout, layout_of

_SAID: set[tuple[str, bool, str]] = set()


def varlen_attention(
    query: Tensor,  # [total_tokens, num_heads, head_dim]
    key: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    value: Tensor,  # [total_tokens, num_kv_heads, head_dim]
    cu_seqlens_q: Tensor | None = None,  # int32 [num_seqs + 1]
    *,
    layout: PackedLayout | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention that never crosses a sequence end, differentiable in query, key and value.

    Args:
        query: [total_tokens, num_heads, head_dim].
        key, value: [total_tokens, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        cu_seqlens_q: int32 [num_seqs + 1] on the same device, of queries and keys alike; an empty sequence is fine. It
            is read and checked at every call, which on a GPU waits for the device: pass a layout instead.
        layout: what ``packed_layout`` or ``layout_of`` made, for rows with or without branches; used in all layers, its
            tile lists are made once.
        softmax_scale: multiplies the scores; None is head_dim ** -0.5.
        causal: a token sees itself and what came before it in its sequence. Branches need it.
        window_size: (left, 0 or -1): with left >= 0 a token sees itself and ``left`` tokens before it; causal only.
        softcap: scores are capped to softcap * tanh(score / softcap); 0: they are not.
        backend: "flash_attn_4", "flash_attn_3", "flash_attn_2", "torch" (``torch.nn.attention.varlen``), "triton"
            (ours), "sdpa" (any device), or "auto", which takes the best that can and says once which. Name one under
            torch.compile; "triton" is one op there, whatever the layout.

    Returns:
        [total_tokens, num_heads, head_dim] in the inputs' dtype, or autocast's where that is on. With "triton", and
        with "sdpa" on a CPU, the same inputs always give the same bits, forward and backward; the others follow
        ``torch.use_deterministic_algorithms``.

    Raises:
        ValueError: shapes, heads, devices, ``cu_seqlens_q`` or ``layout`` that do not fit, or a named back end that
            cannot serve the call, with the reason.
    """
    if (cu_seqlens_q is None) == (layout is None):
        raise ValueError("expected cu_seqlens_q or layout, one of them")
    check_tensors(query=query, key=key, value=value)
    if query.ndim != 3:
        raise ValueError(
            f"query: expected [total_tokens, num_heads, head_dim], got {tuple(query.shape)}: the sequences of a batch "
            "stand one after the other, without a batch dimension"
        )
    layout = layout or layout_of(cu_seqlens_q, total_tokens=query.shape[0])
    query, key, value = _autocast(query, key, value)
    check_attention(query, key, value, num_tokens=layout.num_tokens, device=layout.device)
    window = _checked_window(window_size, causal=causal)
    if softcap < 0:
        raise ValueError(f"softcap: expected 0 (none) or more, got {softcap}")
    request = AttentionRequest(query.device, query.dtype, query.shape[2], layout.has_branches, causal, window, softcap)
    name = choose_backend(request, backend)
    if backend == "auto":
        _say_once(request, name)
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return BACKENDS[name].attend(
        query, key, value, layout, softmax_scale=scale, causal=causal, window=window, softcap=softcap
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as torch's own attention takes them; fp64 never."""
    device = tensors[0].device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    if any(x.dtype == torch.float64 for x in tensors):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _checked_window(window_size: tuple[int, int], *, causal: bool) -> int:
    """How many tokens a token sees, itself included; 0 for all."""
    left, right = window_size
    if left < 0:
        if right > 0:
            raise ValueError(f"window_size: expected (left, 0 or -1), got {window_size}")
        return 0
    if right > 0 or not causal:
        raise ValueError(f"window_size: expected (left, 0 or -1) and causal=True, got {window_size}, causal={causal}")
    return left + 1


def _say_once(request: AttentionRequest, name: str) -> None:
    said = (request.device.type, request.has_branches, name)
    if said not in _SAID and not torch.compiler.is_compiling():
        _SAID.add(said)
        message = f"varlen_attention takes back end {name} for {request.kind} on {request.device.type}"
        warnings.warn(f"{message}; backend= chooses", stacklevel=3)
