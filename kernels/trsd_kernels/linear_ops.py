"""The two plans as dispatcher ops, so that torch.compile, checkpointing and autocast see one opaque call each.

``trsd::linear_distill_tokens`` makes its gradients in the forward, for a scalar loss. ``trsd::linear_distill_vocab``
gives differentiable per-token terms; its backward is an op of its own. Options travel as ``DistillOptions.encode()``;
which gradients are wanted is explicit. A gradient not wanted is an empty tensor. Neither has a second derivative or one
in forward mode, and both say so.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from trsd_kernels.options import DistillOptions
from trsd_kernels.products import (
    HALF,
    Head,
    accumulator_dtype,
    product_dtype,
    rows_class,
    scatter_rows,
    supervised_rows,
)
from trsd_kernels.row_state import NUM_FIELDS, TokenTerms, finish
from trsd_kernels.token_plan import Needs, TokenPlan, gradient_dtype
from trsd_kernels.torch_rows import row_chunks
from trsd_kernels.vocab_plan import VocabSweep

CUDA_CHUNK_BYTES = 5 * 2**29  # 2,048 rows of two fp32 logits over Qwen3's vocabulary, rounded up
CPU_CHUNK_BYTES = 2**26
CPU_CHUNK_ROWS = 256  # more of a small vocabulary fill no product better, and leave the cache
SCALED_ELEMENTS = 2**24
# A captured CUDA graph cannot hold the one wait for the number of supervised rows.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def chunk_length(other: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """How many rows (of ``other`` entries), or entries (of ``other`` rows), fit ``chunk_bytes`` of working memory."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES
        if device.type == "cuda":
            chunk_bytes = min(CUDA_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 16)
    tensors = rows_class(device, dtype).live_tensors
    return max(1, chunk_bytes // (tensors * dtype.itemsize * max(1, other)))


def rows_per_chunk(vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """How many rows of logits are made at a time within ``chunk_bytes``."""
    rows = chunk_length(vocab_size, dtype, device, chunk_bytes)
    return min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows


def operand_dtypes(
    student_hidden_states: Tensor,
    student_weight: Tensor,
    teacher_hidden_states: Tensor | None,
    teacher_weight: Tensor | None,
    autocast_dtype: torch.dtype | None,
) -> dict[str, torch.dtype]:
    """Product dtypes of both models; fp64 on one side never lowers the other."""
    student = product_dtype(student_hidden_states, student_weight, autocast_dtype)
    teacher = student
    if teacher_hidden_states is not None:
        teacher = product_dtype(teacher_hidden_states, teacher_weight, autocast_dtype)
    return {"student_dtype": student, "teacher_dtype": teacher}


class Call(NamedTuple):
    """The arguments of an op, in the order of its schema; ``weights`` are divided by the number of items already."""

    student_hidden_states: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden_states: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor
    weights: Tensor
    encoded_options: str
    chunk_size: int | None
    chunk_bytes: int | None
    autocast_dtype: torch.dtype | None
    needs_hidden_states: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def options(self) -> DistillOptions:
        return DistillOptions.decode(self.encoded_options)

    @property
    def needs(self) -> Needs:
        return Needs(*self[-3:])

    @property
    def student(self) -> Head:
        return Head(*self[:3])

    @property
    def teacher(self) -> Head | None:
        return None if self.teacher_hidden_states is None else Head(*self[3:6])

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return operand_dtypes(
            self.student_hidden_states,
            self.student_weight,
            self.teacher_hidden_states,
            self.teacher_weight,
            self.autocast_dtype,
        )

    def rows(self) -> Tensor | None:
        """The supervised ones; see ``supervised_rows``."""
        return supervised_rows(
            self.labels,
            self.weights,
            vocab_size=self.student_weight.shape[0],
            ignore_index=self.options.ignore_index,
        )


SCHEMA_STUDENT = "Tensor student_hidden_states, Tensor student_weight, Tensor? student_bias"
SCHEMA_REST = (
    "Tensor labels, Tensor weights, str encoded_options, int? chunk_size, int? chunk_bytes, "
    "ScalarType? autocast_dtype, bool needs_hidden_states, bool needs_weight, bool needs_bias"
)
_SCHEMA_TEACHER = "Tensor? teacher_hidden_states, Tensor? teacher_weight, Tensor? teacher_bias"
_SCHEMA = f"{SCHEMA_STUDENT}, {_SCHEMA_TEACHER}, {SCHEMA_REST}"


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def empty_gradients(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors of the shapes and dtypes the ops return."""
    tensors = (hidden_states, weight, bias)
    return tuple(
        hidden_states.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype))
        if need
        else hidden_states.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def refuse_second_derivative() -> None:
    """Raise inside a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a fused distillation loss has no second derivative: call backward without create_graph, or compute the "
            "loss from whole logits with trsd_kernels.reference"
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise for a dual tensor: its tangent would end here unseen."""
    if torch.compiler.is_compiling():
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "a fused distillation loss has no forward-mode derivative (jvp): use backward or torch.func.vjp"
        )


@custom_op(
    "trsd::linear_distill_tokens",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
def linear_distill_tokens(*arguments):
    """(loss, TokenTerms [5, num_tokens], dh, dw, db) of a ``Call``."""
    call = Call(*arguments)
    dtypes = call.dtypes
    vocab_size, state_dtype = call.student_weight.shape[0], accumulator_dtype(dtypes["student_dtype"])
    with torch.autocast(call.labels.device.type, enabled=False):
        result = TokenPlan(
            call.student,
            call.teacher,
            call.labels,
            call.weights,
            call.rows(),
            call.options,
            call.needs,
            chunk=call.chunk_size or rows_per_chunk(vocab_size, state_dtype, call.labels.device, call.chunk_bytes),
            **dtypes,
        ).run()
    gradients = (result.grad_hidden_states, result.grad_weight, result.grad_bias)
    return result.loss, result.terms, *(or_empty(gradient, call.student_hidden_states) for gradient in gradients)


@linear_distill_tokens.register_fake
def _(*arguments):
    call = Call(*arguments)
    terms = call.weights.new_empty(len(TokenTerms._fields), call.labels.shape[0])
    return call.weights.new_empty(()), terms, *empty_gradients(*call.student, call.needs)


def tokens_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.needs, ctx.num_inputs = inputs[-3:], len(inputs)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once; a factor rounded to bf16 first would be off by up to 0.4 %."""
    if gradient.dtype not in HALF:
        return (gradient * factor.to(gradient.dtype)).to(dtype)
    if gradient.numel() <= SCALED_ELEMENTS:
        return (gradient.float() * factor).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    for part in row_chunks(len(gradient), max(1, SCALED_ELEMENTS // gradient[:1].numel())):
        out[part] = gradient[part].float() * factor
    return out


def tokens_backward(ctx, grad_loss, *_):
    refuse_second_derivative()
    gradients = [
        scaled(gradient, grad_loss, dtype) if need and grad_loss is not None else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *gradients, *[None] * (ctx.num_inputs - 3)


linear_distill_tokens.register_autograd(tokens_backward, setup_context=tokens_setup)


def _sweep(call: Call) -> tuple[VocabSweep, Tensor | None]:
    """The sweep over the supervised rows, and which rows those are."""
    student, teacher, labels, dtypes, rows = call.student, call.teacher, call.labels, call.dtypes, call.rows()
    if rows is not None:
        student, teacher, labels = student.on_rows(rows), teacher and teacher.on_rows(rows), labels[rows]
    state_dtype = accumulator_dtype(dtypes["student_dtype"])
    chunk = call.chunk_size or chunk_length(len(labels), state_dtype, labels.device, call.chunk_bytes)
    return VocabSweep(student, teacher, labels, call.options, chunk=chunk, **dtypes), rows


@custom_op(
    "trsd::linear_distill_vocab",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
def linear_distill_vocab(*arguments):
    """(cross-entropy [num_tokens], divergence [num_tokens], the other TokenTerms [3, num_tokens], state)."""
    call = Call(*arguments)
    with torch.autocast(call.labels.device.type, enabled=False):
        sweep, rows = _sweep(call)
        state = sweep.state()
        sweep.add_mixture(state)
    num_tokens = len(call.labels)
    terms = scatter_rows(torch.stack(finish(state, sweep.options)), rows, num_tokens)
    return terms[0].clone(), terms[1].clone(), terms[2:].clone(), scatter_rows(state, rows, num_tokens)


@linear_distill_vocab.register_fake
def _(*arguments):
    call = Call(*arguments)
    num_tokens, new = call.labels.shape[0], call.weights.new_empty
    return new(num_tokens), new(num_tokens), new(len(TokenTerms._fields) - 2, num_tokens), new(NUM_FIELDS, num_tokens)


@custom_op(
    "trsd::linear_distill_vocab_backward",
    mutates_args=(),
    schema=f"(Tensor grad_terms, Tensor state, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
def linear_distill_vocab_backward(grad_terms, state, *arguments):
    """(dh, dw, db) for upstream gradients ``grad_terms`` [2, num_tokens] of cross-entropy and divergence."""
    call = Call(*arguments)
    with torch.autocast(call.labels.device.type, enabled=False):
        sweep, rows = _sweep(call)
        if rows is not None:
            grad_terms, state = grad_terms[:, rows], state[:, rows]
        dh, dw, db = sweep.gradients(state.contiguous(), grad_terms.to(state.dtype), call.needs)
    if dh is not None:
        dh = dh.to(gradient_dtype(call.student_hidden_states.dtype))
        if rows is not None:
            full = dh.new_zeros(call.student_hidden_states.shape)
            full[rows] = dh
            dh = full
    return tuple(or_empty(gradient, call.student_hidden_states) for gradient in (dh, dw, db))


@linear_distill_vocab_backward.register_fake
def _(grad_terms, state, *arguments):
    call = Call(*arguments)
    return empty_gradients(*call.student, call.needs)


def _vocab_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    tensors, ctx.rest = inputs[:8], inputs[8:]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(output[3], *(tensor for tensor in tensors if tensor is not None))


def _vocab_backward(ctx, grad_cross_entropy, grad_divergence, *_):
    refuse_second_derivative()
    nothing = [None] * (len(ctx.present) + len(ctx.rest))
    if grad_cross_entropy is None and grad_divergence is None:
        return tuple(nothing)
    state, *saved = ctx.saved_tensors
    saved = iter(saved)
    tensors = [next(saved) if present else None for present in ctx.present]
    zeros = torch.zeros_like(state[0])
    grads = torch.stack([zeros if grad is None else grad for grad in (grad_cross_entropy, grad_divergence)])
    gradients = linear_distill_vocab_backward(grads, state, *tensors, *ctx.rest)
    for place, (gradient, need) in enumerate(zip(gradients, ctx.rest[-3:], strict=True)):
        nothing[place] = gradient.to(tensors[place].dtype) if need else None
    return tuple(nothing)


linear_distill_vocab.register_autograd(_vocab_backward, setup_context=_vocab_setup)
