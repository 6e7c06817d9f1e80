"""Hugging Face ``Trainer`` with our loss: ``DistillTrainer(model, teacher=teacher, args=..., train_dataset=...)``.

Logits never exist, which is why this is a subclass and no ``compute_loss_func``: that one is given the logits of a
whole batch. Rows hold ``input_ids`` and ``labels``; where the teacher reads something else than the student, also
``teacher_input_ids`` and ``teacher_labels`` (``cut_rows.py`` makes both, and ``DistillCollator`` pads them).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from trsd.integrations.causal_lm import add_forward_distill, run_through
from trsd.integrations.cut_rows import TEACHER_COLUMNS, batch_targets


class DistillLoss:
    """What makes a ``Trainer``, or a subclass of it, distil: stands before it among the bases."""

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        distill_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As the trainer, and two more.

        Args:
            model: the student.
            *args, **kwargs: of the trainer.
            teacher: a causal LM, which is frozen and put on the student's device; None learns the labels alone.
            distill_options: of ``DistillOptions``, such as ``{"alpha": 0.5}``; without a teacher alpha is 0.
        """
        super().__init__(add_forward_distill(model), *args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "DataParallel copies models that have no forward_distill: start one process a GPU (torchrun)"
            )
        self.model_accepts_loss_kwargs = True  # it divides by the whole step's labels
        self._loss_shifts_labels = True
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        self.distill_options = ({"alpha": 0.0} if teacher is None else {}) | (distill_options or {})

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *TEACHER_COLUMNS])]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, divided by the labels of the whole optimizer step."""
        student = self.accelerator.unwrap_model(model)
        out = run_through(
            model,
            student,
            "forward_distill",
            inputs["input_ids"],
            inputs["labels"],
            attention_mask=inputs.get("attention_mask"),
            num_items_in_batch=num_items_in_batch,
            **batch_targets(self.teacher, inputs),
            **self.distill_options,
        )
        loss = out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the average over processes takes it back
        return (loss, {"loss": loss, "divergence": out.divergence}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch to evaluate; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class DistillTrainer(DistillLoss, Trainer):
    """``Trainer`` whose loss is ``forward_distill`` against a frozen teacher, exact under gradient accumulation."""
