"""What the author of another trainer writes. Type checkers read it, nothing runs it: see ``test_release.py``."""

from typing import assert_type

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import trsd
from trsd.errors import InputError
from trsd_kernels import (
    AttentionRequest,
    DistillOptions,
    FusedLinearDistillation,
    LinearDistillationOutput,
    PackedLayout,
    TeacherVectors,
    TokenSurprisal,
    TokenTerms,
    TopKTargets,
    choose_backend,
    distill_from_top_k,
    distill_from_vectors,
    fill_rate,
    fused_distillation,
    fused_linear_distillation,
    layout_of,
    pack_sequences,
    packed_layout,
    predicting_rows,
    shift_labels,
    teacher_vectors,
    token_surprisal,
    top_k_targets,
    varlen_attention,
)
from trsd_kernels.vocab_parallel import vocab_parallel_distillation


def losses(hidden: Tensor, head: Tensor, labels: Tensor, group: ProcessGroup) -> None:
    """Every loss, its output and its targets."""
    out = fused_linear_distillation(hidden, head, hidden, head, labels, alpha=0.5, num_items_in_batch=4)
    assert_type(out, LinearDistillationOutput)
    assert_type(out.loss, Tensor)
    assert_type(out.per_token, TokenTerms)
    assert_type(out.per_token.student_entropy, Tensor)
    module = FusedLinearDistillation(divergence="reverse_kl", reduction="sum")
    assert_type(module(hidden, head, hidden, head, labels), LinearDistillationOutput)
    assert_type(fused_distillation(hidden @ head.T, None, labels, alpha=0.0), LinearDistillationOutput)
    targets = top_k_targets(hidden, head, 4)
    assert_type(targets, TopKTargets)
    assert_type(distill_from_top_k(hidden, head, targets, labels), LinearDistillationOutput)
    vectors = teacher_vectors(hidden, head, head)
    assert_type(vectors, TeacherVectors)
    assert_type(distill_from_vectors(hidden, head, vectors, labels), LinearDistillationOutput)
    surprisal = token_surprisal(hidden, head, labels)
    assert_type(surprisal, TokenSurprisal)
    assert_type(surprisal.nll, Tensor)
    sharded = vocab_parallel_distillation(hidden, head, hidden, head, labels, group=group)
    assert_type(sharded, LinearDistillationOutput)
    assert_type(DistillOptions(alpha=0.5).divergence, str)


def packing(query: Tensor, labels: Tensor) -> None:
    """Rows, labels and attention."""
    layout = packed_layout([5, 3], [[(2, 1)], []])
    assert_type(layout, PackedLayout)
    assert_type(layout.num_tokens, int)
    assert_type(layout.position_ids, Tensor)
    assert_type(layout_of(layout.cu_seqlens), PackedLayout)
    assert_type(pack_sequences([3, 4], 8), list[list[int]])
    assert_type(fill_rate([3, 4], 1, 8), float)
    assert_type(shift_labels(labels, layout), Tensor)
    assert_type(predicting_rows(labels, layout), tuple[Tensor, Tensor])
    assert_type(varlen_attention(query, query, query, layout=layout, window_size=(4, 0)), Tensor)
    request = AttentionRequest(torch.device("cpu"), torch.float32, 64, has_branches=True)
    assert_type(choose_backend(request), str)


def mistakes(hidden: Tensor, labels: Tensor) -> None:
    """What a checker must find: where it finds nothing, the comment is one too many."""
    fused_linear_distillation(hidden, 2, None, None, labels)  # type: ignore[arg-type]
    FusedLinearDistillation()(hidden, hidden)  # type: ignore[call-arg]
    pack_sequences([3, 4], "8")  # type: ignore[arg-type]
    DistillOptions(typo=3)  # type: ignore[call-arg]


def version() -> str:
    """The names of ``trsd``."""
    if not trsd.__version__:
        raise InputError("no version")
    return trsd.__version__
