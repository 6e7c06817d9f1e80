r"""The online state of a row of logits: what one pass over any part of the vocabulary leaves behind.

With u = z / T and w = y / T (student, teacher; after bias, scale and soft cap) the parts of a row are merged like the
normaliser of an online softmax (arXiv 1805.02867): maxima by max, sums after rescaling to the common maximum:

    m_s = max u    s_s = sum e^(u - m_s)    b = sum e^(u - m_s) (u - w)    e_s = sum e^(u - m_s) u           (1)
    m_t = max w    s_t = sum e^(w - m_t)    a = sum e^(w - m_t) (w - u)    e_t = sum e^(w - m_t) w

and, where T is not 1 and the cross-entropy has a share, m_1 and s_1 of z; the label's z; where each maximum sits. With
L = m + ln s:

    CE = L_1 - z_label,  KL(p||q) = a / s_t - L_t + L_s,  KL(q||p) = b / s_s - L_s + L_t,  H(q) = L_s - e_s / s_s   (2)

The gradient of any D with respect to u is q (d - M), with its slope d = dD/dq and M = sum_v q_v d_v. A divergence
from a mixture of p and q needs both normalisers first; a second pass adds up its value D and M. Where q is nearly
certain of one token, d - M of that token is a difference of nearly equal numbers, so slopes are taken relative to the
slope at the student's top token: its own difference is then a sum of small terms, right to rounding.

A state is one [NUM_FIELDS, num_tokens] tensor, fp32 (fp64 for fp64 inputs): 64 bytes a token. Token ids are stored as
numbers, exact in fp32 up to 2^24.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.options import MIXTURES, DistillOptions

STUDENT_MAX, STUDENT_SUM, STUDENT_GAP, STUDENT_MEAN, STUDENT_TOP = range(5)
TEACHER_MAX, TEACHER_SUM, TEACHER_GAP, TEACHER_MEAN, TEACHER_TOP = range(5, 10)
PLAIN_MAX, PLAIN_SUM, LABEL_LOGIT, VALUE, SLOPE = range(10, 15)
TEACHER_AT_TOP = 15  # w at the student's top token; kept for divergences from a mixture only
NUM_FIELDS = 16
MAXIMA = (STUDENT_MAX, TEACHER_MAX, PLAIN_MAX)
MAX_VOCAB_SIZE = 2**24

_SUMS_UNDER = {
    STUDENT_MAX: (STUDENT_SUM, STUDENT_GAP, STUDENT_MEAN),
    TEACHER_MAX: (TEACHER_SUM, TEACHER_GAP, TEACHER_MEAN),
    PLAIN_MAX: (PLAIN_SUM,),
}


class TokenTerms(NamedTuple):
    """What is known of every token, [num_tokens] each, detached; 0 for rows that were left out."""

    cross_entropy: Tensor
    """Nats; 0 when alpha is 1."""
    divergence: Tensor
    """Nats, before alpha and T^2; 0 when alpha is 0."""
    student_entropy: Tensor
    """Nats, of softmax(z / T)."""
    teacher_entropy: Tensor
    """Nats, of softmax(y / T); 0 without a teacher."""
    top1_agreement: Tensor
    """1 where both models rank the same token first; 0 elsewhere and without a teacher."""


def new_state(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state of an empty part of the vocabulary."""
    state = torch.zeros(NUM_FIELDS, num_tokens, dtype=dtype, device=device)
    for field in MAXIMA:
        state[field] = -math.inf
    return state


def rescale(state: Tensor, field: int, maximum: Tensor) -> None:
    """Express the sums under the maximum ``field`` relative to ``maximum`` [num_tokens] and store it."""
    # Nothing but impossible tokens so far: the sums are 0 whatever the factor, and -inf - -inf must not make it NaN.
    factor = torch.where(state[field] == -math.inf, 0.0, torch.exp(state[field] - maximum))
    state[field] = maximum
    for total in _SUMS_UNDER[field]:
        state[total] *= factor


def log_normalizers(state: Tensor, options: DistillOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(L_s, L_t, L_1) of equation (2), [num_tokens] each."""
    student = state[STUDENT_MAX] + state[STUDENT_SUM].log()
    teacher = state[TEACHER_MAX] + state[TEACHER_SUM].log()
    plain = student if options.softmax_temperature == 1.0 else state[PLAIN_MAX] + state[PLAIN_SUM].log()
    return student, teacher, plain


def divergence_of_state(state: Tensor, options: DistillOptions) -> Tensor:
    """D of each row, nats, [num_tokens]."""
    student, teacher, _ = log_normalizers(state, options)
    if options.kind in ("none", "softmax"):
        return torch.zeros_like(student)
    if options.kind == "forward_kl":
        return state[TEACHER_GAP] / state[TEACHER_SUM] - teacher + student
    if options.kind == "reverse_kl":
        return state[STUDENT_GAP] / state[STUDENT_SUM] - student + teacher
    assert options.kind in MIXTURES
    return state[VALUE]


def finish(state: Tensor, options: DistillOptions) -> TokenTerms:
    """Equation (2) for every row of a complete state."""
    student, teacher, plain = log_normalizers(state, options)
    zeros = torch.zeros_like(student)
    with_teacher = options.kind != "none"
    return TokenTerms(
        cross_entropy=zeros if options.alpha == 1.0 else plain - state[LABEL_LOGIT],
        divergence=divergence_of_state(state, options),
        student_entropy=student - state[STUDENT_MEAN] / state[STUDENT_SUM],
        teacher_entropy=teacher - state[TEACHER_MEAN] / state[TEACHER_SUM] if with_teacher else zeros,
        top1_agreement=(state[STUDENT_TOP] == state[TEACHER_TOP]).to(state.dtype) if with_teacher else zeros,
    )
