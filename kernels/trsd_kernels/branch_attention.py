"""Causal attention over packed rows with branches, by our Triton kernels, as a dispatcher op.

    o_i = sum_{j in visible(i)} softmax_j(softmax_scale q_i . k_j) v_j                                          (1)

where a trunk's token sees its trunk up to itself, and a branch's token sees the first ``cut`` tokens of its trunk and
then its own branch up to itself. A row without branches is plain varlen attention: one kernel serves both. Saved for
the backward: inputs, output and one fp32 number per token and head. The layout is the one tree attention uses with a
single level (Tree Training, arXiv 2511.00413), but cuts may lie anywhere in the trunk and no bit mask is read.
"""

import contextlib

import torch
from torch import Tensor
from torch.library import custom_op

from trsd_kernels.attention_tiles import Tiling, key_tiles, positions, prefix_ends, query_tiles
from trsd_kernels.layout import PackedLayout
from trsd_kernels.linear_ops import refuse_second_derivative

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, at least what a matrix unit takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


# (forward, query gradient, key gradient) by kind of GPU and padded head_dim. Each was compiled ahead of time with and
# without soft cap and window: none spills, which is what keeps the key gradient's tiles small, and those of kind 8 fit
# the 99 KiB of shared memory that all but data center GPUs have.
_HALF_TILINGS = {
    (8, 64): (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(32, 64, 4, 1)),
    (8, 128): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(32, 64, 8, 2)),
    (8, 256): (Tiling(64, 64, 8, 1), Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 2)),
    (9, 64): (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 2)),
    (9, 128): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 2)),
    (9, 256): (Tiling(128, 64, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    (10, 64): (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 1)),
    (10, 128): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 1)),
    (10, 256): (Tiling(128, 32, 8, 2), Tiling(64, 64, 8, 2), Tiling(32, 32, 8, 1)),
}
_FP32_TILINGS = {
    64: (Tiling(64, 32, 8, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 8, 2)),
    128: (Tiling(16, 32, 8, 2), Tiling(16, 32, 8, 1), Tiling(16, 16, 8, 1)),
}


def max_head_dim(dtype: torch.dtype) -> int:
    """fp32 tiles of more columns would not fit the registers."""
    return 128 if dtype == torch.float32 else 256


def tilings(head_dim: int, dtype: torch.dtype, capability: int = 9) -> tuple[Tiling, Tiling, Tiling]:
    """Of the forward, the query gradient and the key gradient, on a GPU of compute capability ``capability``.x."""
    wide = max(64, padded_head_dim(head_dim))
    if dtype == torch.float32:
        return _FP32_TILINGS[wide]
    return _HALF_TILINGS[{9: 9, 10: 10, 11: 10}.get(capability, 8), wide]


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major if device.type == "cuda" else 9


def triton_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    layout: PackedLayout,
    *,
    softmax_scale: float,
    window: int = 0,
    softcap: float = 0.0,
    blocks: tuple[Tiling, Tiling, Tiling] | None = None,
) -> Tensor:
    """(1) by the kernels, differentiable in query, key and value; [num_tokens, num_heads, head_dim].

    Args:
        query, key, value: bf16, fp16 or fp32, checked by the caller; head_dim at most ``max_head_dim(dtype)``.
        layout: of the row, on the same device.
        softmax_scale: multiplies the scores.
        window: a token sees itself and the ``window - 1`` before it; 0: all of them.
        softcap: scores are capped to ``softcap * tanh(score / softcap)``; 0: they are not.
        blocks: tilings other than those of ``tilings``.
    """
    forward, query_gradient, key_gradient = blocks or tilings(query.shape[2], query.dtype, _capability(query.device))
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    return branch_attention_op(
        query,
        key,
        value,
        query_tiles(layout, forward.block_m),
        query_tiles(layout, query_gradient.block_m),
        key_tiles(layout, key_gradient.block_n, window),
        prefix_ends(layout),
        positions(layout),
        [*forward, *query_gradient, *key_gradient],
        softmax_scale,
        softcap,
        window,
    )[0]


def _flags(query: Tensor, key: Tensor, softcap: float, window: int, tiling: Tiling) -> dict[str, object]:
    head_dim = query.shape[2]
    return dict(
        GROUP=query.shape[1] // key.shape[1],
        HAS_SOFTCAP=softcap != 0.0,
        HAS_WINDOW=window != 0,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _launch(kernel, programs: int, *arguments, device: torch.device, **flags) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **flags)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@custom_op("trsd::branch_attention", mutates_args=())
def branch_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forward_tiles: Tensor,
    query_gradient_tiles: Tensor,
    key_gradient_tiles: Tensor,
    prefix_ends: Tensor,
    positions: Tensor,
    blocks: list[int],
    softmax_scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse fp32 [H, T]); tile lists as ``attention_tiles`` makes them, ``blocks`` three ``Tiling``."""
    from trsd_kernels.attention_kernels import _forward_kernel

    num_tokens, num_heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    if len(forward_tiles):
        _launch(
            *(_forward_kernel, len(forward_tiles) * num_heads),
            *(query, key, value, out, lse, forward_tiles),
            *_strides(query, key, value, out),
            *(num_tokens, num_heads, softmax_scale, softcap, window),
            device=query.device,
            **_flags(query, key, softcap, window, Tiling(*blocks[:4])),
        )
    return out, lse


@branch_attention_op.register_fake
def _(query, key, value, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@custom_op("trsd::branch_attention_backward", mutates_args=())
def branch_attention_backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_gradient_tiles: Tensor,
    key_gradient_tiles: Tensor,
    prefix_ends: Tensor,
    positions: Tensor,
    blocks: list[int],
    softmax_scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), contiguous, of the inputs' shapes and dtype."""
    from trsd_kernels.attention_kernels import _key_gradient_kernel, _query_gradient_kernel

    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    (num_tokens, num_heads, _), num_kv_heads = query.shape, key.shape[1]
    if len(query_gradient_tiles):
        _launch(
            *(_query_gradient_kernel, len(query_gradient_tiles) * num_heads),
            *(query, key, value, out, grad_out, lse, delta, grad_query, query_gradient_tiles),
            *_strides(query, key, value, out, grad_out, grad_query),
            *(num_tokens, num_heads, softmax_scale, softcap, window),
            device=query.device,
            **_flags(query, key, softcap, window, Tiling(*blocks[4:8])),
        )
        _launch(
            *(_key_gradient_kernel, len(key_gradient_tiles) * num_kv_heads),
            *(query, key, value, grad_out, lse, delta, grad_key, grad_value, prefix_ends, positions),
            key_gradient_tiles,
            *_strides(query, key, value, grad_out, grad_key, grad_value),
            *(num_tokens, num_kv_heads, softmax_scale, softcap, window),
            device=query.device,
            **_flags(query, key, softcap, window, Tiling(*blocks[8:])),
        )
    return grad_query, grad_key, grad_value


@branch_attention_backward_op.register_fake
def _(grad_out, query, key, value, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx, inputs, output) -> None:
    query, key, value, _, *rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, *rest[:4])
    ctx.rest = rest[4:]


def _backward(ctx, grad_out, _):
    refuse_second_derivative()
    if grad_out is None:
        return (None,) * 12
    gradients = branch_attention_backward_op(grad_out, *ctx.saved_tensors, *ctx.rest)
    return *gradients, *(None,) * 9


branch_attention_op.register_autograd(_backward, setup_context=_setup)
