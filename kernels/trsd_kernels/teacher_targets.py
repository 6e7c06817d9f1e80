r"""The distillation loss against cached teacher targets: no teacher, and no teacher head, at training time.

**Top k and tail.** The teacher's k most probable tokens with their log-probabilities, and the log of the mass of all
the others. The loss is the exact divergence of the coarse-grained distributions, k + 1 outcomes a token: the k tokens
and "any other". It is never more than the whole divergence (lumping outcomes together cannot raise an f-divergence),
equal to it for k = V, and does not care how the student spreads the tail. 12 k + 4 bytes a token.

**Vectors.** For a frozen student head W_s with bias b and logit scale s, c = p W_s and H(p) say all that the forward KL
asks of the teacher:

    KL(p || q) = L_s - s (h . c + p . b) / T - H(p),        dKL / dh = s (q W_s - c) / T                     (1)

with L_s = ln sum e^u: exact to rounding. q W_s and c nearly cancel where student and teacher agree; a gradient rounded
to half precision before the product would leave an error of its own size there, so q goes through the product in two
pieces (6 N V H_s flops instead of 4, still no teacher head). With cross-entropy at T = 1, c and the label's row of W_s
enter as one vector. 4 H_s + 16 bytes a token.

Both losses walk chunks of rows and make their gradients in the forward, as plan ``tokens`` does (``target_plans.py``).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trsd_kernels.checks import (
    check_bias,
    check_chunks,
    check_hidden_and_weight,
    check_labels,
    check_same_device,
    check_token_weights,
)
from trsd_kernels.linear_distill import autocast_dtype
from trsd_kernels.linear_ops import refuse_forward_mode
from trsd_kernels.logit_chunks import logit_chunks
from trsd_kernels.options import DistillOptions
from trsd_kernels.products import Head, accumulator_dtype
from trsd_kernels.reduction import LinearDistillationOutput, check_reduction, reduced_output, weights_and_items
from trsd_kernels.row_state import TokenTerms
from trsd_kernels.target_plans import accurate_product, distill_top_k, distill_vectors


class TopKTargets(NamedTuple):
    """A teacher's most probable tokens at one temperature."""

    token_ids: Tensor
    """[num_tokens, k] int64, by falling probability."""
    log_probs: Tensor
    """[num_tokens, k], ln p of softmax(y / temperature)."""
    tail_log_mass: Tensor
    """[num_tokens], ln of the mass of all other tokens; -inf where there are none."""
    temperature: float = 1.0


class TeacherVectors(NamedTuple):
    """What a frozen student head needs of a teacher's distributions at one temperature."""

    vectors: Tensor
    """[num_tokens, student_hidden_size]: p @ student_lm_head_weight."""
    entropy: Tensor
    """[num_tokens]: H(p), nats."""
    mean_bias: Tensor
    """[num_tokens]: p . student_lm_head_bias, 0 without one."""
    top_token: Tensor
    """[num_tokens] int64."""
    temperature: float = 1.0


@torch.no_grad()
def top_k_targets(
    teacher_hidden_states: Tensor,  # [num_tokens, teacher_hidden_size]
    teacher_lm_head_weight: Tensor,  # [vocab_size, teacher_hidden_size]
    k: int,
    *,
    teacher_lm_head_bias: Tensor | None = None,  # [vocab_size]
    chunk_bytes: int | None = None,
    **options: Any,
) -> TopKTargets:
    """The k most probable tokens of every row, and the mass of the rest.

    Args:
        k: 1 to vocab_size.
        chunk_bytes: working memory of a chunk, as in ``fused_linear_distillation``.
        **options: temperature and the teacher's logit scale and soft cap (``DistillOptions``).

    Raises:
        ValueError: shapes that do not fit, or k outside the vocabulary.
    """
    settings = DistillOptions(**options)
    check_hidden_and_weight(teacher_hidden_states, teacher_lm_head_weight, who="teacher")
    check_bias(teacher_lm_head_bias, vocab_size=teacher_lm_head_weight.shape[0], who="teacher")
    if not 1 <= k <= teacher_lm_head_weight.shape[0]:
        raise ValueError(f"k: expected 1 to vocab_size={teacher_lm_head_weight.shape[0]}, got {k}")
    found = []
    head = Head(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    for _, logits in logit_chunks(head, settings.teacher_transform, chunk_bytes=chunk_bytes):
        logits.div_(settings.temperature)
        lse = logits.logsumexp(1)
        values, ids = logits.topk(k, dim=1)
        tail = logits.scatter_(1, ids, -math.inf).logsumexp(1)
        found.append((ids, values - lse[:, None], tail - lse))
    if not found:
        empty = teacher_hidden_states.new_empty(0, k, dtype=torch.float32)
        return TopKTargets(empty.long(), empty, empty[:, 0], settings.temperature)
    return TopKTargets(*(torch.cat(parts) for parts in zip(*found, strict=True)), settings.temperature)


@torch.no_grad()
def teacher_vectors(
    teacher_hidden_states: Tensor,  # [num_tokens, teacher_hidden_size]
    teacher_lm_head_weight: Tensor,  # [vocab_size, teacher_hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, student_hidden_size]
    *,
    teacher_lm_head_bias: Tensor | None = None,  # [vocab_size]
    student_lm_head_bias: Tensor | None = None,  # [vocab_size]
    chunk_bytes: int | None = None,
    **options: Any,
) -> TeacherVectors:
    """p @ student_lm_head_weight of every row: valid as long as the student's head stays what it is.

    Args:
        chunk_bytes: working memory of a chunk, as in ``fused_linear_distillation``.
        **options: temperature and the teacher's logit scale and soft cap (``DistillOptions``).

    Raises:
        ValueError: shapes or vocabularies that do not fit.
    """
    settings = DistillOptions(**options)
    check_hidden_and_weight(teacher_hidden_states, teacher_lm_head_weight, who="teacher")
    vocab_size = teacher_lm_head_weight.shape[0]
    if student_lm_head_weight.ndim != 2 or student_lm_head_weight.shape[0] != vocab_size:
        raise ValueError(
            f"student_lm_head_weight: expected [{vocab_size}, student_hidden_size] for a teacher of {vocab_size} "
            f"tokens, got {tuple(student_lm_head_weight.shape)}"
        )
    check_bias(teacher_lm_head_bias, vocab_size=vocab_size, who="teacher")
    check_bias(student_lm_head_bias, vocab_size=vocab_size, who="student")
    half_ok = student_lm_head_weight.is_cuda or student_lm_head_weight.dtype == torch.float64
    student = student_lm_head_weight.detach() if half_ok else student_lm_head_weight.detach().float()
    num_tokens, word = len(teacher_hidden_states), accumulator_dtype(student.dtype)
    vectors = student.new_empty(num_tokens, student.shape[1], dtype=word)
    entropy, mean_bias = (student.new_zeros(num_tokens, dtype=word) for _ in range(2))
    top_token = torch.empty(num_tokens, dtype=torch.int64, device=student.device)
    head = Head(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    if student_lm_head_bias is not None:  # -inf marks tokens that the student cannot write
        bias = student_lm_head_bias.detach().to(word)
        forbidden = (bias == -torch.inf).to(word)
        bias = bias.masked_fill(forbidden == 1, 0.0)
    for part, logits in logit_chunks(head, settings.teacher_transform, chunk_bytes=chunk_bytes):
        logits.div_(settings.temperature)
        top_token[part] = logits.argmax(1)
        log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
        p = log_p.exp()
        with torch.autocast(student.device.type, enabled=False):
            entropy[part] = -torch.linalg.vecdot(p, log_p.masked_fill_(p == 0, 0.0))
            if student_lm_head_bias is not None:
                apart = p.to(word) @ forbidden > 0
                mean_bias[part] = (p.to(word) @ bias).masked_fill_(apart, -torch.inf)
            vectors[part] = accurate_product(p.to(word), student)
    return TeacherVectors(vectors, entropy, mean_bias, top_token, settings.temperature)


def distill_from_top_k(
    student_hidden_states: Tensor,  # [num_tokens, student_hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, student_hidden_size]
    targets: TopKTargets,
    labels: Tensor,  # [num_tokens]
    *,
    student_lm_head_bias: Tensor | None = None,  # [vocab_size]
    token_weights: Tensor | None = None,  # [num_tokens]
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LinearDistillationOutput:
    """``fused_linear_distillation`` against the k most probable tokens and the tail as one outcome.

    Args:
        targets: rows aligned with ``student_hidden_states``; its temperature must be the loss's.
        reduction: "mean" or "sum".
        others: as in ``fused_linear_distillation``; every divergence of ``DistillOptions``, over k + 1 outcomes.

    Returns:
        As ``fused_linear_distillation``; the teacher's entropy is that of the k + 1 outcomes.

    Raises:
        ValueError: shapes, ids or a temperature that do not fit, with what to do.
    """
    _check_rows(targets, student_hidden_states, ("log_probs", "tail_log_mass"))
    ids, vocab_size = targets.token_ids, student_lm_head_weight.shape[0]
    if ids.shape != targets.log_probs.shape or ids.dtype != torch.int64 or not ids.shape[1]:
        raise ValueError(
            f"targets: expected token_ids and log_probs [num_tokens, k >= 1], ids in int64, got {tuple(ids.shape)} "
            f"{ids.dtype} and {tuple(targets.log_probs.shape)}"
        )
    if not torch.compiler.is_compiling() and ids.numel() and not ids.is_meta:
        _check_ids(ids, vocab_size)
    return _distill_from(
        distill_top_k,
        targets,
        (student_hidden_states, student_lm_head_weight, student_lm_head_bias),
        labels,
        token_weights,
        num_items_in_batch,
        (reduction, chunk_size, chunk_bytes),
        DistillOptions(**options),
        autocast_dtype(labels.device),
    )


def distill_from_vectors(
    student_hidden_states: Tensor,  # [num_tokens, student_hidden_size]
    student_lm_head_weight: Tensor,  # [vocab_size, student_hidden_size], frozen
    targets: TeacherVectors,
    labels: Tensor,  # [num_tokens]
    *,
    student_lm_head_bias: Tensor | None = None,  # [vocab_size], frozen
    token_weights: Tensor | None = None,  # [num_tokens]
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LinearDistillationOutput:
    """``fused_linear_distillation`` with forward KL for a frozen student head, from one vector a token.

    Args:
        targets: rows aligned with ``student_hidden_states``, made with this very head and temperature.
        reduction: "mean" or "sum".
        others: as in ``fused_linear_distillation``; the divergence must be "forward_kl", without a student soft cap.

    Returns:
        As ``fused_linear_distillation``.

    Raises:
        ValueError: a head that is trained, another divergence, a soft cap, or what does not fit, with what to do.
    """
    settings = DistillOptions(**options)
    _check_rows(targets, student_hidden_states, ("vectors", "entropy", "mean_bias", "top_token"))
    if targets.vectors.shape != student_hidden_states.shape:
        raise ValueError(
            f"targets: expected vectors of shape {tuple(student_hidden_states.shape)}, one per hidden state, got "
            f"{tuple(targets.vectors.shape)}: made with another student head?"
        )
    if settings.kind not in ("forward_kl", "none"):
        raise ValueError(f"divergence: vectors hold the forward KL only, got {settings.divergence!r} (top k holds all)")
    if settings.student_logit_softcap is not None:
        raise ValueError("student_logit_softcap: vectors need logits that are linear in the hidden states; use top k")
    trained = [t for t in (student_lm_head_weight, student_lm_head_bias) if t is not None and t.requires_grad]
    if trained and torch.is_grad_enabled():
        raise ValueError("vectors are valid for a frozen student head only: freeze it, or use distill_from_top_k")
    return _distill_from(
        distill_vectors,
        targets,
        (student_hidden_states, student_lm_head_weight, student_lm_head_bias),
        labels,
        token_weights,
        num_items_in_batch,
        (reduction, chunk_size, chunk_bytes),
        settings,
        None,  # the vectors were made with the head as it is; a rounded one would not cancel against them
    )


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """Ids of the vocabulary, none twice in a row; one wait for the device."""
    twice = (ids.sort(1).values.diff(dim=1) == 0).any()
    lowest, highest, twice = torch.stack([ids.min(), ids.max(), twice.long()]).tolist()
    if not 0 <= lowest <= highest < vocab_size:
        raise ValueError(f"targets: token_ids reach outside [0, {vocab_size}): cached for another vocabulary?")
    if twice:
        raise ValueError("targets: a row of token_ids names a token twice, so its probability would count twice")


def _check_rows(targets: TopKTargets | TeacherVectors, hidden_states: Tensor, names: tuple[str, ...]) -> None:
    for name in names:
        shape = tuple(getattr(targets, name).shape)
        if shape[:1] != hidden_states.shape[:1]:
            raise ValueError(
                f"targets.{name} holds {shape[0] if shape else 1} tokens, student_hidden_states "
                f"{hidden_states.shape[0]}"
            )
        if len(shape) != (2 if name in ("log_probs", "vectors") else 1):
            raise ValueError(f"targets.{name}: expected one value a token, got shape {shape}")


def _distill_from(
    op: Any,
    targets: TopKTargets | TeacherVectors,
    student: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    token_weights: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    execution: tuple[str, int | None, int | None],
    options: DistillOptions,
    autocast: torch.dtype | None,
) -> LinearDistillationOutput:
    """Check what both losses share, call ``op`` and reduce its terms."""
    hidden_states, weight, bias = student
    reduction, chunk_size, chunk_bytes = execution
    names = targets._fields[:-1]
    *targets, temperature = targets
    refuse_forward_mode(*student)
    check_reduction(reduction, num_items_in_batch)
    check_chunks(chunk_size, chunk_bytes)
    if reduction == "none":
        raise ValueError('reduction: gradients are made for a scalar loss, expected "mean" or "sum"')
    if temperature != options.temperature:
        raise ValueError(
            f"targets were made at temperature {temperature}, the loss asks for {options.temperature}: make them again"
        )
    check_hidden_and_weight(hidden_states, weight, who="student")
    check_bias(bias, vocab_size=weight.shape[0], who="student")
    check_labels(labels, num_tokens=hidden_states.shape[0])
    tensors = {f"targets.{name}": target for name, target in zip(names, targets, strict=True)}
    check_same_device(
        student_hidden_states=hidden_states,
        student_lm_head_weight=weight,
        student_lm_head_bias=bias,
        labels=labels,
        token_weights=token_weights,
        **tensors,
    )
    if token_weights is not None:
        check_token_weights(token_weights, num_tokens=hidden_states.shape[0])
    weights, num_items = weights_and_items(
        labels,
        token_weights,
        num_items_in_batch,
        reduction,
        ignore_index=options.ignore_index,
        dtype=torch.float64 if torch.float64 in (hidden_states.dtype, weight.dtype) else torch.float32,
    )
    loss, stacked, *_ = op(
        *student,
        *targets,
        labels,
        weights,
        options.encode(),
        chunk_size,
        chunk_bytes,
        autocast,
        *(tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in student),
    )
    terms = TokenTerms(*stacked.unbind())
    return reduced_output(terms, weights, num_items, options, reduction, loss)
