"""What the trainer's loop holds and does by family, what is inside its own operations included."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trsd.ceilings import Ceilings
from trsd.live_bytes import HeldStorages
from trsd.step_meter import LOSS, StepMeter
from trsd_kernels.linear_ops import CPU_CHUNK_ROWS, Call
from trsd_kernels.target_plans import TopK, Vectors
from trsd_kernels.token_plan import BYTES_PER_TOKEN, TokenPlan

GRADIENTS, ACTIVATIONS = "gradients", "activations"
LOSS_WORK = "loss: logits of a chunk, gradients of hidden states and head"


class LoopMeter(StepMeter):
    """Knows the loop's parts, and what is inside its own operations."""

    def __init__(
        self, ceilings: Ceilings, *, on_gpu: bool, bf16: bool, chunk_bytes: int, trained: Sequence[Tensor]
    ) -> None:
        """Take what the target makes of the loop.

        Args:
            ceilings: of the target.
            on_gpu: rows are Triton kernels there, whose sums stay in registers.
            bf16: what the products of the loss take, on a GPU; a CPU has none of half precision.
            chunk_bytes: working memory of the loss.
            trained: the parameters whose gradients are counted as such.
        """
        super().__init__(products=ceilings.products, copies=ceilings.copies)
        self.on_gpu, self.chunk_bytes, self.trained = on_gpu, chunk_bytes, trained
        self.dtype = torch.bfloat16 if bf16 and on_gpu else torch.float32
        self.held: dict[str, int] = {}
        """Bytes by part at the peak."""
        self._handed_out = HeldStorages()
        self._inside: dict[str, Callable[..., None]] = {
            "trsd::linear_distill_tokens": self._tokens,
            "trsd::distill_top_k": self._cached(TopK, pieces=1),
            "trsd::distill_vectors": self._cached(Vectors, pieces=2),
            "trsd::linear_distill_vocab": self._vocab(products=2, passes=2),
            "trsd::linear_distill_vocab_backward": self._vocab(products=4, passes=3, first=2),
        }

    def reached_peak(self, scratch: int = 0) -> None:
        gradients = sum(p.grad.nbytes for p in self.trained if p.grad is not None)
        loss = self._handed_out.num_bytes
        self.held = {GRADIENTS: gradients, LOSS_WORK: loss + scratch, ACTIVATIONS: self.live - gradients - loss}

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any, *, made: bool) -> None:
        if inside := self._inside.get(func._schema.name):
            inside(args)
            for tensor in result[2:]:
                self._handed_out.add(tensor.untyped_storage())
            return
        super().ran(func, args, kwargs, result, made=made)

    def _chunk(self, other: int) -> int:
        """Rows of ``other`` entries, or entries of ``other`` rows, that two fp32 tensors of the loss hold at a time."""
        return max(1, self.chunk_bytes // (2 * 4 * max(1, other)))

    def _rows(self, vocab_size: int) -> int:
        """Rows of logits that the loss makes at a time."""
        rows = self._chunk(vocab_size)
        return rows if self.on_gpu else min(rows, CPU_CHUNK_ROWS)

    def _tokens(self, args: tuple) -> None:
        call = Call(*args)
        vocab_size = call.student_weight.shape[0]
        plan = TokenPlan(
            *(call.student, call.teacher, call.labels, call.weights, None, call.options, call.needs),
            chunk=call.chunk_size or self._rows(vocab_size),
            student_dtype=self.dtype,
            teacher_dtype=self.dtype,
        )
        scratch = plan.live_bytes()
        if self.on_gpu:  # rows' sums stay in registers
            scratch -= plan.rows_class.scratch_bytes(
                call.options, min(plan.chunk, len(call.labels)), vocab_size, torch.float32
            )
        self.hold(scratch)
        self._count(call, products=1 + sum(call.needs[:2]), teacher_products=call.teacher is not None, passes=2)

    def _cached(self, targets_class: type, pieces: int) -> Callable[[tuple], None]:
        def count(args: tuple) -> None:
            places = len(targets_class._fields)
            call = Call(*args[:3], None, None, None, *args[3 + places :])
            vocab_size, hidden_size = call.student_weight.shape
            rows = min(len(call.labels), self._rows(vocab_size))
            half = self.dtype.itemsize if self.dtype != torch.float32 else 0
            cast = self.dtype.itemsize * vocab_size * hidden_size if call.student_weight.dtype != self.dtype else 0
            scratch = rows * vocab_size * (4 + (pieces * half if pieces > 1 else 0)) + 12 * rows * hidden_size + cast
            self.hold(scratch + BYTES_PER_TOKEN * len(call.labels))
            self._count(call, products=pieces + sum(call.needs[:2]), teacher_products=0, passes=2)

        return count

    def _vocab(self, products: int, passes: int, first: int = 0) -> Callable[[tuple], None]:
        def count(args: tuple) -> None:
            call = Call(*args[first:])
            num_tokens = len(call.labels)
            models = 1 + (call.teacher is not None)
            chunk = min(self._chunk(num_tokens), call.student_weight.shape[0])
            sizes = call.student_weight.shape[1] + (call.teacher_weight.shape[1] if models == 2 else 0)
            self.hold(models * 4 * num_tokens * chunk + self.dtype.itemsize * chunk * sizes)
            self._count(call, products=products - 1, teacher_products=models - 1, passes=passes)

        return count

    def _count(self, call: Call, *, products: int, teacher_products: int, passes: int) -> None:
        num_tokens, vocab_size = len(call.labels), call.student_weight.shape[0]
        logits = 4.0 * num_tokens * vocab_size * (2 if call.teacher is not None else 1)
        flops = 2.0 * num_tokens * call.student_weight.numel() * products
        if teacher_products:
            flops += 2.0 * num_tokens * call.teacher_weight.numel() * teacher_products
        self.add(LOSS, flops=flops)
        self.add(LOSS, moved_bytes=logits * (1 + passes) + self.dtype.itemsize * num_tokens * vocab_size)
