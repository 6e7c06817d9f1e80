"""What is measured: sizes, losses, and random inputs in three regimes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

REGIMES = ("random", "near", "saturated")


class Shape(NamedTuple):
    """The sizes of one loss call."""

    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int

    def flops(self, loss: "Loss", *, head_is_trained: bool) -> float:
        """Of the products that loss and gradients cannot do without: student logits, dH, dW, teacher logits."""
        student, teacher = (2 * self.num_tokens * self.vocab_size * size for size in self[2:])
        return (3 if head_is_trained else 2) * student + (teacher if loss.alpha else 0)

    def least_bytes(self, loss: "Loss", dtype: torch.dtype, *, head_is_trained: bool) -> float:
        """Heads and hidden states read once, gradients written once; logits may stay on the chip."""
        student, teacher = ((self.num_tokens + self.vocab_size) * size for size in self[2:])
        written = student if head_is_trained else self.num_tokens * self.student_hidden_size
        return dtype.itemsize * (student + written + (teacher if loss.alpha else 0))


# A 4B student of an 8B teacher over Qwen3's vocabulary; 512 tokens are a step that learns answers alone.
GPU_SHAPES = tuple(Shape(num_tokens, 151936, 2560, 4096) for num_tokens in (4096, 8192, 512))
CPU_SHAPES = (Shape(512, 32000, 64, 96), Shape(2048, 8192, 128, 192))
# Whole logits of more than 32 MiB: smaller ones glibc gives out again without returning them to the kernel, which
# spares plain torch the page faults that logits of any real size cost it.
SMALL_CPU_SHAPE = Shape(512, 18000, 64, 96)


class Loss(NamedTuple):
    """(1 - alpha) cross-entropy + alpha temperature^2 divergence, a mean over tokens."""

    name: str
    alpha: float
    divergence: str
    temperature: float = 1.0

    @property
    def beta(self) -> float:
        """The teacher's share of the mixture as GKD, TRL and Liger count it: 0 is the forward KL."""
        return {"forward_kl": 0.0, "jsd": 0.5}[self.divergence]

    def options(self) -> dict[str, object]:
        """Keywords of ``fused_linear_distillation``."""
        return dict(alpha=self.alpha, divergence=self.divergence, beta=0.5, temperature=self.temperature)


CE_KL = Loss("ce+kl", 0.5, "forward_kl")
CE_JSD = Loss("ce+jsd", 0.5, "jsd")
CE = Loss("ce", 0.0, "forward_kl")
KL = Loss("kl", 1.0, "forward_kl")
JSD = Loss("jsd", 1.0, "jsd")


@dataclass
class Inputs:
    """Tensors of one loss call; the student's take gradients."""

    student_hidden_states: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden_states: Tensor
    teacher_lm_head_weight: Tensor
    labels: Tensor
    student_lm_head_bias: Tensor | None = None
    teacher_lm_head_bias: Tensor | None = None

    @property
    def head_is_trained(self) -> bool:
        return self.student_lm_head_weight.requires_grad

    def trained(self) -> dict[str, Tensor]:
        """What receives a gradient."""
        return {name: x for name, x in vars(self).items() if x is not None and x.requires_grad}

    def positional(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and weight of the student, of the teacher, and the labels."""
        return (
            self.student_hidden_states,
            self.student_lm_head_weight,
            self.teacher_hidden_states,
            self.teacher_lm_head_weight,
            self.labels,
        )

    def asked_for(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """``positional``, but no teacher where the loss has no divergence."""
        student_h, student_w, *teacher, labels = self.positional()
        return (student_h, student_w, *(teacher if loss.alpha else (None, None)), labels)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """A copy with every floating tensor in ``dtype``, as leaves."""
        changed = {
            name: x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
            for name, x in vars(self).items()
            if x is not None and x.is_floating_point()
        }
        return Inputs(**(vars(self) | changed))


def draw(
    shape: Shape,
    *,
    device: str,
    dtype: torch.dtype,
    regime: str = "random",
    head_is_trained: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose logits have a standard deviation of 2 ("saturated": 8; "near": teacher within 0.5 or so)."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(std)

    num_tokens, vocab_size, student_size, teacher_size = shape
    student_h, student_w = randn(num_tokens, student_size), randn(vocab_size, student_size, std=2 * student_size**-0.5)
    if regime == "near":
        extra = teacher_size - student_size
        teacher_h = torch.cat([student_h, randn(num_tokens, extra, std=0.2)], 1)
        teacher_w = torch.cat([student_w, randn(vocab_size, extra, std=0.8 * student_size**-0.5)], 1)
    else:
        teacher_h = randn(num_tokens, teacher_size)
        teacher_w = randn(vocab_size, teacher_size, std=2 * teacher_size**-0.5)
    if regime == "saturated":
        student_h, teacher_h = student_h.mul_(4), teacher_h.mul_(4)
    student_b = teacher_b = None
    if bias:
        student_b = randn(vocab_size)
        teacher_b = student_b + randn(vocab_size, std=0.05) if regime == "near" else randn(vocab_size)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    student_h, student_w, student_b = (
        None if x is None else x.to(dtype).requires_grad_(need)
        for x, need in ((student_h, True), (student_w, head_is_trained), (student_b, head_is_trained))
    )
    teacher_h, teacher_w, teacher_b = (None if x is None else x.to(dtype) for x in (teacher_h, teacher_w, teacher_b))
    return Inputs(student_h, student_w, teacher_h, teacher_w, labels, student_b, teacher_b)
