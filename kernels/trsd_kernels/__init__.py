"""Exact distillation losses and packed attention for any trainer: torch alone, no trainer around it."""

from trsd_kernels.attention_backends import AttentionRequest, choose_backend
from trsd_kernels.layout import (
    PackedLayout,
    fill_rate,
    layout_of,
    pack_sequences,
    packed_layout,
    predicting_rows,
    shift_labels,
)
from trsd_kernels.linear_distill import FusedLinearDistillation, fused_linear_distillation
from trsd_kernels.logits_distill import fused_distillation
from trsd_kernels.options import DistillOptions
from trsd_kernels.reduction import LinearDistillationOutput
from trsd_kernels.row_state import TokenTerms
from trsd_kernels.surprisal import TokenSurprisal, token_surprisal
from trsd_kernels.teacher_targets import (
    TeacherVectors,
    TopKTargets,
    distill_from_top_k,
    distill_from_vectors,
    teacher_vectors,
    top_k_targets,
)
from trsd_kernels.varlen_attention import varlen_attention

__all__ = [
    "AttentionRequest",
    "DistillOptions",
    "FusedLinearDistillation",
    "LinearDistillationOutput",
    "PackedLayout",
    "TeacherVectors",
    "TokenSurprisal",
    "TokenTerms",
    "TopKTargets",
    "choose_backend",
    "distill_from_top_k",
    "distill_from_vectors",
    "fill_rate",
    "fused_distillation",
    "fused_linear_distillation",
    "layout_of",
    "pack_sequences",
    "packed_layout",
    "predicting_rows",
    "shift_labels",
    "teacher_vectors",
    "token_surprisal",
    "top_k_targets",
    "varlen_attention",
]
