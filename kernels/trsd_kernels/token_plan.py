"""Plan ``tokens``: a chunk of C rows against the whole vocabulary, the gradient made in the forward, nothing twice.

Products for H_s, H_t: N V (6 H_s + 2 H_t) flops with a trained head, N V (4 H_s + 2 H_t) with a frozen one. Live bytes
beside inputs and results, with e bytes an element of the products' operands (4 on a CPU):

    8 C V                    fp32 logits of both models; the gradient lies in the student's (4 C V without a teacher)
    e C (H_s + H_t)          hidden states of the chunk, where rows are left out or cast
    (4 + e) C H_s            the chunk's dh before it is rounded, and after
    4 V H_s                  the head's gradient, where its own dtype is not fp32
    e V (H_s + H_t)          both heads, where they are cast
    172 N                    states and terms
    B                        plain torch only: temporaries of a block of rows (``torch_rows.py``)

Backward holds the saved gradients and their products with the upstream factor, nothing else of size.
"""

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
from trsd_kernels.torch_rows import TorchRows, even_chunk, row_chunks

BYTES_PER_TOKEN = 172  # state 64, terms 40, stacked and scattered copies, weights


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


class TokenPlan:
    """One call's loss, per-token terms and gradients over the supervised rows.

    Args:
        labels: [num_tokens].
        weights: [num_tokens], already divided by the number of items.
        rows: the supervised ones; None for all.
        chunk: C, at most.
        student_dtype, teacher_dtype: what the operands of the products are cast to.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        labels: Tensor,
        weights: Tensor,
        rows: Tensor | None,
        options: DistillOptions,
        needs: Needs,
        *,
        chunk: int,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
    ) -> None:
        self.student, self.teacher, self.rows = student, teacher, rows
        self.options, self.needs = options, needs
        self.dtype, self.teacher_dtype, self.state_dtype = (
            student_dtype,
            teacher_dtype,
            accumulator_dtype(student_dtype),
        )
        self.num_tokens = len(labels)
        selected = slice(None) if rows is None else rows
        self.labels, self.weights = labels[selected].contiguous(), weights[selected]
        self.chunk = even_chunk(len(self.labels), chunk)
        self.rows_class = rows_class(labels.device, self.state_dtype)

    def run(self) -> TokenPlanResult:
        """See the module."""
        self.student_head = self.student.cast_weight(self.dtype)
        self.teacher_head = self.teacher and self.teacher.cast_weight(self.teacher_dtype)
        state = new_state(len(self.labels), dtype=self.state_dtype, device=self.labels.device)
        scale = GradientScale.of(row_weights(self.weights, self.options), self.dtype, self.options)
        gradients = GradientSums(self.student, self.student_head, self.needs, self.num_tokens, self.state_dtype)
        for part in row_chunks(len(self.labels), self.chunk):
            here = part if self.rows is None else self.rows[part]
            hidden = self.student.hidden_states[here].detach().to(self.dtype)  # [C, H_s]
            logits = self._logits(part, here, hidden)
            weights = scale.weights[:, part] if any(self.needs) else None
            gradient = logits.complete(state[:, part], weights, self.dtype)  # [C, V]
            if gradient is not None:
                gradients.add(gradient, hidden, here, scale.undo)
            del logits, gradient  # the next chunk's take their bytes
        terms = finish(state, self.options)
        counted = row_weights(self.weights, self.options)
        loss = (counted[0] * terms.cross_entropy).sum() + (counted[1] * terms.divergence).sum()
        terms = scatter_rows(torch.stack(terms), self.rows, self.num_tokens)
        return TokenPlanResult(loss, terms, *gradients.results(scale.undo))

    def _logits(self, part: slice, here: slice | Tensor, hidden: Tensor) -> TorchRows:
        teacher_logits = None
        if self.teacher is not None:
            teacher_hidden = self.teacher.hidden_states[here].detach().to(self.teacher_dtype)  # [C, H_t]
            teacher_logits = product(teacher_hidden, self.teacher_head.weight.T).to(self.state_dtype)
        return self.rows_class(
            self.options,
            product(hidden, self.student_head.weight.T),
            teacher_logits,
            self.labels[part],
            student_bias=self.student_head.bias,
            teacher_bias=None if self.teacher is None else self.teacher_head.bias,
        )

    def live_bytes(self) -> int:
        """The sum of the module's table for this call."""
        heads = [(self.student, self.dtype)] + ([(self.teacher, self.teacher_dtype)] if self.teacher else [])
        vocab_size, hidden_size = self.student.weight.shape
        chunk, word = min(self.chunk, len(self.labels)), self.state_dtype.itemsize
        total = len(heads) * word * chunk * vocab_size + BYTES_PER_TOKEN * self.num_tokens
        for head, dtype in heads:
            if self.rows is not None or head.hidden_states.dtype != dtype:
                total += dtype.itemsize * chunk * head.weight.shape[1]
            if head.weight.dtype != dtype:
                total += dtype.itemsize * head.weight.numel()
        if self.needs.hidden_states:
            total += (word + gradient_dtype(self.student.hidden_states.dtype).itemsize) * chunk * hidden_size
        if self.needs.weight and gradient_dtype(self.student.weight.dtype) != self.state_dtype:
            total += word * vocab_size * hidden_size
        return total + self.rows_class.scratch_bytes(self.options, chunk, vocab_size, self.state_dtype)


class GradientSums:
    """Sums of the gradients over chunks of rows: dh row by row, dw and db in fp32 (fp64)."""

    def __init__(self, student: Head, ready: Head, needs: Needs, num_tokens: int, state_dtype: torch.dtype) -> None:
        self.student, self.ready, self.needs, self.state_dtype = student, ready, needs, state_dtype
        vocab_size, hidden_size = student.weight.shape
        device = student.weight.device
        self.dh = self.dw = self.db = None
        if needs.hidden_states:
            dtype = gradient_dtype(student.hidden_states.dtype)
            self.dh = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device)
        if needs.bias:
            self.db = torch.zeros(vocab_size, dtype=state_dtype, device=device)

    def add(self, gradient: Tensor, hidden: Tensor, here: slice | Tensor, undo: Tensor | None) -> None:
        """Take in one chunk's dloss/dlogits [C, V]; dh is scaled back at once, the sums at the end."""
        if self.needs.hidden_states:
            self.add_hidden(product(gradient, self.ready.weight), here, undo)
        if self.needs.weight:
            if self.dw is None:
                self.dw = product(gradient.T, hidden)
            else:
                add_product_(self.dw, gradient.T, hidden)
        if self.needs.bias:
            self.db += gradient.sum(0, dtype=self.state_dtype)

    def add_hidden(self, dh: Tensor, here: slice | Tensor, undo: Tensor | None) -> None:
        """Take in one chunk's dh [C, H_s]."""
        self.dh[here] = (dh if undo is None else dh.mul_(undo)).to(self.dh.dtype)

    def results(self, undo: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dh, dw, db) in the dtypes they are handed out in."""
        if self.needs.weight and self.dw is None:
            self.dw = torch.zeros(self.student.weight.shape, dtype=self.state_dtype, device=self.student.weight.device)
        for total in (self.dw, self.db):
            if total is not None and undo is not None:
                total *= undo
        dw = None if self.dw is None else self.dw.to(gradient_dtype(self.student.weight.dtype))
        db = None if self.db is None else self.db.to(gradient_dtype(self.student.bias.dtype))
        return self.dh, dw, db
