"""TRL's trainers with our loss.

``FusedDistillationTrainer`` is TRL's ``DistillationTrainer`` (the student writes, the teacher judges every token) with
our divergence in the place of its own: products in fp32 chunks whose gradient is made in the forward, instead of tiles
that are computed again in the backward. ``beta`` and ``temperature`` mean what they do there: the divergence of
softened distributions, not multiplied by temperature^2, over the completion's tokens.

``DistillSFTTrainer`` is TRL's ``SFTTrainer`` on rows that are ready (``cut_rows.py``), against a teacher.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trsd.integrations.hf_trainer import DistillLoss
from trsd.models import logit_options
from trsd_kernels import fused_linear_distillation

try:
    from trl import DistillationTrainer, SFTTrainer
except ImportError:
    raise ImportError("trsd.integrations.trl_trainer needs TRL: pip install 'trsd[integrations]'") from None


class DistillSFTTrainer(DistillLoss, SFTTrainer):
    """``SFTTrainer`` that distils; its arguments are that one's, with ``teacher`` and ``distill_options``.

    Rows are not prepared again: ``SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})`` and
    ``data_collator=DistillCollator(pad_token_id)``. Entropy and token accuracy, which need logits, are not logged.
    """


class FusedDistillationTrainer(DistillationTrainer):
    """``DistillationTrainer`` with the divergence of ``trsd_kernels``; all its arguments are that one's."""

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the student's entropies, tokens) of a batch; runs in the forward of what wraps the student."""
        if "pixel_values" in inputs:
            raise ValueError("FusedDistillationTrainer learns text alone: use TRL's DistillationTrainer for pictures")
        completion = inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        learnt = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        hidden = self._get_last_hidden_state(unwrapped_student, ids, attention_mask, completion.shape[1])
        teacher = self.accelerator.unwrap_model(self.teacher_model.eval())
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model,
                teacher,
                self._get_last_hidden_state,
                teacher,
                ids,
                attention_mask,
                completion.shape[1],
            )
        head, teacher_head = unwrapped_student.get_output_embeddings(), teacher.get_output_embeddings()
        out = fused_linear_distillation(
            hidden.flatten(0, 1),
            head.weight,
            teacher_hidden.flatten(0, 1),
            teacher_head.weight,
            torch.where(learnt.bool(), completion, -100).flatten(),
            student_lm_head_bias=head.bias,
            teacher_lm_head_bias=teacher_head.bias,
            num_items_in_batch=num_items_in_batch,
            alpha=1.0,
            divergence="jsd",  # which is the forward KL at beta 0 and the reverse one at 1
            beta=self.beta,
            temperature=self.temperature,
            temperature_squared=False,
            **logit_options(unwrapped_student.config, "student"),
            **logit_options(teacher.config, "teacher"),
        )
        return out.loss, out.per_token.student_entropy.sum(), learnt.sum()
