"""The distillation loss of two tensors of logits that already exist: row kernels alone, no product.

Forward reads each logit once (twice for divergences from a mixture) and keeps 64 bytes a row; backward reads them
again and writes the gradient, into a new tensor or into the student's own. The kernels make nothing else of
[num_tokens, vocab_size]; plain torch, without a GPU, takes copies. Loss and per-token losses are differentiable for the
student's logits.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.library import triton_op, wrap_triton

from trsd_kernels.checks import (
    check_label_range,
    check_labels,
    check_logits,
    check_same_device,
    check_token_weights,
)
from trsd_kernels.linear_ops import refuse_forward_mode, refuse_second_derivative
from trsd_kernels.options import DistillOptions
from trsd_kernels.products import rows_class, triton_interpreted
from trsd_kernels.reduction import LinearDistillationOutput, check_reduction, reduced_output, weights_and_items
from trsd_kernels.row_state import TokenTerms, finish, new_state
from trsd_kernels.torch_rows import TorchRows

# Where there is no Triton, torch warns for each op below that it finds no kernels in it; there are none to be found.
logging.getLogger("torch._library.triton").addFilter(lambda record: "Triton not available" not in str(record.msg))


def _has_values(tensor: Tensor) -> bool:
    """Whether a pass may look at what it works on: not on a GPU, which it would wait for, nor where it is traced."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter) and get_proxy_mode() is None


def _rows(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, options: DistillOptions):
    """The row passes over whole logits, which they leave as they are."""
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    Rows = rows_class(student_logits.device, dtype)
    if Rows is TorchRows:
        copies = (None if x is None else x.to(dtype, copy=True) for x in (student_logits, teacher_logits))
        return TorchRows(options, *copies, labels, masked=None if _has_values(student_logits) else True), dtype
    launch = (lambda kernel: kernel) if triton_interpreted(student_logits.device) else wrap_triton
    return Rows(options, student_logits, teacher_logits, labels, launch=launch), dtype


@triton_op("trsd::distill_logits", mutates_args=())
def distill_logits(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, encoded_options: str, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cross-entropy [N], divergence [N], the other TokenTerms [3, N], state); 0 in ignored rows.

    A label outside the vocabulary gives a NaN cross-entropy: a compiled graph cannot stop for it.
    """
    options = DistillOptions.decode(encoded_options)
    rows, dtype = _rows(student_logits, teacher_logits, labels, options)
    state = new_state(labels.shape[0], dtype=dtype, device=labels.device)
    rows.accumulate(state)
    rows.accumulate_mixture(state)
    terms = finish(state, options)
    inside = (labels >= 0) & (labels < student_logits.shape[1])
    terms = terms._replace(cross_entropy=torch.where(inside, terms.cross_entropy, math.nan))
    kept = labels != options.ignore_index
    cross_entropy, divergence, *others = (torch.where(kept, term, 0.0) for term in terms)
    return cross_entropy, divergence, torch.stack(others), state


@triton_op("trsd::distill_logits_backward", mutates_args=())
def distill_logits_backward(
    grad_terms: Tensor,
    state: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    encoded_options: str,
) -> Tensor:
    """dloss/dlogits in the logits' dtype, for upstream gradients [2, N] of cross-entropy and divergence."""
    rows, _ = _rows(student_logits, teacher_logits, labels, DistillOptions.decode(encoded_options))
    if isinstance(rows, TorchRows):
        return rows.gradient(state, grad_terms, student_logits.dtype)
    out = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
    return rows.gradient(state, grad_terms, student_logits.dtype, out)


@triton_op("trsd::distill_logits_backward_", mutates_args={"student_logits"})
def distill_logits_backward_(
    grad_terms: Tensor,
    state: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    encoded_options: str,
) -> None:
    """Like ``distill_logits_backward``, written over the student's logits."""
    rows, _ = _rows(student_logits, teacher_logits, labels, DistillOptions.decode(encoded_options))
    if isinstance(rows, TorchRows):
        student_logits.copy_(rows.gradient(state, grad_terms, student_logits.dtype))
    else:
        rows.gradient(state, grad_terms, student_logits.dtype, student_logits)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    student_logits, teacher_logits, labels, ctx.encoded_options, ctx.inplace = inputs
    ctx.save_for_backward(output[3], student_logits, teacher_logits, labels)


def _backward(ctx, grad_cross_entropy, grad_divergence, *_):
    refuse_second_derivative()
    if grad_cross_entropy is None and grad_divergence is None:
        return None, None, None, None, None
    state, student_logits, *others = ctx.saved_tensors
    zeros = torch.zeros_like(state[0])
    grads = torch.stack([zeros if grad is None else grad for grad in (grad_cross_entropy, grad_divergence)])
    ignored = others[-1] == DistillOptions.decode(ctx.encoded_options).ignore_index
    arguments = (torch.where(ignored, 0.0, grads), state, student_logits, *others, ctx.encoded_options)
    if ctx.inplace:
        distill_logits_backward_(*arguments)
        return student_logits, None, None, None, None
    return distill_logits_backward(*arguments), None, None, None, None


distill_logits.register_autograd(_backward, setup_context=_setup)


def fused_distillation(
    student_logits: Tensor,  # [num_tokens, vocab_size]
    teacher_logits: Tensor | None,  # [num_tokens, vocab_size]
    labels: Tensor,  # [num_tokens]
    *,
    token_weights: Tensor | None = None,  # [num_tokens]
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    **options: Any,
) -> LinearDistillationOutput:
    """(1 - alpha) cross-entropy + alpha divergence of two tensors of logits that already exist.

    Args:
        student_logits: [num_tokens, vocab_size] fp32, bf16, fp16 (or fp64 on plain torch), already aligned with
            ``labels``; -inf marks impossible tokens. Differentiable.
        teacher_logits: like ``student_logits``; never receives a gradient. None with ``alpha`` 0.
        labels: [num_tokens] int64 in [0, vocab_size) or ``ignore_index``. With ``alpha`` 1 a mask only.
        token_weights: [num_tokens] floating, 1 for all when None; never receives a gradient.
        num_items_in_batch: the denominator of reduction "mean"; None: this call's own sum of weights.
        reduction: "mean", "sum", or "none" for [num_tokens] differentiable losses.
        inplace_backward: write the gradient over ``student_logits``, which nothing else may need by then (autograd
            raises where something does).
        **options: any field of ``DistillOptions``.

    Returns:
        Loss, its two terms, the denominator and every token's terms.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with what to do. Inside torch.compile a label
            out of range shows as a NaN loss instead.
        TypeError: a keyword that is no option, or what should be a tensor is none.
    """
    settings = DistillOptions(**options)
    refuse_forward_mode(student_logits, teacher_logits)
    check_reduction(reduction, num_items_in_batch)
    check_logits(student_logits, teacher_logits)
    if teacher_logits is None and settings.alpha > 0.0:
        raise ValueError(f"alpha={settings.alpha} gives the divergence a share: teacher_logits are needed (or alpha=0)")
    check_same_device(
        student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, token_weights=token_weights
    )
    check_labels(labels, num_tokens=student_logits.shape[0])
    if token_weights is not None:
        check_token_weights(token_weights, num_tokens=student_logits.shape[0])
    if not torch.compiler.is_compiling():
        check_label_range(labels, vocab_size=student_logits.shape[1], ignore_index=settings.ignore_index)
    if inplace_backward and student_logits.stride(0) < student_logits.shape[1]:
        raise ValueError("inplace_backward needs rows of their own: these student_logits overlap (an expanded tensor?)")
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    weights, num_items = weights_and_items(
        labels, token_weights, num_items_in_batch, reduction, ignore_index=settings.ignore_index, dtype=dtype
    )
    student_logits, teacher_logits = (_unit_stride(logits) for logits in (student_logits, teacher_logits))
    cross_entropy, divergence, others, _ = distill_logits(
        student_logits,
        None if settings.alpha == 0.0 else teacher_logits,
        labels.contiguous(),
        settings.encode(),
        inplace_backward,
    )
    terms = TokenTerms(cross_entropy, divergence, *others.unbind())
    return reduced_output(terms, weights, num_items, settings, reduction)


def _unit_stride(logits: Tensor | None) -> Tensor | None:
    """The kernels walk a row along neighbouring addresses."""
    return logits if logits is None or logits.stride(1) == 1 else logits.contiguous()
