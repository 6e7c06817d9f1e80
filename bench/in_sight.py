"""The fused losses with every operation in sight, so that what they hold can be counted; the same numbers.

To torch's dispatcher a custom op is one opaque operation. Inside ``ops_in_sight`` their implementations run directly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from trsd_kernels import linear_distill, linear_ops, target_plans, teacher_targets


def _function(op: Callable, setup: Callable, backward: Callable) -> Callable:
    """An autograd function of an op's own parts."""

    class InSight(torch.autograd.Function):
        forward = staticmethod(op._init_fn)
        setup_context = staticmethod(setup)

    InSight.backward = staticmethod(backward)
    return InSight.apply


@contextmanager
def ops_in_sight() -> Iterator[None]:
    """Inside, what ``fused_linear_distillation`` and the losses against cached targets are made of is dispatched."""
    tokens = (linear_ops.tokens_setup, linear_ops.tokens_backward)
    vocab = (linear_ops._vocab_setup, linear_ops._vocab_backward)
    with (
        patch.object(linear_distill, "linear_distill_tokens", _function(linear_ops.linear_distill_tokens, *tokens)),
        patch.object(linear_distill, "linear_distill_vocab", _function(linear_ops.linear_distill_vocab, *vocab)),
        patch.object(linear_ops, "linear_distill_vocab_backward", linear_ops.linear_distill_vocab_backward._init_fn),
        patch.object(teacher_targets, "distill_top_k", _function(target_plans.distill_top_k, *tokens)),
        patch.object(teacher_targets, "distill_vectors", _function(target_plans.distill_vectors, *tokens)),
    ):
        yield
