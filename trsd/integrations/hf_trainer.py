"""Hugging Face's ``Trainer`` on rows of ``cut_rows``, against a teacher: the step of this package's own trainer.

``DistillTrainer`` is ``transformers.Trainer``. A ``compute_loss_func`` would not do: it is given the logits of a whole
batch, which here never exist. ``CutRowLoss`` is what makes it, and TRL's trainers (``trl_trainer.py``), learn rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from trsd.errors import InputError
from trsd.integrations.causal_lm import run_through
from trsd.integrations.cut_rows import CutRowCollator
from trsd.integrations.row_loss import RowCounts, RowLoss, TermMeans, learn_only, row_counts
from trsd.integrations.shards import check_shards, refuse_compiled, shard_as_student


class _Afresh(TrainerCallback):
    """What a training run that was broken off had added up, such as of a batch too big for memory, is forgotten."""

    def __init__(self, means: dict[str, TermMeans]) -> None:
        self.means = means

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.means["train"] = TermMeans()


class CutRowLoss:
    """What makes a ``Trainer``, or a subclass of it, learn rows; stands before it among the bases.

    It logs ``cross_entropy``, ``divergence`` and ``thinking_cross_entropy``, each the mean over its tokens since the
    last time, in all processes.
    """

    def learn_rows(
        self, teacher_model: PreTrainedModel | None, thinking_weight: float, distill_options: dict[str, Any] | None
    ) -> None:
        """Take the teacher, at the end of the trainer's ``__init__``; arguments as in ``DistillTrainer``."""
        check_shards(self)
        refuse_compiled(self)
        if self.args.n_gpu > 1:
            raise InputError("several GPUs in one process are not supported: start a process for each (torchrun)")
        logits = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
        if given := [name for name in logits if getattr(self, name, None) is not None]:
            raise InputError(f"{', '.join(given)}: made for logits, and this trainer makes none: leave it out")
        options = {"alpha": 1.0} | (distill_options or {})
        self.row_loss = RowLoss(self.model, teacher_model, thinking_weight=thinking_weight, **options)
        if self.row_loss.teacher is not None:
            shard_as_student(self.row_loss.teacher, self)
        self.model_accepts_loss_kwargs = True  # the loss is normalised by the whole step, whatever the model's is
        self._step_counts: RowCounts | None = None
        self._means = {"train": TermMeans(), "eval": TermMeans()}
        self.add_callback(_Afresh(self._means))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of an optimizer step and their labels' number; the counts of both terms are kept."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        found = [torch.stack(row_counts(batch)) for batch in samples]
        counts = torch.stack(found or [torch.zeros(2, dtype=torch.int64)]).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts, "sum")
        self._step_counts = RowCounts(*counts)
        return samples, num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch: of a step's in training, of its own tokens in evaluation."""
        if return_outputs:
            raise InputError("this trainer makes no logits to return: leave return_outputs out")
        counts = self._step_counts if self.model.training else None
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():  # accelerate's own is around the model's forward, which is not what is run
            terms = run_through(model, student, self.row_loss, student, inputs, counts)
        self._means["train" if self.model.training else "eval"].add(terms, inputs, counts)
        if counts is not None and self.args.average_tokens_across_devices:
            return terms.loss * self.accelerator.num_processes  # DDP and FSDP2 take the mean over processes
        return terms.loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch to evaluate; there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = self._without_repeats(self._prepare_inputs(inputs))
            return self.compute_loss(model, batch).detach(), None, None

    def _without_repeats(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the rows that accelerate takes a second time where the last batch has too few for all processes."""
        state, rows = self.accelerator.gradient_state, len(batch["labels"])
        if not (state.end_of_dataloader and state.remainder > 0):
            return batch
        places = self.accelerator.process_index * rows + torch.arange(rows, device=batch["labels"].device)
        return learn_only(batch, places < state.remainder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's own, with the terms of the loss."""
        if self.model.training:
            logs.update(self._take("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The trainer's own; loss and terms are means over all tokens, whatever the batches."""
        self._means["eval"] = TermMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if means := self._take("eval"):
            means["loss"] = self.row_loss.of_means(**means)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _take(self, mode: str) -> dict[str, float]:
        return self._means[mode].take(lambda sums: self.accelerator.reduce(sums, "sum"))


class DistillTrainer(CutRowLoss, Trainer):
    """``transformers.Trainer`` that learns rows of ``cut_rows`` from a teacher."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | None,
        args: TrainingArguments | None = None,
        *,
        thinking_weight: float = 1.0,
        distill_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what ``Trainer`` takes, and a teacher.

        Args:
            model: the student.
            teacher_model: of the student's tokenizer; None with ``distill_options={"alpha": 0}``.
            args: as ever; columns of rows that the model does not know are kept.
            thinking_weight: of the cross-entropy of rows' thinking labels.
            distill_options: alpha, divergence, beta, temperature, ... of ``RowLoss``; by default the forward KL alone.
            **kwargs: of ``Trainer``; ``train_dataset`` and ``eval_dataset`` hold rows of ``cut_rows``.

        Raises:
            InputError: a setting that would change the loss behind its back, or what ``RowLoss`` refuses.
        """
        args = args or TrainingArguments()
        if args.label_smoothing_factor > 0:
            raise InputError("label_smoothing_factor: not part of distilling cut rows; leave it at its default")
        args.remove_unused_columns = False
        kwargs.setdefault("data_collator", CutRowCollator())
        super().__init__(model, args, **kwargs)
        self.learn_rows(teacher_model, thinking_weight, distill_options)
