"""The objective of this package's trainer on a padded batch of cut rows, for the training step of another trainer.

    loss = mean_t [(1 - alpha) CE_t + alpha kappa D_t] + thinking_weight * mean_s CE_s                      (1)

over the labels t and the thinking labels s of the whole optimizer step (terms: ``trsd_kernels``). Bodies of student and
teacher run the padded rows; the states that predict a label are taken out, row by row, and go with both heads to
``Objective``: no logits of either model exist. What is masked is never taken, so padding changes rounding only.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.integrations.causal_lm import check_model, hidden_states_of, run_head
from trsd.integrations.cut_rows import IGNORE, THINKING
from trsd.models import logit_options
from trsd.objective import Objective
from trsd.ranks import gathered
from trsd.teachers import HiddenTargets
from trsd_kernels import LinearDistillationOutput


class RowTerms(NamedTuple):
    """The loss of a batch and what it is made of; all scalars."""

    loss: Tensor
    """Nats; differentiable."""
    cross_entropy: Tensor
    """Of the labels, over ``num_items``; 0 where alpha is 1. Detached, as the other terms."""
    divergence: Tensor
    """Over ``num_items``, before alpha and T^2; 0 where alpha is 0."""
    thinking: Tensor
    """Cross-entropy of the thinking labels, over ``num_thinking``."""


class RowCounts(NamedTuple):
    """What the terms of a step are divided by, of all its batches and ranks."""

    items: Tensor
    thinking: Tensor


def row_counts(batch: Mapping[str, Tensor]) -> RowCounts:
    """How many labels and thinking labels ``batch`` has; counts of several batches add up."""
    return RowCounts(*(_learnt(batch, name).sum() for name in ("labels", THINKING)))


def learn_only(batch: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """``batch`` with the labels of the rows that are ``kept`` ([num_rows] bool), and none in the others."""
    labels = ("labels", THINKING, "teacher_labels")
    masked = {name: batch[name].masked_fill(~kept[:, None], IGNORE) for name in labels if name in batch}
    return {**batch, **masked}


class TermMeans:
    """The terms' means over the tokens of several batches, whatever each was divided by."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, terms: RowTerms, batch: Mapping[str, Tensor], counts: RowCounts | None = None) -> None:
        """Count a batch and its terms, which were divided by ``counts``."""
        mine = row_counts(batch)
        items, thinking = counts or mine
        found = [*mine, terms.cross_entropy * items, terms.divergence * items, terms.thinking * thinking]
        added = torch.stack([value.double() for value in found])
        self._sums = added if self._sums is None else self._sums + added

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means since the last call, over the ranks that ``reduce`` adds up; empty where nothing was added."""
        if self._sums is None:
            return {}
        items, thinking, *sums = reduce(self._sums).tolist()
        self._sums = None
        names = ("cross_entropy", "divergence", "thinking_cross_entropy")
        return {name: value / max(n, 1) for name, value, n in zip(names, sums, (items, items, thinking), strict=True)}


class RowLoss:
    """The loss of cut rows against a frozen teacher.

    No module, though it holds one: what holds a ``RowLoss`` does not get the teacher into its parameters, its state or
    its checkpoints.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        alpha: float = 1.0,
        thinking_weight: float = 1.0,
        vocab_size: int | None = None,
        chunk_bytes: int | None = None,
        **options: Any,
    ) -> None:
        """Take the options of a run.

        Args:
            student: what will be trained; asked for its head and config only.
            teacher: a causal language model of the same tokenizer; frozen and set to eval mode here. None with
                ``alpha`` 0.
            alpha: share of the divergence.
            thinking_weight: of the cross-entropy of rows' thinking labels.
            vocab_size: tokens that the divergence, and the cross-entropy beside it, are over; None: what both heads
                have, which is the tokenizer's vocabulary and perhaps some padding. Cross-entropy alone (``alpha`` 0,
                thinking labels) is over the student's whole head.
            chunk_bytes: working memory of the loss.
            **options: of ``trsd_kernels.DistillOptions``; soft caps and scales of the logits are the models' own.

        Raises:
            InputError: a model whose logits are not its last hidden states times a plain lm_head, a student that asks
                for its router's auxiliary loss, a teacher that would be trained with the student, or none where there
                is a divergence.
        """
        refuse_shared(student, teacher)
        if getattr(student.config.get_text_config(), "output_router_logits", False):
            raise InputError("the router's auxiliary loss is not part of this loss: set output_router_logits=False")
        if teacher is None and alpha > 0:
            raise InputError(f"alpha {alpha} is the share of a divergence from a teacher: give one, or alpha=0")
        self.teacher = None if teacher is None or alpha == 0 else teacher.requires_grad_(False).eval()
        models = [student] if self.teacher is None else [student, self.teacher]
        for model in models:
            check_logits_of_rows(model)
        sizes = [len(plain_head(model).weight) for model in models]
        shared = {"vocab_size": vocab_size or min(sizes), "chunk_bytes": chunk_bytes}
        shared |= logit_options(student.config, "student")
        theirs = {} if self.teacher is None else logit_options(self.teacher.config, "teacher")
        self.objective = Objective(alpha=alpha, **shared, **theirs, **options)
        self.keep_thinking = Objective(alpha=0.0, **shared)
        self.thinking_weight = thinking_weight

    def __call__(
        self, student: PreTrainedModel, batch: Mapping[str, Tensor], counts: RowCounts | None = None
    ) -> RowTerms:
        """The loss of ``batch``, which ``CutRowCollator`` made; ``counts``: of the whole step, None: of this batch."""
        counts = counts or row_counts(batch)
        targets = None if self.teacher is None else self._targets(batch)
        hidden = hidden_states_of(student, batch["input_ids"], batch["attention_mask"])
        head = plain_head(student)

        def terms(hidden: Tensor) -> RowTerms:
            found = self._term(self.objective, hidden, head.weight, targets, batch, "labels", counts.items)
            if THINKING not in batch or self.thinking_weight == 0:
                return RowTerms(found.loss, found.cross_entropy, found.divergence, torch.zeros_like(found.divergence))
            thinking = self._term(self.keep_thinking, hidden, head.weight, None, batch, THINKING, counts.thinking).loss
            loss = found.loss + self.thinking_weight * thinking
            return RowTerms(loss, found.cross_entropy, found.divergence, thinking.detach())

        return run_head(head, terms, hidden)

    def of_means(self, cross_entropy: float, divergence: float, thinking_cross_entropy: float) -> float:
        """Equation (1) of terms that are means already."""
        options = self.objective.distill.options
        labels = (1 - options.alpha) * cross_entropy + options.divergence_scale * divergence
        return labels + self.thinking_weight * thinking_cross_entropy

    @staticmethod
    def _term(
        objective: Objective,
        hidden: Tensor,
        head: Tensor,
        targets: HiddenTargets | None,
        batch: Mapping[str, Tensor],
        name: str,
        num_items: Tensor,
    ) -> LinearDistillationOutput:
        learnt = _learnt(batch, name)
        labels = batch[name][:, 1:][learnt]
        weights = torch.ones_like(labels, dtype=torch.float32)
        return objective(
            hidden[:, :-1][learnt], head, targets, labels, token_weights=weights, num_items_in_batch=num_items
        )

    @torch.no_grad()
    def _targets(self, batch: Mapping[str, Tensor]) -> HiddenTargets:
        if self.teacher.device != batch["input_ids"].device:
            self.teacher.to(batch["input_ids"].device)
        hidden = hidden_states_of(self.teacher, batch["teacher_input_ids"], batch["teacher_attention_mask"])
        learnt = _learnt(batch, "teacher_labels")
        return HiddenTargets(hidden[:, :-1][learnt], gathered(plain_head(self.teacher).weight))


def plain_head(model: PreTrainedModel) -> nn.Linear:
    """The lm_head of ``model``, refused where reading its weight would leave a part of it out."""
    head, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise InputError(
            f"{name}: expected a plain linear lm_head, got {type(head).__name__}; leave the head out of the adapter"
        )
    if head.bias is not None:
        raise InputError(f"{name}: expected an lm_head without bias")
    return head


def refuse_shared(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise where training the student would move the teacher: frozen parameters may be shared, such as a base's."""
    theirs = set() if teacher is None else {id(parameter) for parameter in teacher.parameters()}
    if teacher is student or any(id(p) in theirs and p.requires_grad for p in student.parameters()):
        raise InputError(
            "the teacher is the student itself, or has its adapter in it, and would move with it: give a copy "
            "(copy.deepcopy, before an adapter is added)"
        )


def check_logits_of_rows(model: PreTrainedModel) -> None:
    """Raise for a model whose rows cannot be run here, or whose logits are not what the loss takes them for."""
    plain_head(model)
    check_model(model)


def _learnt(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """Which positions, the last one left out, predict a label [num_rows, num_tokens - 1]."""
    if name not in batch:
        return torch.zeros_like(batch["labels"][:, 1:], dtype=torch.bool)
    return batch[name][:, 1:] != IGNORE
