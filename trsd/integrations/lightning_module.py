"""A ``LightningModule`` that distils: ``lightning.Trainer(...).fit(DistillModule(student, teacher), rows)``.

Batches are those of ``cut_rows.DistillCollator``. Lightning averages micro-batches, whatever they hold; here their sums
add up and are divided, before gradients are clipped, by the labels of all micro-batches and ranks of the step. So
``accumulate_grad_batches`` and the number of devices change memory and never the loss.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.integrations.causal_lm import add_forward_distill
from trsd.integrations.cut_rows import batch_targets

try:
    import lightning
except ImportError:
    raise ImportError("trsd.integrations.lightning_module needs Lightning: pip install 'trsd[integrations]'") from None


class DistillModule(lightning.LightningModule):
    """Student, frozen teacher and the loss between them; only the student is trained, saved and counted."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        **distill_options: Any,
    ) -> None:
        """Take the models and the loss.

        Args:
            student: a causal LM of transformers.
            teacher: a causal LM, frozen here; None learns the labels alone.
            learning_rate, weight_decay: of AdamW; override ``configure_optimizers`` for another optimizer.
            **distill_options: of ``trsd_kernels.DistillOptions``; without a teacher alpha is 0.
        """
        super().__init__()
        self.student = add_forward_distill(student)
        # In a list, so that it is no part of the module: not trained, not saved, not sharded.
        self._teacher = [] if teacher is None else [teacher.requires_grad_(False).eval()]
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.distill_options = ({"alpha": 0.0} if teacher is None else {}) | distill_options
        self._step_items = torch.zeros(())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the losses of a micro-batch's labels."""
        out, items = self._loss(batch)
        self._step_items = self._step_items.to(items.device) + items
        if items:
            self.log("train_loss", out.loss.detach() / items, prog_bar=True, batch_size=int(items))
        return out.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``validation_loss``, the mean over all labels of the set."""
        out, items = self._loss(batch)
        if items:
            self.log("validation_loss", out.loss / items, prog_bar=True, batch_size=int(items), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the labels of the whole step, where Lightning divided by micro-batches and ranks."""
        items = self._step_items
        if self.trainer.world_size > 1:
            items = self.trainer.strategy.reduce(items, reduce_op="sum")
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / items.clamp(min=1)
        for parameter in self._parameters_of(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._step_items = torch.zeros_like(items)

    def on_fit_start(self) -> None:
        """The teacher goes where the student is."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what the student has to learn."""
        learnt = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learnt, lr=self.learning_rate, weight_decay=self.weight_decay)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
        teacher = self._teacher[0] if self._teacher else None
        out = self.student.forward_distill(
            batch["input_ids"],
            batch["labels"],
            attention_mask=batch.get("attention_mask"),
            reduction="sum",
            **batch_targets(teacher, batch),
            **self.distill_options,
        )
        return out, (batch["labels"][:, 1:] != -100).sum()

    @staticmethod
    def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for group in optimizer.param_groups:
            yield from group["params"]
