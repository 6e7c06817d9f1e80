r"""Every loss in plain torch, in the dtype of its inputs (half precision is lifted to fp32): the only oracle.

With student logits z, teacher logits y, label l, temperature T, q = softmax(z / T), p = softmax(y / T):

    L_t = (1 - alpha) * CE(z, l) + alpha * kappa * D(p, q),    kappa = T^2 or 1                              (1)

with D one of

    forward_kl   KL(p || q) = sum_v p (ln p - ln q)
    reverse_kl   KL(q || p) = sum_v q (ln q - ln p)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q                          (2)

beta = 0 stands for the forward and beta = 1 for the reverse KL (the convention of GKD, arXiv 2306.13649, and TRL).
Memory: a few [num_tokens, vocab_size] tensors, so callers hand over chunks of rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class DistillationRows(NamedTuple):
    """Per-token terms of equation (1), before alpha, kappa and weights; nats, [num_tokens]."""

    cross_entropy: Tensor
    divergence: Tensor


def lift(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension from log-probabilities; a term with p = 0 counts 0."""
    log_ratio = torch.where(log_p == -math.inf, torch.zeros_like(log_p), log_p - log_q)
    return (log_p.exp() * log_ratio).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, equation (2), from log-probabilities."""
    if beta == 0.0:
        return kl_divergence(log_p, log_q)
    if beta == 1.0:
        return kl_divergence(log_q, log_p)
    # A token impossible for both has no finite gradient inside logaddexp; it is masked out of both terms anyway.
    possible = (log_p > -math.inf) | (log_q > -math.inf)
    mixed = torch.logaddexp(
        torch.where(possible, log_p, 0.0) + math.log(beta), torch.where(possible, log_q, 0.0) + math.log1p(-beta)
    )
    log_m = torch.where(possible, mixed, -math.inf)
    return beta * kl_divergence(log_p, log_m) + (1.0 - beta) * kl_divergence(log_q, log_m)


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, divergence: str, beta: float, temperature: float
) -> Tensor:
    """D(p, q) per token at ``temperature`` (without kappa), nats, [num_tokens]."""
    log_q = torch.log_softmax(lift(student_logits) / temperature, dim=-1)
    log_p = torch.log_softmax(lift(teacher_logits) / temperature, dim=-1)
    if divergence == "forward_kl":
        return kl_divergence(log_p, log_q)
    if divergence == "reverse_kl":
        return kl_divergence(log_q, log_p)
    if divergence == "jsd":
        return jensen_shannon(log_p, log_q, beta)
    raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")


def distillation_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float,
    divergence: str,
    beta: float,
    temperature: float,
) -> DistillationRows:
    """Cross-entropy and divergence of each row.

    Args:
        student_logits: [num_tokens, vocab_size], any floating dtype.
        teacher_logits: like ``student_logits``; None (with ``alpha`` 0) leaves the divergence at 0.
        labels: [num_tokens] int64, none of them ignored.
        alpha: the term whose share is 0 is not computed and reads 0.
        divergence, beta, temperature: see the module's equations.

    Returns:
        The two terms, differentiable with respect to ``student_logits``.
    """
    zeros = student_logits.new_zeros(student_logits.shape[0], dtype=lift(student_logits[:0]).dtype)
    cross_entropy, value = zeros, zeros
    if alpha < 1.0:
        cross_entropy = torch.nn.functional.cross_entropy(lift(student_logits), labels, reduction="none")
    if alpha > 0.0:
        value = token_divergence(
            student_logits, teacher_logits, divergence=divergence, beta=beta, temperature=temperature
        )
    return DistillationRows(cross_entropy, value)
