"""The recipe's loss with the rows of both lm_heads spread over the ranks, and the tokens of all ranks on each.

A rank's head is the part of the vocabulary that it holds, for good: no rank ever has a whole lm_head or its gradient.
What is exchanged instead are the hidden states of the supervised tokens, and a few numbers a token
(``trsd_kernels.vocab_parallel``). Every rank gets the loss of all ranks' tokens, the gradient of its own hidden states,
and that of its own rows of the head; both are complete.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trsd.errors import InputError
from trsd.ranks import Ranks, gathered
from trsd.teachers import HiddenTargets, Targets, Teacher
from trsd_kernels import LinearDistillationOutput
from trsd_kernels.vocab_parallel import vocab_parallel_distillation


class ShardedHeadsObjective:
    """As ``Objective``, for heads that ``parallel.shard_student`` and ``keep_head_rows`` spread over ``ranks``."""

    def __init__(self, ranks: Ranks, *, vocab_size: int, chunk_bytes: int | None, **options: Any) -> None:
        """Take the options of a run; see ``Objective``."""
        self.ranks, self.vocab_size, self.chunk_bytes, self.options = ranks, vocab_size, chunk_bytes, options

    def __call__(
        self,
        hidden_states: Tensor,  # [num_labels, hidden_size], of this rank
        lm_head_weight: DTensor,  # [student_vocab_size, hidden_size], this rank's rows of it
        targets: Targets | None,
        labels: Tensor,  # [num_labels]
        *,
        token_weights: Tensor,  # [num_labels]
        num_items_in_batch: int,
    ) -> LinearDistillationOutput:
        """The loss of the labels of all ranks' rows."""
        counts = self.ranks.everyone(len(labels))
        head, teacher = lm_head_weight.to_local(), (None, None)
        if isinstance(targets, HiddenTargets):
            rows = head_rows(len(lm_head_weight), self.vocab_size, self.ranks)
            head, teacher = head[: len(rows)], (_together(targets.hidden_states, counts), targets.lm_head_weight)
        return vocab_parallel_distillation(
            _Together.apply(hidden_states, counts, self.ranks.rank),
            head,
            *teacher,
            _together(labels, counts),
            token_weights=_together(token_weights, counts),
            num_items_in_batch=num_items_in_batch,
            chunk_bytes=self.chunk_bytes,
            **self.options,
        )


def head_rows(student_vocab_size: int, shared_vocab_size: int, ranks: Ranks) -> range:
    """The token ids of this rank: its shard of the student's head, as far as both vocabularies go."""
    shard = -(-student_vocab_size // ranks.size)
    first = ranks.rank * shard
    rows = range(first, min(first + shard, student_vocab_size, shared_vocab_size))
    if not rows:
        raise InputError(
            f"vocab_parallel: {shared_vocab_size} tokens leave none for rank {ranks.rank} of {ranks.size}: leave it out"
        )
    return rows


def keep_head_rows(teacher: Teacher | None, rows: range) -> None:
    """Let a teacher that has an lm_head give this rank's rows of it alone; every rank must ask."""
    if hasattr(teacher, "lm_head_weight"):
        teacher.lm_head_weight = gathered(teacher.lm_head_weight)[rows.start : rows.stop].clone()


def _together(tensor: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, one after the other; ``counts`` of each."""
    most = max(counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


class _Together(torch.autograd.Function):
    """``_together`` of a tensor whose gradient comes complete to every rank, which takes its own rows of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        return _together(tensor, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.first : ctx.first + ctx.count], None, None
