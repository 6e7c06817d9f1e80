"""The student and its loss as one module: what is sharded as a whole, and run forward and backward a packed row.

Weights that are sharded are there only inside the ``forward`` of the module they belong to. So everything that reads
one happens inside a ``forward``: the body's layers in theirs, lm_head in ``LossHead``'s, and what is left, such as
embeddings that are tied to lm_head, in ``StudentLoss``'s.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsd.batching import PackedBatch
from trsd.models import packed_hidden_states
from trsd.objective import Objective
from trsd.sharded_heads import ShardedHeadsObjective
from trsd.teachers import Targets
from trsd_kernels import LinearDistillationOutput

T = TypeVar("T")


class LossHead(nn.Module):
    """An lm_head that can give a loss instead of logits."""

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.weight = lm_head.weight

    def forward(self, hidden_states: Tensor, loss: Callable[[Tensor], T] | None = None) -> T | Tensor:
        """``loss`` of the weight; without one, logits."""
        return nn.functional.linear(hidden_states, self.weight) if loss is None else loss(self.weight)


class StudentLoss(nn.Module):
    """Loss and its terms of a packed row."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective | ShardedHeadsObjective,
        keep_thinking: Objective | ShardedHeadsObjective,
        *,
        thinking_weight: float,
        backend: str,
        compute: Callable[[], AbstractContextManager[Any]],
        num_sharers: int = 1,
    ) -> None:
        """Take what the loop made of the recipe.

        Args:
            model: of which body and head are run.
            objective: of the labels, against the teacher's targets.
            keep_thinking: of the thinking shown, against itself.
            thinking_weight: of the latter in the loss.
            backend: of attention.
            compute: the precision of the head.
            num_sharers: ranks of which each gets the loss of all their rows.
        """
        super().__init__()
        self.model, self.objective, self.keep_thinking = model, objective, keep_thinking
        self.thinking_weight, self.backend, self.compute = thinking_weight, backend, compute
        self.num_sharers = num_sharers

    def forward(
        self,
        batch: PackedBatch,
        num_items: int,
        num_thinking: int,
        targets: Callable[[Sequence[int]], Targets] | None,
    ) -> tuple[Tensor, Tensor]:
        """(loss to differentiate, [loss, cross-entropy, divergence, thinking] to add up) of the row ``batch``.

        Args:
            batch: on the model's device.
            num_items: supervised tokens of the whole step, over all rows and ranks.
            num_thinking: thinking tokens of the whole step.
            targets: the teacher's, by trace; None without a teacher.
        """
        with self.compute():
            found = None if targets is None else targets(batch.trace_indices)
        hidden = packed_hidden_states(self.model, batch.input_ids, batch.layout, backend=self.backend)

        def losses(head: Tensor) -> tuple[LinearDistillationOutput, Tensor]:
            out = self.objective(
                hidden[batch.rows],
                head,
                found,
                batch.labels,
                token_weights=batch.weights,
                num_items_in_batch=num_items,
            )
            if num_thinking == 0:  # on every rank; to ask would cost a gradient of lm_head's size, all zeros
                return out, out.loss.new_zeros(())
            thinking = self.keep_thinking(
                hidden[batch.thinking_rows],
                head,
                None,
                batch.thinking_labels,
                token_weights=batch.thinking_weights,
                num_items_in_batch=num_thinking,
            ).loss
            return out, thinking

        head = self.model.get_output_embeddings()
        with self.compute():  # for the head, whose gradient stays fp32
            out, thinking = head(hidden, losses) if isinstance(head, LossHead) else losses(head.weight)
        loss = out.loss + self.thinking_weight * thinking
        terms = torch.stack([loss.detach(), out.cross_entropy, out.divergence, thinking.detach()])
        return loss, terms / self.num_sharers
