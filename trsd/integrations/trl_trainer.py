"""Trainers of TRL (1.16) that learn by this package's losses.

``FusedDistillationTrainer`` is ``trl.DistillationTrainer``, on-policy, with another divergence. TRL's is a chunked one
too and, by default, the same number; in fp32 the two agree to 1e-6. What differs:

    options        TRL has KL either way and the JSD, of ``args.beta``; here also the skew divergences, a share of
                   cross-entropy, and T^2, which TRL leaves out (so does this trainer unless told otherwise): TRL's
                   gradient shrinks as 1 / T^2 at a temperature above 1. ``args.temperature`` is also that of sampling.
    products       TRL makes the logits in the forward pass and again in the backward (a JSD: twice in the forward).
                   Here each is made once by default. TRL's two fp32 tiles take rows x 32,768 numbers each, up to 1 GiB
                   together, also where the vocabulary is smaller; here ``chunk_bytes`` says how much.
    rounding       The JSD's gradient is a difference of nearly equal numbers where the student is certain of a token:
                   TRL's, in fp32, is 1e-4 off there, ours 2e-6. Of bf16 operands both round the gradient of the logits
                   to bf16 on a GPU, and TRL on a CPU too; under autocast on a CPU TRL also rounds the operands.
    bf16=True      (TRL's default) asks accelerate for autocast, which accelerate puts around the model's forward. TRL
                   runs body and head past that: fp32 weights are run in fp32. Here they are run in bf16.
    positions      TRL pads prompts on the left and gives no position_ids. A model with learnt positions (GPT-2) then
                   sees a row otherwise than in generation, and its loss depends on the other rows of the batch. Here
                   positions count from the first real token. Rotary positions are relative: nothing changes.

Both normalise by the tokens of the whole optimizer step, over micro-batches and processes, so ``num_items_in_batch``
means the same. In evaluation both take the mean of each batch, and then the mean of these, whatever their tokens.

``CutRowTrainer`` is ``trl.SFTTrainer`` that distils offline traces: rows of ``cut_rows`` against a teacher that runs
beside them. TRL's own preparation is left out, for it cuts ``input_ids`` and ``labels`` to ``max_length`` (1,024 unless
set), which takes the answer at the end of a row and leaves the teacher's columns as they were.

TRL's experimental GKDTrainer is not built on: where it learns from what the student generated, it still divides by the
number of labels in the data set's own answers, so that longer ones there make a step count less; and its temperature is
that of sampling alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.integrations.causal_lm import run_head, run_through
from trsd.integrations.cut_rows import IGNORE, CutRowCollator
from trsd.integrations.hf_trainer import CutRowLoss
from trsd.integrations.row_loss import check_logits_of_rows, plain_head, refuse_shared
from trsd.integrations.shards import check_shards, refuse_compiled, shard_as_student
from trsd.models import logit_options
from trsd.ranks import gathered
from trsd_kernels import FusedLinearDistillation, LinearDistillationOutput

try:
    from trl import DistillationTrainer, SFTConfig, SFTTrainer
except ImportError:
    raise ImportError("trsd.integrations.trl_trainer needs TRL: pip install 'trsd[trl]'") from None


class FusedDistillationTrainer(DistillationTrainer):
    """``trl.DistillationTrainer`` with the divergence of ``trsd_kernels``; see the module for what differs."""

    def __init__(self, *args: Any, distill_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take what TRL's trainer takes.

        Args:
            *args, **kwargs: of ``trl.DistillationTrainer``.
            distill_options: of ``trsd_kernels.FusedLinearDistillation``, before TRL's: by default the JSD of
                ``args.beta`` at ``args.temperature``, without T^2 and without cross-entropy.

        Raises:
            InputError: images, a teacher elsewhere, shards other than FSDP2's, or logits that the loss would get wrong.
        """
        super().__init__(*args, **kwargs)
        check_shards(self)
        refuse_compiled(self)
        if self._is_vlm or self.teacher_model is None:
            raise InputError("expected text alone and a teacher_model in this process: use trl.DistillationTrainer")
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        refuse_shared(self.model, teacher)
        check_logits_of_rows(self.model)
        check_logits_of_rows(teacher)
        options = {
            "alpha": 1.0,
            "divergence": "jsd",
            "beta": self.beta,
            "temperature": self.temperature,
            "temperature_squared": False,
            **logit_options(self.model.config, "student"),
            **logit_options(teacher.config, "teacher"),
        }
        self.distill = FusedLinearDistillation(**(options | (distill_options or {})))
        shard_as_student(teacher, self)
        self._forward_redirection = run_through  # TRL's own, but that what comes out is not rounded

    def _compute_loss(
        self, unwrapped_student: PreTrainedModel, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the student's entropies, number of tokens) of one micro-batch, as TRL's."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        learnt = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        labels = inputs["completion_ids"].masked_fill(~learnt, IGNORE)
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        with self.accelerator.autocast():
            student_states = _completion_states(unwrapped_student, ids, mask, labels.shape[1])
            with torch.no_grad():
                teacher_states = _completion_states(teacher, ids, mask, labels.shape[1])
                teacher_head = gathered(plain_head(teacher).weight)
            head = plain_head(unwrapped_student)

            def loss(states: Tensor) -> LinearDistillationOutput:
                rows, teacher_rows = states.flatten(0, 1), teacher_states.flatten(0, 1)
                counts = {"num_items_in_batch": num_items_in_batch}
                return self.distill(rows, head.weight, teacher_rows, teacher_head, labels.flatten(), **counts)

            out = run_head(head, loss, student_states)
        return out.loss, out.per_token.student_entropy.sum(), learnt.sum()


def _completion_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """States that predict the last ``length`` tokens of rows padded on both sides, [num_rows, length, hidden_size]."""
    body, inputs = model.get_decoder(), {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return body(**inputs).last_hidden_state[:, -length - 1 : -1]


class CutRowTrainer(CutRowLoss, SFTTrainer):
    """``trl.SFTTrainer`` that learns rows of ``cut_rows`` from a teacher."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | None,
        args: SFTConfig | None = None,
        *,
        thinking_weight: float = 1.0,
        distill_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what TRL's trainer takes, and a teacher.

        Args:
            model: the student.
            teacher_model: of the student's tokenizer; None with ``distill_options={"alpha": 0}``.
            args: rows longer than its ``max_length`` are refused, never cut.
            thinking_weight: of the cross-entropy of rows' thinking labels.
            distill_options: alpha, divergence, beta, temperature, ... of ``RowLoss``; by default the forward KL alone.
            **kwargs: of ``trl.SFTTrainer``; ``train_dataset`` and ``eval_dataset`` hold rows of ``cut_rows``.

        Raises:
            InputError: a setting that would change the loss behind its back, or what ``RowLoss`` refuses.
        """
        args = args or SFTConfig()
        _refuse_other_losses(args)
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None
        kwargs.setdefault("data_collator", CutRowCollator(max_length=args.max_length, pad_to_multiple_of=multiple))
        super().__init__(model, args, **kwargs)
        if self.aux_loss_enabled:
            raise InputError("the router's auxiliary loss is not part of this loss: set router_aux_loss_coef=0")
        self.learn_rows(teacher_model, thinking_weight, distill_options)


def _refuse_other_losses(args: SFTConfig) -> None:
    """Raise for settings of ``SFTTrainer`` that would be without effect, or take rows apart."""
    given = {
        "packing": args.packing,
        "padding_free": args.padding_free,
        "eval_packing": bool(args.eval_packing),
        "shuffle_dataset": args.shuffle_dataset,
        "completion_only_loss": bool(args.completion_only_loss),
        "assistant_only_loss": args.assistant_only_loss,
        "truncation_mode": args.truncation_mode != SFTConfig.truncation_mode,
        "loss_type": args.loss_type != "nll",
        "label_smoothing_factor": args.label_smoothing_factor > 0,
    }
    if named := [name for name, value in given.items() if value]:
        raise InputError(f"{', '.join(named)}: not part of distilling cut rows; leave it at its default")
