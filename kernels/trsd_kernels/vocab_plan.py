"""Plan ``vocab``: all supervised rows against a chunk of the vocabulary; online statistics, recompute in backward.

The forward keeps only the state of ``row_state.py``, so per-token losses are differentiable and a head may be spread
over the vocabulary (``vocab_parallel.py``). Backward repeats the logits: N V (8 H_s + 4 H_t) flops with a trained
head; divergences from a mixture sweep the vocabulary twice in the forward, N V (2 H_s + 2 H_t) more. A weight's
gradient is one product per chunk, so it needs no fp32 copy of the whole. Live bytes beside inputs and results, for N
supervised rows and V' entries a chunk, with e bytes an element of the products' operands (4 on a CPU):

    8 N V'                   fp32 logits of both models; the gradient lies in the student's (4 N V' without a teacher)
    4 N H_s                  the sum of dh
    e N (H_s + H_t)          hidden states, where rows are left out or cast
    e V' (H_s + H_t)         the chunk of both heads, where it is cast
    4 V' H_s                 the chunk of the head's gradient
    172 N, B                 as in ``token_plan.py``
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.options import MIXTURES, DistillOptions
from trsd_kernels.products import (
    GradientScale,
    Head,
    accumulator_dtype,
    add_product_,
    product,
    rows_class,
)
from trsd_kernels.row_state import new_state
from trsd_kernels.token_plan import BYTES_PER_TOKEN, Needs, gradient_dtype
from trsd_kernels.torch_rows import TorchRows, even_chunk, row_chunks


class VocabSweep:
    """The rows of both models, met with one chunk of the vocabulary after another.

    Args:
        student, teacher: supervised rows only; the teacher is None with ``alpha`` 0.
        labels: [num_rows] ids over the whole vocabulary.
        chunk: vocabulary entries at a time, at most.
        vocab_start: the id of the heads' first row (not 0 when they are a shard).
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        labels: Tensor,
        options: DistillOptions,
        *,
        chunk: int,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        vocab_start: int = 0,
    ) -> None:
        self.labels, self.options, self.vocab_start = labels.contiguous(), options, vocab_start
        self.chunk = even_chunk(student.weight.shape[0], chunk)
        self.cast = [
            head.hidden_states.dtype != dtype
            for head, dtype in ((student, student_dtype), (teacher, teacher_dtype))
            if head is not None
        ]
        self.dtype, self.teacher_dtype = student_dtype, teacher_dtype
        self.state_dtype = accumulator_dtype(student_dtype)
        # Hidden states once; weights chunk by chunk, so that a cast never copies a whole head.
        self.student = student.cast_hidden_states(student_dtype)
        self.teacher = teacher and teacher.cast_hidden_states(teacher_dtype)
        self.rows_class = rows_class(labels.device, self.state_dtype)

    def _logits(self, part: slice) -> TorchRows:
        student = self.student.on_vocab(part).cast_weight(self.dtype)
        teacher = self.teacher and self.teacher.on_vocab(part).cast_weight(self.teacher_dtype)
        return self.rows_class(
            self.options,
            student.logits(),
            teacher and teacher.logits().to(self.state_dtype),
            self.labels,
            student_bias=student.bias,
            teacher_bias=teacher and teacher.bias,
            vocab_start=self.vocab_start + part.start,
        )

    def live_bytes(self, needs: Needs, *, gathered: bool) -> int:
        """The sum of the module's table; ``gathered``: rows were left out."""
        heads = [(self.student, self.dtype)] + ([(self.teacher, self.teacher_dtype)] if self.teacher else [])
        vocab_size, hidden_size = self.student.weight.shape
        num_rows, chunk, word = len(self.labels), min(self.chunk, vocab_size), self.state_dtype.itemsize
        total = len(heads) * word * num_rows * chunk + BYTES_PER_TOKEN * num_rows
        for (head, dtype), cast in zip(heads, self.cast, strict=True):
            if gathered or cast:
                total += dtype.itemsize * num_rows * head.weight.shape[1]
            if head.weight.dtype != dtype:
                total += dtype.itemsize * chunk * head.weight.shape[1]
        total += word * num_rows * hidden_size if needs.hidden_states else 0
        total += word * chunk * hidden_size if needs.weight else 0
        return total + self.rows_class.scratch_bytes(self.options, num_rows, chunk, self.state_dtype)

    def _parts(self) -> Iterator[slice]:
        return row_chunks(self.student.weight.shape[0], self.chunk)

    def state(self, merge: Callable[[Tensor], None] | None = None) -> Tensor:
        """The complete state [NUM_FIELDS, num_rows]; ``merge`` completes a shard's state with the others', in place."""
        state = new_state(len(self.labels), dtype=self.state_dtype, device=self.labels.device)
        for part in self._parts():
            self._logits(part).accumulate(state)
        if merge is not None:
            merge(state)
        return state

    def add_mixture(self, state: Tensor) -> None:
        """Fill in VALUE and SLOPE of a state whose normalisers are complete."""
        if self.options.kind in MIXTURES:
            for part in self._parts():
                self._logits(part).accumulate_mixture(state)

    def gradients(self, state: Tensor, weights: Tensor, needs: Needs) -> "VocabGradients":
        """Gradients for ``weights`` [2, num_rows]: upstream factors of each row's cross-entropy and divergence."""
        scale = GradientScale.of(weights, self.dtype, self.options)
        hidden, head = self.student.hidden_states, self.student
        dh = dw = db = None
        if needs.hidden_states:
            dh = torch.zeros(hidden.shape, dtype=self.state_dtype, device=hidden.device)
        if needs.weight:
            dw = torch.empty(head.weight.shape, dtype=gradient_dtype(head.weight.dtype), device=hidden.device)
        if needs.bias:
            db = torch.empty(head.bias.shape, dtype=gradient_dtype(head.bias.dtype), device=hidden.device)

        def unscaled(total: Tensor) -> Tensor:
            return total if scale.undo is None else total.mul_(scale.undo)

        for part in self._parts():
            gradient = self._logits(part).gradient(state, scale.weights, self.dtype)  # [num_rows, V']
            if needs.hidden_states:
                add_product_(dh, gradient, head.weight[part].detach().to(self.dtype))
            if needs.weight:
                dw[part] = unscaled(product(gradient.T, hidden))
            if needs.bias:
                db[part] = unscaled(gradient.sum(0, dtype=self.state_dtype))
            del gradient  # its bytes are the next chunk's logits
        return VocabGradients(None if dh is None else unscaled(dh), dw, db)


class VocabGradients(NamedTuple):
    """Gradients over the sweep's rows and its part of the vocabulary; None where not asked for."""

    hidden_states: Tensor | None  # [num_rows, hidden_size], fp32 or fp64
    weight: Tensor | None  # [vocab_size, hidden_size]
    bias: Tensor | None  # [vocab_size]
