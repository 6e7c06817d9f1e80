"""How surprising every label is to a model: its negative log-likelihood, and its rank among all tokens.

    nll_t = lse(z_t) - z_t[y_t],        rank_t = 1 + |{v : z_t[v] > z_t[y_t]}|        (1)

with z the model's logits: what the Rank-Surprisal Ratio (arXiv 2601.14249) is made of. Rows go through the head a chunk
at a time, so the [num_tokens, vocab_size] logits never exist; ``chunk_bytes`` bounds a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.checks import (
    check_bias,
    check_chunks,
    check_hidden_and_weight,
    check_labels,
    check_same_device,
)
from trsd_kernels.logit_chunks import logit_chunks
from trsd_kernels.options import DistillOptions
from trsd_kernels.products import Head, accumulator_dtype, product_dtype, scatter_rows, supervised_rows


class TokenSurprisal(NamedTuple):
    """What ``token_surprisal`` finds of every label; 0 and 0 for an ignored one."""

    nll: Tensor
    """[num_tokens] fp32 (fp64 for fp64 inputs), nats."""
    rank: Tensor
    """[num_tokens] int64, from 1; tokens whose logits equal the label's do not count."""


@torch.no_grad()
def token_surprisal(
    student_hidden_states: Tensor,  # [num_tokens, hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, hidden_size]
    labels: Tensor,  # [num_tokens]
    *,
    student_lm_head_bias: Tensor | None = None,  # [vocab_size]
    student_logit_scale: float = 1.0,
    student_logit_softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> TokenSurprisal:
    """Negative log-likelihood and rank of every label, in the fp32 (fp64) of the product; no gradient.

    Args:
        student_hidden_states: already aligned: row t predicts ``labels[t]``.
        labels: int64.
        student_logit_scale, student_logit_softcap: as in ``DistillOptions``.
        ignore_index: label of a row that is left out, before any product.
        chunk_bytes: working memory of a chunk, as in ``fused_linear_distillation``.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit.
    """
    head = Head(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    options = DistillOptions(
        student_logit_scale=student_logit_scale,
        student_logit_softcap=student_logit_softcap,
        ignore_index=ignore_index,
    )
    num_tokens, vocab_size = _check(head, labels, chunk_bytes)
    rows = supervised_rows(labels, torch.ones_like(labels), vocab_size=vocab_size, ignore_index=options.ignore_index)
    if rows is not None:
        head, labels = head.on_rows(rows), labels[rows]
    nll = labels.new_empty(len(labels), dtype=accumulator_dtype(product_dtype(head.hidden_states, head.weight, None)))
    rank = torch.empty_like(labels)
    for part, logits in logit_chunks(head, options.student_transform, chunk_bytes=chunk_bytes):
        target = logits.gather(1, labels[part, None])
        rank[part] = 1 + (logits > target).sum(1)
        nll[part] = logits.logsumexp(1) - target[:, 0]
    return TokenSurprisal(scatter_rows(nll, rows, num_tokens), scatter_rows(rank, rows, num_tokens))


def _check(head: Head, labels: Tensor, chunk_bytes: int | None) -> tuple[int, int]:
    """(num_tokens, vocab_size) of inputs that fit."""
    check_hidden_and_weight(head.hidden_states, head.weight, who="student")
    num_tokens, vocab_size = head.hidden_states.shape[0], head.weight.shape[0]
    check_bias(head.bias, vocab_size=vocab_size, who="student")
    check_same_device(
        student_hidden_states=head.hidden_states,
        student_lm_head_weight=head.weight,
        student_lm_head_bias=head.bias,
        labels=labels,
    )
    check_labels(labels, num_tokens=num_tokens)
    check_chunks(None, chunk_bytes)
    return num_tokens, vocab_size
