"""The row passes of ``row_state.py`` by the Triton kernels of ``distill_rows.py``: what runs on a GPU."""

import contextlib

import torch
import triton
from torch import Tensor

from trsd_kernels.distill_rows import KINDS, _accumulate_kernel, _gradient_kernel, _mixture_kernel
from trsd_kernels.options import MIXTURES, DistillOptions

# At 8 warps these compile to at most 121 registers a thread on sm_80 to sm_100. Twice the width takes the first, with
# up to six sums a lane, to 231, which leaves one program on a multiprocessor; with soft caps even this width spills on
# sm_100, so they halve it.
TILES = {"accumulate": 2048, "mixture": 2048, "gradient": 2048}
NUM_WARPS = 8


def tile_width(kernel: str, vocab_size: int, options: DistillOptions) -> int:
    """BLOCK_V of a kernel: a power of two, no wider than the row needs."""
    capped = options.student_transform.softcap is not None or options.teacher_transform.softcap is not None
    return min(TILES[kernel] // (2 if capped else 1), max(16, triton.next_power_of_2(vocab_size)))


class TritonRows:
    """The calls of ``torch_rows.TorchRows`` by the kernels above: same arguments, fp32 states.

    Args:
        student_logits: [C, V'] fp32, bf16 or fp16 with unit stride along the vocabulary.
        teacher_logits: like ``student_logits`` (its dtype may differ), or None.
        labels: [C] int64, ids over the whole vocabulary.
        student_bias, teacher_bias: [V'] or None.
        launch: how a kernel is prepared for its launch; the public ops let torch.compile see it.
    """

    live_tensors = 2

    @staticmethod
    def scratch_bytes(options: DistillOptions, num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
        """None: a row's sums stay in registers."""
        return 0

    def __init__(
        self,
        options: DistillOptions,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        vocab_start: int = 0,
        launch=lambda kernel: kernel,
    ) -> None:
        self.options, self.launch = options, launch
        self.student, self.labels, self.vocab_start = student_logits, labels, vocab_start
        # Kernels without a teacher still take a pointer; they never read it. The labels, for of logits that are not
        # there yet torch.compile would make a copy for each argument.
        self.teacher = labels if teacher_logits is None else teacher_logits
        student_cap, teacher_cap = options.student_transform.softcap, options.teacher_transform.softcap
        at_temperature = options.softmax_temperature != 1.0
        self.strides = (self.student.stride(0), self.teacher.stride(0))
        self.biases = (
            labels if student_bias is None else student_bias,
            labels if teacher_bias is None else teacher_bias,
        )
        self.scalars = (
            options.student_transform.scale,
            student_cap or 1.0,
            options.teacher_transform.scale,
            teacher_cap or 1.0,
            options.softmax_temperature,
        )
        self.flags = dict(
            KIND=KINDS[options.kind],
            AT_TEMPERATURE=at_temperature,
            HAS_STUDENT_BIAS=student_bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_STUDENT_SOFTCAP=student_cap is not None,
            HAS_TEACHER_SOFTCAP=teacher_cap is not None,
            num_warps=NUM_WARPS,
        )

    def _launch(self, kernel, *arguments, **constants) -> None:
        """One program a row, on the device of the logits, whichever is current."""
        num_rows = self.student.shape[0]
        device = torch.cuda.device(self.student.device) if self.student.is_cuda else contextlib.nullcontext()
        if num_rows:
            with device:
                self.launch(kernel)[(num_rows,)](*arguments, **constants, **self.flags)

    def complete(self, state: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """All passes over the whole vocabulary, an empty ``state`` filled in; ``gradient``, or None without weights."""
        self.accumulate(state)
        self.accumulate_mixture(state)
        return None if weights is None else self.gradient(state, weights, dtype)

    def accumulate(self, state: Tensor) -> None:
        """Merge these logits into ``state`` [NUM_FIELDS, C]: every field but the mixture's."""
        vocab_size = self.student.shape[1]
        self._launch(
            _accumulate_kernel,
            self.student,
            self.teacher,
            *self.biases,
            self.labels,
            state,
            *self.strides,
            state.stride(0),
            vocab_size,
            self.vocab_start,
            *self.scalars,
            WITH_CE=self.options.alpha < 1.0,
            BLOCK_V=tile_width("accumulate", vocab_size, self.options),
        )

    def accumulate_mixture(self, state: Tensor) -> None:
        """Add these logits' share of D and M to ``state``, whose normalisers are complete."""
        if self.options.kind not in MIXTURES:
            return
        vocab_size = self.student.shape[1]
        self._launch(
            _mixture_kernel,
            self.student,
            self.teacher,
            *self.biases,
            state,
            *self.strides,
            state.stride(0),
            vocab_size,
            self.vocab_start,
            *self.scalars,
            self.options.teacher_share,
            BLOCK_V=tile_width("mixture", vocab_size, self.options),
        )

    def gradient(self, state: Tensor, weights: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """dloss/dlogits [C, V'] in ``dtype``, before the bias; in the student's own bytes where ``out`` is None.

        Args:
            state: complete, [NUM_FIELDS, C].
            weights: [2, C] fp32: what each row's cross-entropy and divergence count in the loss.
            out: [C, V'] of ``dtype`` with unit stride along the vocabulary.
        """
        vocab_size = self.student.shape[1]
        if out is None:
            if dtype.itemsize > self.student.element_size():
                raise RuntimeError(f"a gradient in {dtype} does not fit into the bytes of {self.student.dtype} logits")
            out = self.student if dtype == self.student.dtype else self.student.view(dtype)[:, :vocab_size]
        self._launch(
            _gradient_kernel,
            self.student,
            self.teacher,
            *self.biases,
            self.labels,
            state,
            weights,
            out,
            *self.strides,
            state.stride(0),
            weights.stride(0),
            out.stride(0),
            vocab_size,
            self.vocab_start,
            *self.scalars,
            self.options.teacher_share,
            WITH_CE=self.options.alpha < 1.0,
            BLOCK_V=tile_width("gradient", vocab_size, self.options),
        )
        return out
