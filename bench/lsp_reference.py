"""The training step of "Distilling the Essence" (LSP, arXiv 2512.21002) as its authors' code takes it, in our words.

One sequence a pass, padded on the left to a multiple of 16, nothing packed; both models give whole logits [1, T, V],
which are softmaxed in fp32:

    loss = mean over the kept tokens of (1 - alpha) CE + alpha T^2 (- sum_v p_T log p_S)                       (1)

whose soft term is the forward KL plus the teacher's entropy: another value, the same gradient. Activations are
recomputed; fp32 master weights, bf16 compute (``trsd.working_weights``, as FSDP's mixed precision does), AdamW. Its
best settings here leave out the padding, so that SDPA takes its flash kernel, and recompute nothing where memory
allows. The authors' template adds a stray generation prompt at the end of whole sequences; that is not repeated.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trsd.compiled_layers import CompiledLayers
from trsd.guards import StepGuard
from trsd.working_weights import WorkingWeights

PAD_TO = 16


class Padded(NamedTuple):
    """One sequence with padding on its left."""

    input_ids: Tensor  # [1, length]
    attention_mask: Tensor | None  # [1, length]; None where nothing is padded
    kept: Tensor  # [1, length - 1] fp32: 1 where the next token is learnt


def padded(ids: Tensor, *, pad_to: int, pad_id: int = 0) -> Padded:
    """``ids`` [num_tokens] with padding up to a multiple of ``pad_to``."""
    missing = -len(ids) % pad_to
    mask = F.pad(torch.ones_like(ids), (missing, 0))[None]
    kept = (mask[:, :-1] * mask[:, 1:]).float()
    return Padded(F.pad(ids, (missing, 0), value=pad_id)[None], mask if missing else None, kept)


class LSPReference:
    """One optimizer step over whole sequences."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        weights: WorkingWeights,
        sequences: Sequence[Tensor],
        *,
        pad_to: int = PAD_TO,
        alpha: float = 0.5,
        temperature: float = 1.0,
        max_grad_norm: float = 1.0,
        compiler: str | Callable[..., Any] | None = None,
    ) -> None:
        """Take models, what trains them, and the sequences [num_tokens] of the step; ``compiler``: of their layers."""
        self.layers = CompiledLayers([student, teacher], compiler) if compiler else CompiledLayers([])
        self.student, self.teacher, self.optimizer, self.weights = student, teacher, optimizer, weights
        self.rows = [padded(ids, pad_to=pad_to) for ids in sequences]
        self.alpha, self.temperature, self.max_grad_norm = alpha, temperature, max_grad_norm
        self.forward_options: dict[str, Any] = {"use_cache": False}

    def step(self) -> tuple[float, float]:
        """(loss, gradient norm) of one step: a pass a sequence, their gradients added."""
        self.weights.refresh()
        self.student.train()
        loss = sum(self.backward(row) for row in self.rows)
        norm = StepGuard(self.max_grad_norm).admit(self.student.parameters(), step=1, loss=float(loss)).norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), norm

    def backward(self, row: Padded) -> Tensor:
        """Add one sequence's share of the gradients; returns its share of the loss."""
        with self.weights.in_use(), self.layers.in_use():
            with torch.no_grad():
                teacher_logits = self.logits(self.teacher, row)
            loss = self.loss(self.logits(self.student, row), teacher_logits, row) / len(self.rows)
            del teacher_logits
            loss.backward()
        return loss.detach()

    def logits(self, model: PreTrainedModel, row: Padded) -> Tensor:
        """Whole logits [1, length, vocab_size] in the model's precision."""
        return model(input_ids=row.input_ids, attention_mask=row.attention_mask, **self.forward_options).logits

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, row: Padded) -> Tensor:
        """Equation (1) of one sequence."""
        student, teacher = student_logits[:, :-1].float(), teacher_logits[:, :-1].float()
        labels = row.input_ids[:, 1:]
        hard = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        p = torch.softmax(teacher / self.temperature, -1)
        soft = -(p * torch.log_softmax(student / self.temperature, -1)).sum(-1)
        per_token = (1 - self.alpha) * hard + self.alpha * self.temperature**2 * soft
        return (per_token * row.kept).sum() / row.kept.sum()

    @torch.no_grad()
    def entropy_share(self) -> float:
        """What the soft terms of (1) hold beyond the divergence: alpha T^2 times the teacher's mean entropy."""
        total = 0.0
        for row in self.rows:
            log_p = torch.log_softmax(self.logits(self.teacher, row)[:, :-1].float() / self.temperature, -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            total += float((entropy * row.kept).sum() / row.kept.sum())
        return self.alpha * self.temperature**2 * total / len(self.rows)
