"""The lm_head product and the distillation loss together, a chunk at a time: the public faces.

For student hidden states h [N, H_s] and head W [V, H_s], teacher hidden states and head alike, it computes

    loss = sum_t w_t [(1 - alpha) CE_t + alpha kappa D_t] / num_items                                        (1)

(terms: ``reference.py``) with its gradients for h, W and the bias. No [num_tokens, vocab_size] tensor is ever whole,
and rows that are ignored or weigh nothing are dropped before any product. Two plans:

``tokens``  C rows x the whole vocabulary at a time (``token_plan.py``). The gradient is made in the forward, so nothing
            is computed twice: the fastest. A trained head costs an fp32 [V, H_s] sum.
``vocab``   all rows x V' entries at a time (``vocab_plan.py``). Backward repeats the logits: less memory, no fp32 sum,
            and per-token losses that are differentiable.
``auto``    ``vocab`` where ``reduction`` is "none" or where ``chunk_bytes`` would leave fewer than 256 rows a chunk
            (products that narrow waste the processor); else ``tokens``.

Products run on the operands' dtype with fp32 results; under autocast on a GPU they run on operands rounded to the
autocast dtype, as in any linear layer, but their results are not. Without a GPU, half precision is lifted to fp32.

The idea of a gradient made in the forward over chunks of rows: Liger-Kernel, arXiv 2410.10989, section 3.2; of the
vocabulary sweep with online statistics: Cut Your Losses, arXiv 2411.09009.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trsd_kernels.checks import check_chunks, check_distillation_inputs
from trsd_kernels.linear_ops import (
    chunk_length,
    linear_distill_tokens,
    linear_distill_vocab,
    refuse_forward_mode,
)
from trsd_kernels.options import DistillOptions
from trsd_kernels.reduction import LinearDistillationOutput, check_reduction, reduced_output, weights_and_items
from trsd_kernels.row_state import TokenTerms

PLANS = ("auto", "tokens", "vocab")
MIN_ROWS_PER_CHUNK = 256


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds the operands of products on ``device`` to, where it does."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


class Inputs(NamedTuple):
    """The tensors of one call, as ``fused_linear_distillation`` names them."""

    student_hidden_states: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden_states: Tensor | None
    teacher_lm_head_weight: Tensor | None
    labels: Tensor
    student_lm_head_bias: Tensor | None
    teacher_lm_head_bias: Tensor | None
    token_weights: Tensor | None


class Execution(NamedTuple):
    """How the loss is computed and reduced, which changes no number but the reduction's."""

    reduction: str = "mean"
    plan: str = "auto"
    chunk_size: int | None = None
    chunk_bytes: int | None = None

    def check(self) -> None:
        """Raise ValueError for what no plan can do."""
        check_reduction(self.reduction, None)
        if self.plan not in PLANS:
            raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {self.plan!r}")
        if self.plan == "tokens" and self.reduction == "none":
            raise ValueError('plan="tokens" makes its gradient for a scalar loss: per-token losses need plan="vocab"')
        check_chunks(self.chunk_size, self.chunk_bytes)

    def chosen_plan(self, vocab_size: int, per_token: Tensor) -> str:
        """``auto`` of the module's text, for [num_tokens] values in the dtype of the logits."""
        if self.plan != "auto":
            return self.plan
        if self.reduction == "none":
            return "vocab"
        if self.chunk_bytes is None:
            return "tokens"
        rows = chunk_length(vocab_size, per_token.dtype, per_token.device, self.chunk_bytes)
        return "tokens" if rows >= min(per_token.shape[0], MIN_ROWS_PER_CHUNK) else "vocab"


def fused_linear_distillation(
    student_hidden_states: Tensor,  # [num_tokens, student_hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, student_hidden_size]
    teacher_hidden_states: Tensor | None,  # [num_tokens, teacher_hidden_size]
    teacher_lm_head_weight: Tensor | None,  # [vocab_size, teacher_hidden_size]
    labels: Tensor,  # [num_tokens]
    *,
    student_lm_head_bias: Tensor | None = None,  # [vocab_size]
    teacher_lm_head_bias: Tensor | None = None,  # [vocab_size]
    token_weights: Tensor | None = None,  # [num_tokens]
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    plan: str = "auto",
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
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
        student_lm_head_bias, teacher_lm_head_bias: [vocab_size]; the student's is differentiable.
        token_weights: [num_tokens] floating, 1 for all when None; never receives a gradient.
        num_items_in_batch: what the weighted sum is divided by, a number or a scalar tensor: the whole optimizer
            step's sum of weights when micro-batches or ranks share it. None: this call's own sum of weights. Where
            it is 0, so are loss and gradients.
        reduction: "mean" (over ``num_items_in_batch``), "sum", or "none" for [num_tokens] differentiable losses.
        plan: "auto", "tokens" or "vocab"; see the module.
        chunk_size: at most so many rows (plan ``tokens``) or vocabulary entries (plan ``vocab``) at a time.
        chunk_bytes: working memory of a chunk where ``chunk_size`` is None; by default 2.5 GiB on a GPU, but no more
            than a sixteenth of its memory, and 64 MiB on a CPU.
        **options: any field of ``DistillOptions``: alpha, divergence, beta, skew, temperature, temperature_squared,
            logit scales and soft caps of both models, ignore_index.

    Returns:
        Loss, its two terms, the denominator and every token's terms. Nothing supervised gives 0 and zero gradients.

    Raises:
        ValueError: a shape, dtype, device, vocabulary or range that does not fit, with what to do.
        TypeError: a keyword that is no option, or what should be a tensor is none.
        RuntimeError: a second or a forward-mode derivative.
    """
    settings = DistillOptions(**options)
    execution = Execution(reduction, plan, chunk_size, chunk_bytes)
    execution.check()
    inputs = Inputs(
        student_hidden_states,
        student_lm_head_weight,
        teacher_hidden_states,
        teacher_lm_head_weight,
        labels,
        student_lm_head_bias,
        teacher_lm_head_bias,
        token_weights,
    )
    return _distill(inputs, num_items_in_batch, execution, settings, settings.encode())


def _distill(
    inputs: Inputs,
    num_items_in_batch: Tensor | float | None,
    execution: Execution,
    options: DistillOptions,
    encoded_options: str,
) -> LinearDistillationOutput:
    """Check the tensors, choose the plan, call its op, reduce its terms."""
    refuse_forward_mode(*inputs)
    check_reduction(execution.reduction, num_items_in_batch)
    check_distillation_inputs(**inputs._asdict(), options=options)
    if options.alpha == 0.0:
        inputs = inputs._replace(teacher_hidden_states=None, teacher_lm_head_weight=None, teacher_lm_head_bias=None)
    student = (inputs.student_hidden_states, inputs.student_lm_head_weight, inputs.student_lm_head_bias)
    weights, num_items = weights_and_items(
        inputs.labels,
        inputs.token_weights,
        num_items_in_batch,
        execution.reduction,
        ignore_index=options.ignore_index,
        dtype=torch.float64 if torch.float64 in (student[0].dtype, student[1].dtype) else torch.float32,
    )
    arguments = (
        *student,
        inputs.teacher_hidden_states,
        inputs.teacher_lm_head_weight,
        inputs.teacher_lm_head_bias,
        inputs.labels,
        weights,
        encoded_options,
        execution.chunk_size,
        execution.chunk_bytes,
        autocast_dtype(inputs.labels.device),
        *(tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in student),
    )
    if execution.chosen_plan(student[1].shape[0], weights) == "tokens":
        loss, stacked, *_ = linear_distill_tokens(*arguments)
        terms = TokenTerms(*stacked.unbind())
        return reduced_output(terms, weights, num_items, options, execution.reduction, loss)
    cross_entropy, divergence, others, _ = linear_distill_vocab(*arguments)
    terms = TokenTerms(cross_entropy, divergence, *others.unbind())
    return reduced_output(terms, weights, num_items, options, execution.reduction)


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
        reduction: str = "mean",
        plan: str = "auto",
        chunk_size: int | None = None,
        chunk_bytes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = DistillOptions(**options)
        self.execution = Execution(reduction, plan, chunk_size, chunk_bytes)
        self.execution.check()
        self._encoded_options = self.options.encode()

    def forward(
        self,
        student_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_hidden_states: Tensor | None,
        teacher_lm_head_weight: Tensor | None,
        labels: Tensor,
        *,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> LinearDistillationOutput:
        """See ``fused_linear_distillation``."""
        inputs = Inputs(
            student_hidden_states,
            student_lm_head_weight,
            teacher_hidden_states,
            teacher_lm_head_weight,
            labels,
            student_lm_head_bias,
            teacher_lm_head_bias,
            token_weights,
        )
        return _distill(inputs, num_items_in_batch, self.execution, self.options, self._encoded_options)

    if TYPE_CHECKING:
        __call__ = forward  # torch says that a module takes anything and returns Any

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.execution._asdict() | vars(self.options)).items())
