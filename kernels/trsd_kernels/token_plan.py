"""Plan ``tokens``: a chunk of C rows against the whole vocabulary, the gradient made in the forward, nothing twice.

Products for H_s, H_t: N V (6 H_s + 2 H_t) flops with a trained head, N V (4 H_s + 2 H_t) with a frozen one. Memory in
bytes beside inputs and outputs: what ``live_bytes`` says.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.options import DistillOptions
from trsd_kernels.products import (
    GradientScale,
    Head,
    accumulator_dtype,
    add_product_,
    product,
    row_weights,
    rows_class,
    scatter_rows,
)
from trsd_kernels.row_state import finish, new_state


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden_states: bool
    weight: bool
    bias: bool


class TokenPlanResult(NamedTuple):
    """Loss and gradients; a gradient that was not asked for is None."""

    loss: Tensor  # scalar
    terms: Tensor  # [len(TokenTerms), num_tokens]
    grad_hidden_states: Tensor | None  # [num_tokens, hidden_size]
    grad_weight: Tensor | None  # [vocab_size, hidden_size]
    grad_bias: Tensor | None  # [vocab_size]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients wait in fp32 for the upstream factor (a loss scale, say) before they are rounded."""
    return torch.float32 if dtype == torch.float16 else dtype


def row_chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk``."""
    return (slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk))


def run_token_plan(
    student: Head,
    teacher: Head | None,
    labels: Tensor,  # [num_tokens]
    weights: Tensor,  # [num_tokens], already divided by the number of items
    rows: Tensor | None,  # the supervised ones; None for all
    options: DistillOptions,
    needs: Needs,
    *,
    chunk: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> TokenPlanResult:
    """Loss, per-token terms and gradients of the supervised rows; see the module."""
    num_tokens, out_dtypes = len(labels), [gradient_dtype(x.dtype) for x in student[:2]]
    selected = slice(None) if rows is None else rows
    labels, weights = labels[selected].contiguous(), weights[selected]
    scale = GradientScale.of(row_weights(weights, options), student_dtype)
    state_dtype = accumulator_dtype(student_dtype)
    state = new_state(len(labels), dtype=state_dtype, device=labels.device)
    student_head = student.on_rows(slice(0, 0)).ready(student_dtype)
    teacher_head = None if teacher is None else teacher.on_rows(slice(0, 0)).ready(teacher_dtype)
    Rows = rows_class(labels.device, state_dtype)
    vocab_size, hidden_size = student.weight.shape
    dh = (
        torch.zeros(num_tokens, hidden_size, dtype=out_dtypes[0], device=labels.device) if needs.hidden_states else None
    )
    dw = db = None
    if needs.bias:
        db = torch.zeros(vocab_size, dtype=state_dtype, device=labels.device)

    for part in row_chunks(len(labels), chunk):
        here = part if rows is None else rows[part]
        hidden = student.hidden_states[here].detach().to(student_dtype)  # [C, H_s]
        teacher_logits = None
        if teacher is not None:
            teacher_logits = product(teacher.hidden_states[here].detach().to(teacher_dtype), teacher_head.weight.T)
        logits = Rows(
            options,
            product(hidden, student_head.weight.T),
            None if teacher_logits is None else teacher_logits.to(state_dtype),
            labels[part],
            student_bias=student_head.bias,
            teacher_bias=None if teacher_head is None else teacher_head.bias,
        )
        del teacher_logits
        logits.accumulate(state[:, part])
        logits.accumulate_mixture(state[:, part])
        if not any(needs):
            continue
        gradient = logits.gradient(state[:, part], scale.weights[:, part], student_dtype)  # [C, V]
        del logits
        if needs.hidden_states:
            chunk_dh = product(gradient, student_head.weight)
            dh[here] = (chunk_dh if scale.undo is None else chunk_dh * scale.undo).to(dh.dtype)
        if needs.weight:
            if dw is None:
                dw = product(gradient.T, hidden)
            else:
                add_product_(dw, gradient.T, hidden)
        if needs.bias:
            db += gradient.sum(0, dtype=state_dtype)

    if needs.weight and dw is None:
        dw = torch.zeros_like(student.weight, dtype=state_dtype)
    for total in (dw, db):
        if total is not None and scale.undo is not None:
            total *= scale.undo
    terms = finish(state, options)
    counted = row_weights(weights, options)
    loss = (counted[0] * terms.cross_entropy).sum() + (counted[1] * terms.divergence).sum()
    return TokenPlanResult(
        loss,
        scatter_rows(torch.stack(terms), rows, num_tokens),
        dh,
        None if dw is None else dw.to(out_dtypes[1]),
        None if db is None else db.to(gradient_dtype(student.bias.dtype)),
    )
