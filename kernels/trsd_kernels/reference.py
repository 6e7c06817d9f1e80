r"""Every loss in plain torch, in the dtype of its inputs (half precision is lifted to fp32): the only oracle.

With student logits z, teacher logits y, label l, temperature T, q = softmax(z / T), p = softmax(y / T):

    L_t = (1 - alpha) * CE(z, l) + alpha * kappa * D(p, q),    kappa = T^2 or 1                              (1)

with D one of

    forward_kl       KL(p || q) = sum_v p (ln p - ln q)
    reverse_kl       KL(q || p) = sum_v q (ln q - ln p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q                      (2)
    skew_kl          KL(p || m),  m = skew p + (1 - skew) q
    skew_reverse_kl  KL(q || m),  m = (1 - skew) p + skew q

beta = 0 stands for the forward and beta = 1 for the reverse KL (the convention of GKD, arXiv 2306.13649, and TRL). The
skew divergences are DistiLLM's (arXiv 2402.03898). Logits may hold -inf: a token impossible for both models counts
nothing. Memory: a few [num_tokens, vocab_size] tensors, so callers hand over chunks of rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.layout import PackedLayout
from trsd_kernels.options import DIVERGENCES, LogitTransform


class DistillationRows(NamedTuple):
    """Per-token terms of equation (1), before alpha, kappa and weights; nats, [num_tokens]."""

    cross_entropy: Tensor
    divergence: Tensor


def lift(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def transform_logits(logits: Tensor, transform: LogitTransform) -> Tensor:
    """softcap * tanh(scale * logits / softcap); without a softcap, scale * logits. What is -inf stays -inf."""
    logits = lift(logits)
    changed = logits * transform.scale
    if transform.softcap is not None:
        changed = transform.softcap * torch.tanh(changed / transform.softcap)
    return torch.where(logits == -math.inf, -math.inf, changed)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension from log-probabilities; a term with p = 0 counts 0."""
    log_ratio = torch.where(log_p == -math.inf, torch.zeros_like(log_p), log_p - log_q)
    return (log_p.exp() * log_ratio).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """ln(share p + (1 - share) q), share strictly between 0 and 1."""
    # A token impossible for both has no finite gradient inside logaddexp; it is masked out of every term anyway.
    possible = (log_p > -math.inf) | (log_q > -math.inf)
    mixed = torch.logaddexp(
        torch.where(possible, log_p, 0.0) + math.log(share), torch.where(possible, log_q, 0.0) + math.log1p(-share)
    )
    return torch.where(possible, mixed, -math.inf)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, equation (2), from log-probabilities."""
    if beta == 0.0:
        return kl_divergence(log_p, log_q)
    if beta == 1.0:
        return kl_divergence(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl_divergence(log_p, log_m) + (1.0 - beta) * kl_divergence(log_q, log_m)


def skew_divergence(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q) from log-probabilities."""
    return kl_divergence(log_p, log_q if skew == 0.0 else log_mixture(log_p, log_q, skew))


def divergence_of(log_p: Tensor, log_q: Tensor, *, divergence: str, beta: float = 0.5, skew: float = 0.1) -> Tensor:
    """D(p, q) over the last dimension from the teacher's and the student's log-probabilities, nats."""
    if divergence == "forward_kl":
        return kl_divergence(log_p, log_q)
    if divergence == "reverse_kl":
        return kl_divergence(log_q, log_p)
    if divergence == "jsd":
        return jensen_shannon(log_p, log_q, beta)
    if divergence == "skew_kl":
        return skew_divergence(log_p, log_q, skew)
    if divergence == "skew_reverse_kl":
        return skew_divergence(log_q, log_p, skew)
    raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")


def distillation_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float,
    divergence: str,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    student_transform: LogitTransform = LogitTransform(),  # noqa: B008, an immutable tuple
    teacher_transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> DistillationRows:
    """Cross-entropy and divergence of each row.

    Args:
        student_logits: [num_tokens, vocab_size], any floating dtype.
        teacher_logits: like ``student_logits``; None (with ``alpha`` 0) leaves the divergence at 0.
        labels: [num_tokens] int64, none of them ignored.
        alpha: the term whose share is 0 is not computed and reads 0.
        divergence, beta, skew, temperature: see the module's equations.
        student_transform, teacher_transform: scale and soft cap applied to each model's logits first.

    Returns:
        The two terms, differentiable with respect to ``student_logits``.
    """
    student_logits = transform_logits(student_logits, student_transform)
    cross_entropy = value = student_logits.new_zeros(student_logits.shape[0])
    if alpha < 1.0:
        cross_entropy = torch.nn.functional.cross_entropy(student_logits, labels, reduction="none")
    if alpha > 0.0:
        log_q = torch.log_softmax(student_logits / temperature, dim=-1)
        log_p = torch.log_softmax(transform_logits(teacher_logits, teacher_transform) / temperature, dim=-1)
        value = divergence_of(log_p, log_q, divergence=divergence, beta=beta, skew=skew)
    return DistillationRows(cross_entropy, value)


def visible_keys(layout: PackedLayout, *, causal: bool = True, window: int = 0) -> Tensor:
    """Whether each token of a packed row sees each other one: bool [num_tokens, num_tokens], on the layout's device.

    Written from the sequences a layout stands for, one by one; see ``varlen_attention`` for the arguments.
    """
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for segment, (_, length, _, cut) in enumerate(layout.segments()):
        tokens = layout.sequence(segment)
        square = torch.ones(cut + length, cut + length, dtype=torch.bool)
        if causal:
            square = square.tril()
        if window:
            square &= square.new_ones(square.shape).triu(1 - window)
        mask[tokens[cut:, None], tokens[None]] = square[cut:]
    return mask.to(layout.device)


def packed_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    layout: PackedLayout,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention over a packed row under an explicit mask, in the dtype of the inputs; num_tokens^2 memory."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (lift(x) for x in (query, key, value))
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_keys(layout, causal=causal, window=window), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
