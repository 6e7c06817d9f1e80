"""Inputs of the distillation tests in three regimes, and the loss on whole float64 logits they are judged by."""

import contextlib
import os
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from trsd_kernels import DistillOptions
from trsd_kernels.reference import distillation_rows

IGNORE = -100
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
REGIMES = ("random", "near", "saturated")
# The Triton interpreter takes milliseconds a program: fewer rows there, and only what concerns the kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUM_TOKENS = 11 if INTERPRETED else 23
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels")
FP32_BOUND, BF16_BOUND = 1e-5, 4e-3  # of the norm of a whole gradient, bf16 after one rounding


@dataclass
class Case:
    """Tensors of one loss call."""

    student_hidden_states: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden_states: Tensor
    teacher_lm_head_weight: Tensor
    labels: Tensor
    student_lm_head_bias: Tensor | None = None
    teacher_lm_head_bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def trained(self) -> dict[str, Tensor]:
        """What receives a gradient."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor is not None and tensor.requires_grad}

    def double(self) -> "Case":
        """A float64 copy on the CPU of the very numbers drawn."""
        return self._mapped(lambda tensor: tensor.detach().cpu().double())

    def on(self, device: str) -> "Case":
        return self._mapped(lambda tensor: tensor.detach().to(device))

    def _mapped(self, change) -> "Case":
        changed = {
            name: change(tensor).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors().items()
            if tensor is not None and tensor.is_floating_point()
        }
        labels = change(self.labels).long()
        return replace(self, **changed, labels=labels)


def make_case(
    num_tokens=NUM_TOKENS,
    vocab=61,
    hidden=16,
    *,
    dtype=torch.float64,
    regime="random",
    seed=0,
    bias=False,
    ignored=(),
    trained=("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"),
) -> Case:
    """A teacher half as wide again as the student; logits about 2 apart ("near": 0.1; "saturated": 32)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    extra, spread = max(1, hidden // 2), 2.0 / hidden**0.5
    student_h, student_w = randn(num_tokens, hidden), randn(vocab, hidden) * spread
    teacher_h, teacher_w = randn(num_tokens, hidden + extra), randn(vocab, hidden + extra) * spread
    student_b, teacher_b = (randn(vocab), randn(vocab)) if bias else (None, None)
    if regime == "near":
        # Rounding these logits to bf16 would put the gradient of the KL off by some percent.
        teacher_h = torch.cat([student_h, randn(num_tokens, extra) * 0.2], 1)
        teacher_w = torch.cat([student_w, randn(vocab, extra) * 0.4 * spread], 1)
        teacher_b = None if student_b is None else student_b + 0.05 * teacher_b
    if regime == "saturated":
        student_h, teacher_h = student_h * 4, teacher_h * 4
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    for row in ignored:
        labels[row] = IGNORE
    case = Case(student_h, student_w, teacher_h, teacher_w, labels, student_b, teacher_b)
    cast = {
        name: tensor.to(dtype).requires_grad_(name in trained)
        for name, tensor in case.tensors().items()
        if tensor is not None and tensor.is_floating_point()
    }
    return replace(case, **cast)


def whole_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Both models' whole logits, in the dtype of the case."""
    student = case.student_hidden_states @ case.student_lm_head_weight.T
    teacher = case.teacher_hidden_states @ case.teacher_lm_head_weight.T
    if case.student_lm_head_bias is not None:
        student = student + case.student_lm_head_bias
    if case.teacher_lm_head_bias is not None:
        teacher = teacher + case.teacher_lm_head_bias
    return student, teacher


def exact_token_losses(student_logits, teacher_logits, labels, **options) -> Tensor:
    """(1 - alpha) CE + alpha kappa D of every row from whole logits, 0 where ignored."""
    settings = DistillOptions(**options)
    kept = labels != settings.ignore_index
    rows = distillation_rows(
        student_logits[kept],
        None if settings.alpha == 0 else teacher_logits[kept],
        labels[kept],
        alpha=settings.alpha,
        divergence=settings.divergence,
        beta=settings.beta,
        skew=settings.skew,
        temperature=settings.temperature,
        student_transform=settings.student_transform,
        teacher_transform=settings.teacher_transform,
    )
    losses = (1 - settings.alpha) * rows.cross_entropy + settings.divergence_scale * rows.divergence
    return torch.zeros(len(labels), dtype=losses.dtype).masked_scatter(kept, losses)


def exact_loss(case: Case, *, weights=None, num_items=None, **options) -> Tensor:
    """The weighted mean of ``exact_token_losses``."""
    losses = exact_token_losses(*whole_logits(case), case.labels, **options)
    kept = (case.labels != IGNORE).double()
    weights = kept if weights is None else kept * weights.double()
    num_items = weights.sum() if num_items is None else num_items
    return (weights * losses).sum() / num_items if num_items else losses.sum() * 0


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||."""
    return ((got.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def gradient_errors(case: Case, exact: Case) -> dict[str, float]:
    """Relative error of every gradient."""
    return {name: relative_error(tensor.grad, getattr(exact, name).grad) for name, tensor in case.trained().items()}


@contextlib.contextmanager
def poisoned_memory():
    """Uninitialised memory reads NaN, so that nothing unwritten goes unseen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
