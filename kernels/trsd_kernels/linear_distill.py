"""The lm_head product and the distillation loss together, a chunk of rows at a time.

For student hidden states h [N, H_s] and head W [V, H_s], teacher hidden states and head alike, it computes

    loss = sum_t w_t [(1 - alpha) CE_t + alpha kappa D_t] / num_items                                        (1)

(terms: ``reference.py``) and, in the same forward pass, dloss/dh and dloss/dW; backward only scales them. No
[num_tokens, vocab_size] tensor is ever whole: a chunk of C rows holds about 8 fp32 tensors [C, V], beside one fp32
[V, H_s] gradient when the head is trained and an fp32 copy of each head that is stored in half precision. Rows that
are ignored or weigh nothing are dropped before any product.

The idea of a gradient made in the forward over chunks of rows: Liger-Kernel, arXiv 2410.10989, section 3.2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trsd_kernels.checks import check_hidden_and_weight, check_labels, check_same_device, check_token_weights
from trsd_kernels.reference import DIVERGENCES, distillation_rows

CHUNK_BYTES = 256 * 2**20
LIVE_CHUNK_TENSORS = 8


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """Everything about the loss that is not a tensor."""

    alpha: float = 0.5
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_squared: bool = True
    ignore_index: int = -100
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected the divergence's share in [0, 1], got {self.alpha}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta: expected 0 (forward KL) to 1 (reverse KL), got {self.beta}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1 row, got {self.chunk_size}")

    @property
    def divergence_scale(self) -> float:
        """alpha * kappa of equation (1)."""
        return self.alpha * (self.temperature**2 if self.temperature_squared else 1.0)

    def rows_per_chunk(self, vocab_size: int, element_size: int) -> int:
        """``chunk_size``, or as many rows as CHUNK_BYTES holds."""
        return self.chunk_size or max(1, CHUNK_BYTES // (LIVE_CHUNK_TENSORS * element_size * vocab_size))


class LinearDistillationOutput(NamedTuple):
    """What ``fused_linear_distillation`` returns: scalars on the device of the inputs."""

    loss: Tensor
    """Nats per item; differentiable."""
    cross_entropy: Tensor
    """sum_t w_t CE_t / num_items, detached; 0 when alpha is 1."""
    divergence: Tensor
    """sum_t w_t D_t / num_items before alpha and T^2, detached; 0 when alpha is 0."""
    num_items: Tensor
    """The denominator used."""


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 when any input is fp64, else fp32: logits are never rounded to half precision."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _chunk_gradient(
    student_logits: Tensor,  # [C, V]
    teacher_logits: Tensor | None,  # [C, V]
    labels: Tensor,  # [C]
    weights: Tensor,  # [C], already divided by num_items
    options: DistillOptions,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """(sums of [loss, cross-entropy, divergence] as one [3] tensor, dloss/dlogits or None) of one chunk."""
    with torch.set_grad_enabled(needs_gradient):
        student_logits = student_logits.requires_grad_(needs_gradient)
        rows = distillation_rows(
            student_logits,
            teacher_logits,
            labels,
            alpha=options.alpha,
            divergence=options.divergence,
            beta=options.beta,
            temperature=options.temperature,
        )
        cross_entropy = (weights * rows.cross_entropy).sum()
        divergence = (weights * rows.divergence).sum()
        loss = (1.0 - options.alpha) * cross_entropy + options.divergence_scale * divergence
        gradient = torch.autograd.grad(loss, student_logits)[0] if needs_gradient else None
    return torch.stack([loss, cross_entropy, divergence]).detach(), gradient


class LinearDistillationFunction(torch.autograd.Function):
    """Equation (1) with its gradients made in the forward; see ``fused_linear_distillation``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_hidden_states: Tensor | None,
        teacher_lm_head_weight: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        options: DistillOptions,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_dh, needs_dw = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        kept = ((labels != options.ignore_index) & (weights != 0)).nonzero().squeeze(1)
        dtype = _compute_dtype(student_hidden_states, student_lm_head_weight)
        student_weight = student_lm_head_weight.detach().to(dtype)
        teacher_weight = None if teacher_lm_head_weight is None else teacher_lm_head_weight.detach().to(dtype)
        sums = weights.new_zeros(3, dtype=dtype)
        dh = torch.zeros_like(student_hidden_states) if needs_dh else None
        dw = torch.zeros_like(student_weight) if needs_dw else None

        for rows in kept.split(options.rows_per_chunk(student_weight.shape[0], dtype.itemsize)):
            hidden = student_hidden_states.detach()[rows].to(dtype)  # [C, H_s]
            teacher_logits = None
            if teacher_weight is not None:
                teacher_logits = teacher_hidden_states.detach()[rows].to(dtype) @ teacher_weight.T  # [C, V]
            chunk_sums, gradient = _chunk_gradient(
                hidden @ student_weight.T,
                teacher_logits,
                labels[rows],
                weights[rows].to(dtype),
                options,
                needs_dh or needs_dw,
            )
            sums += chunk_sums
            if needs_dh:
                dh[rows] = (gradient @ student_weight).to(dh.dtype)
            if needs_dw:
                dw.addmm_(gradient.T, hidden)

        ctx.save_for_backward(dh, None if dw is None else dw.to(student_lm_head_weight.dtype))
        loss, cross_entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss.clone(), cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else dh * grad_loss.to(dh.dtype),
            None if dw is None else dw * grad_loss.to(dw.dtype),
            *(None,) * 6,
        )


def _check_inputs(
    student_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden_states: Tensor | None,
    teacher_lm_head_weight: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    options: DistillOptions,
) -> None:
    """Raise ValueError for anything that could only give a wrong number later."""
    check_hidden_and_weight(student_hidden_states, student_lm_head_weight, who="student")
    num_tokens, vocab_size = student_hidden_states.shape[0], student_lm_head_weight.shape[0]
    if (teacher_hidden_states is None) != (teacher_lm_head_weight is None):
        raise ValueError("expected teacher_hidden_states and teacher_lm_head_weight together, or neither with alpha=0")
    if teacher_hidden_states is None and options.alpha > 0.0:
        raise ValueError(f"alpha={options.alpha} gives the divergence a share: teacher tensors are needed (or alpha=0)")
    if teacher_hidden_states is not None:
        check_hidden_and_weight(teacher_hidden_states, teacher_lm_head_weight, who="teacher")
        if teacher_hidden_states.shape[0] != num_tokens:
            raise ValueError(
                f"teacher_hidden_states hold {teacher_hidden_states.shape[0]} tokens, student_hidden_states "
                f"{num_tokens}: expected one teacher row per student row, aligned by answer position"
            )
        if teacher_lm_head_weight.shape[0] != vocab_size:
            raise ValueError(
                f"teacher vocabulary {teacher_lm_head_weight.shape[0]} differs from the student's {vocab_size}: check "
                "that the tokenizers agree, then pass the shared rows of both weights (weight[:shared])"
            )
    check_same_device(
        student_hidden_states=student_hidden_states,
        student_lm_head_weight=student_lm_head_weight,
        teacher_hidden_states=teacher_hidden_states,
        teacher_lm_head_weight=teacher_lm_head_weight,
        labels=labels,
        token_weights=token_weights,
    )
    check_labels(labels, num_tokens=num_tokens, vocab_size=vocab_size, ignore_index=options.ignore_index)
    if token_weights is not None:
        check_token_weights(token_weights, num_tokens=num_tokens)


def fused_linear_distillation(
    student_hidden_states: Tensor,  # [num_tokens, student_hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, student_hidden_size]
    teacher_hidden_states: Tensor | None,  # [num_tokens, teacher_hidden_size]
    teacher_lm_head_weight: Tensor | None,  # [vocab_size, teacher_hidden_size]
    labels: Tensor,  # [num_tokens]
    *,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> LinearDistillationOutput:
    """(1 - alpha) cross-entropy + alpha divergence of a student head against a teacher head, without whole logits.

    Args:
        student_hidden_states: [num_tokens, student_hidden_size], any floating dtype, already aligned with ``labels``
            (shifted). Differentiable.
        student_lm_head_weight: [vocab_size, student_hidden_size]. Differentiable; no gradient is made when frozen.
        teacher_hidden_states: [num_tokens, teacher_hidden_size]; never receives a gradient. None with ``alpha`` 0.
        teacher_lm_head_weight: [vocab_size, teacher_hidden_size]. None with ``alpha`` 0.
        labels: [num_tokens] int64 in [0, vocab_size) or ``ignore_index``, whose rows enter neither term. With
            ``alpha`` 1 they serve as this mask only.
        alpha: share of the divergence, 0 to 1.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: weight of the teacher in the JSD mixture; 0 is the forward and 1 the reverse KL.
        temperature: divides both models' logits in the divergence, never in the cross-entropy.
        temperature_squared: multiply the divergence by temperature^2, which keeps its gradient's scale.
        token_weights: [num_tokens] floating, 1 for all when None.
        num_items_in_batch: what the weighted sum is divided by, a number or a scalar tensor: the whole optimizer
            step's sum of weights when micro-batches or ranks share it. None: this call's own sum of weights.
        ignore_index: label of a row to leave out.
        chunk_size: rows per chunk; None takes as many as 256 MiB of working memory hold.

    Returns:
        Loss and its two terms in nats per item, and the denominator. Nothing supervised gives 0 and zero gradients.

    Raises:
        ValueError: a shape, dtype, device, vocabulary or range that does not fit, with what to do.
    """
    options = DistillOptions(
        alpha=alpha,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        temperature_squared=temperature_squared,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    _check_inputs(
        student_hidden_states,
        student_lm_head_weight,
        teacher_hidden_states,
        teacher_lm_head_weight,
        labels,
        token_weights,
        options,
    )
    dtype = _compute_dtype(student_hidden_states, student_lm_head_weight)
    supervised = (labels != ignore_index).to(dtype)
    weights = supervised if token_weights is None else supervised * token_weights.detach().to(dtype)
    if num_items_in_batch is None:
        num_items = weights.sum()
    else:
        num_items = torch.as_tensor(num_items_in_batch, dtype=dtype, device=weights.device)
    weights = torch.where(num_items == 0, 0.0, weights / num_items)  # no items: loss and gradients are 0, not NaN
    if alpha == 0.0:
        teacher_hidden_states = teacher_lm_head_weight = None
    with torch.autocast(student_hidden_states.device.type, enabled=False):
        loss, cross_entropy, value = LinearDistillationFunction.apply(
            student_hidden_states,
            student_lm_head_weight,
            teacher_hidden_states,
            teacher_lm_head_weight,
            labels,
            weights,
            options,
            torch.is_grad_enabled(),
        )
    return LinearDistillationOutput(loss, cross_entropy, value, num_items.detach())


class FusedLinearDistillation(nn.Module):
    """``fused_linear_distillation`` as a module: options once, tensors at every call.

    >>> distill = FusedLinearDistillation(alpha=0.5, divergence="forward_kl")
    >>> student, teacher = (torch.randn(3, 8), torch.randn(11, 8)), (torch.randn(3, 4), torch.randn(11, 4))
    >>> out = distill(*student, *teacher, torch.tensor([1, 2, 3]))
    >>> out.loss.shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = True,
        ignore_index: int = -100,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.options = DistillOptions(
            alpha=alpha,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            temperature_squared=temperature_squared,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )

    def forward(
        self,
        student_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_hidden_states: Tensor | None,
        teacher_lm_head_weight: Tensor | None,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> LinearDistillationOutput:
        """See ``fused_linear_distillation``."""
        return fused_linear_distillation(
            student_hidden_states,
            student_lm_head_weight,
            teacher_hidden_states,
            teacher_lm_head_weight,
            labels,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **vars(self.options),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())
