"""Teacher targets: what the teacher says at the positions where the student learns.

What the teacher runs of a trace is an ``Example`` of the method, whose rows are the target rows: the whole trace for
TRSD, the kept tokens for LSP. Its final hidden states there, with its lm_head, give its exact distribution at
hidden_size numbers a token instead of vocab_size. ``OnlineTeacher`` computes them at every step with a model of its
own, ``AdapterOffTeacher`` with the student's; ``teacher_cache.py`` keeps them, or what the loss needs of them, on disk.
All answer one question: ``targets(traces)``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsd.adapters import adapter_off
from trsd.batching import Example, PackedBatch, pack_examples
from trsd.models import packed_hidden_states
from trsd.ranks import Ranks, gathered
from trsd_kernels import TeacherVectors, TopKTargets


class HiddenTargets(NamedTuple):
    """A teacher's distributions as what its lm_head makes of these states."""

    hidden_states: Tensor
    """[num_rows, teacher_hidden_size]"""
    lm_head_weight: Tensor
    """[vocab_size, teacher_hidden_size]"""


Targets = HiddenTargets | TopKTargets | TeacherVectors


class Teacher(Protocol):
    """What the loop asks of a teacher."""

    def targets(self, trace_indices: Sequence[int]) -> Targets:
        """Target rows of the traces, one after the other. A trace may be asked for several times."""
        ...


class OnlineTeacher:
    """A frozen model that runs its examples, one per trace, whenever their targets are asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        *,
        max_tokens_per_batch: int,
        backend: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        """Take a model and what it runs of each trace; ``ranks``: over which its weights are sharded."""
        self.model = self._as_teacher(model)
        self.examples = examples
        self.backend = backend
        self.max_tokens = max_tokens_per_batch
        self.ranks = ranks or Ranks()
        self.device = ranks.device if ranks else model.device
        self._kept_head: Tensor | None = None

    @property
    def lm_head_weight(self) -> Tensor:
        """The model's own as it is now, for sharding moves it; or what was put in its place."""
        head = self.model.get_output_embeddings().weight.detach()
        return head if self._kept_head is None else self._kept_head

    @lm_head_weight.setter
    def lm_head_weight(self, weight: Tensor) -> None:
        self._kept_head = weight

    def targets(self, trace_indices: Sequence[int]) -> HiddenTargets:
        return HiddenTargets(self.hidden_states(trace_indices), gathered(self.lm_head_weight))

    @torch.no_grad()
    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        """Final hidden states at the target rows of the traces, [num_rows, teacher_hidden_size]."""
        parts = dict(self.each(trace_indices, lambda hidden: {"hidden": hidden}))
        return torch.cat([parts[index]["hidden"] for index in trace_indices])

    @torch.no_grad()
    def each(
        self, trace_indices: Sequence[int], rows_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(trace, what ``rows_of`` makes of its hidden states), once for each trace, a packed row at a time."""
        examples = [self.examples[index] for index in dict.fromkeys(trace_indices)]
        lengths = {example.trace_index: len(example.labels) for example in examples}
        batches = pack_examples(examples, self.max_tokens, self.device)
        most = self.ranks.largest(len(batches))  # asked before any row runs, for those exchange weights themselves
        for batch in batches:
            hidden = self._run(batch)[batch.rows]
            tensors, counts = rows_of(hidden), [lengths[index] for index in batch.trace_indices]
            pieces = {name: tensor.split(counts) for name, tensor in tensors.items()}
            for place, index in enumerate(batch.trace_indices):
                yield index, {name: piece[place] for name, piece in pieces.items()}
        for _ in range(most - len(batches)):
            self._run(batches[0])  # for the ranks that have more rows, which need this one's shards of the weights

    def _run(self, batch: PackedBatch) -> Tensor:
        return packed_hidden_states(self.model, batch.input_ids, batch.layout, backend=self.backend)

    def _as_teacher(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.requires_grad_(False).eval()


class AdapterOffTeacher(OnlineTeacher):
    """The student with its adapter off, which is the model it began as: no second model is in memory."""

    def hidden_states(self, trace_indices: Sequence[int]) -> Tensor:
        with _asked(self.model):
            return super().hidden_states(trace_indices)

    def _as_teacher(self, model: PreTrainedModel) -> PreTrainedModel:
        return model


@contextmanager
def _asked(student: PreTrainedModel) -> Iterator[None]:
    """Inside, ``student`` is its own teacher; then what it was."""
    was_training = student.training
    student.eval()
    try:
        with adapter_off(student):
            yield
    finally:
        student.train(was_training)
