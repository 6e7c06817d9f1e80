"""Plan ``tokens`` against cached targets: a chunk of rows of the student's logits, the gradient made in the forward.

The mathematics is in ``teacher_targets.py``. Each plan holds one fp32 [C, V] tensor, in whose bytes the gradient is
made (plan vectors: beside it two half-precision pieces of it where products run in half precision).
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from trsd_kernels.linear_ops import (
    SCHEMA_REST,
    SCHEMA_STUDENT,
    TAGS,
    Call,
    empty_gradients,
    or_empty,
    rows_per_chunk,
    tokens_backward,
    tokens_setup,
)
from trsd_kernels.mixtures import divergence_slope
from trsd_kernels.options import DistillOptions, SoftmaxOptions
from trsd_kernels.products import (
    HALF,
    GradientScale,
    Head,
    accumulator_dtype,
    product,
    product_dtype,
    row_weights,
    rows_class,
    scatter_rows,
    supervised_rows,
)
from trsd_kernels.reference import divergence_of, transform_logits
from trsd_kernels.row_state import (
    STUDENT_MAX,
    STUDENT_MEAN,
    STUDENT_SUM,
    STUDENT_TOP,
    TokenTerms,
    log_normalizers,
    new_state,
)
from trsd_kernels.token_plan import GradientSums, Needs
from trsd_kernels.torch_rows import TorchRows, even_chunk, row_chunks


class TopK(NamedTuple):
    """Targets of some rows: see ``teacher_targets.TopKTargets``."""

    token_ids: Tensor  # [C, k]
    log_probs: Tensor  # [C, k]
    tail_log_mass: Tensor  # [C]


class Vectors(NamedTuple):
    """Targets of some rows: see ``teacher_targets.TeacherVectors``."""

    vectors: Tensor  # [C, H_s]
    entropy: Tensor  # [C]
    mean_bias: Tensor  # [C]
    top_token: Tensor  # [C]


def accurate_product(left: Tensor, weight: Tensor) -> Tensor:
    """left [C, V] fp32 @ weight [V, H], right to fp32 even where the product takes half precision; spends ``left``."""
    if weight.dtype not in HALF:
        return product(left, weight)
    coarse = left.to(weight.dtype)
    result = product(coarse, weight)
    return result.add_(product(left.sub_(coarse).to(weight.dtype), weight))


class _CachedPlan(ABC):
    """What both plans share: the student's side, its rows, and the walk over chunks.

    Args:
        labels, weights: [num_tokens]; weights are divided by the number of items already.
        targets: of every token.
    """

    def __init__(
        self,
        student: Head,
        targets: TopK | Vectors,
        labels: Tensor,
        weights: Tensor,
        options: DistillOptions,
        needs: Needs,
        *,
        chunk_size: int | None,
        chunk_bytes: int | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        vocab_size = student.weight.shape[0]
        self.rows = supervised_rows(labels, weights, vocab_size=vocab_size, ignore_index=options.ignore_index)
        self.num_tokens = len(labels)
        selected = slice(None) if self.rows is None else self.rows
        self.labels, self.weights = labels[selected].contiguous(), weights[selected]
        self.student, self.targets, self.options, self.needs = student, targets, options, needs
        self.dtype = product_dtype(student.hidden_states, student.weight, autocast_dtype)
        self.state_dtype = accumulator_dtype(self.dtype)
        self.head = student.cast_weight(self.dtype)
        self.rows_class = rows_class(labels.device, self.state_dtype)
        limit = chunk_size or rows_per_chunk(vocab_size, self.state_dtype, labels.device, chunk_bytes)
        self.chunk = even_chunk(len(self.labels), limit)
        self.softmax = SoftmaxOptions(
            alpha=options.alpha,
            temperature=options.temperature,
            student_logit_scale=options.student_logit_scale,
            student_logit_softcap=options.student_logit_softcap,
        )

    def run(self) -> tuple[Tensor, Tensor, GradientSums, Tensor | None]:
        """(loss, terms [5, num_tokens], gradient sums, the factor that undoes their scaling)."""
        counted = row_weights(self.weights, self.options)
        scale = GradientScale.of(counted, self.dtype, self.options)
        sums = GradientSums(self.student, self.head, self.needs, self.num_tokens, self.state_dtype)
        terms = self.weights.new_zeros(len(TokenTerms._fields), len(self.labels), dtype=self.state_dtype)
        for part in row_chunks(len(self.labels), self.chunk):
            here = part if self.rows is None else self.rows[part]
            hidden = self.student.hidden_states[here].detach().to(self.dtype)
            targets = type(self.targets)(*(target[here] for target in self.targets))
            found = self.chunk_terms(
                hidden, targets, self.labels[part], scale.weights[:, part], sums, here=here, undo=scale.undo
            )
            terms[:, part] = torch.stack(found)
        loss = (counted[0] * terms[0]).sum() + (counted[1] * terms[1]).sum()
        return loss, scatter_rows(terms, self.rows, self.num_tokens), sums, scale.undo

    @abstractmethod
    def chunk_terms(
        self,
        hidden: Tensor,
        targets: TopK | Vectors,
        labels: Tensor,
        weights: Tensor,
        sums: GradientSums,
        *,
        here: slice | Tensor,
        undo: Tensor | None,
    ) -> TokenTerms:
        """Terms of one chunk; its gradients go into ``sums``."""

    def softmax_rows(self, logits: Tensor) -> tuple[TorchRows, Tensor]:
        """The row passes over raw student logits, no label among them, and their empty state."""
        nowhere = torch.full((logits.shape[0],), -1, device=logits.device)
        rows = self.rows_class(self.softmax, logits, None, nowhere, student_bias=self.head.bias)
        return rows, new_state(logits.shape[0], dtype=self.state_dtype, device=logits.device)

    def transformed(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(z, dz / dlogits) of raw logits [C, j] that belong to ``tokens`` [C, j]."""
        if self.head.bias is not None:
            logits = logits + self.head.bias[tokens].to(logits.dtype)
        transform = self.options.student_transform
        z = transform_logits(logits, transform)
        slope = torch.full_like(z, transform.scale)
        if transform.softcap is not None:
            slope *= torch.where(z == -math.inf, 0.0, 1.0 - (z / transform.softcap).square())
        return z, slope


class TopKPlan(_CachedPlan):
    """Divergence of k + 1 outcomes: the tail's logits are walked by the row kernels, the k others held apart."""

    def chunk_terms(self, hidden, targets, labels, weights, sums, *, here, undo):
        logits = product(hidden, self.head.weight.T)
        top_z, top_slope = self.transformed(logits.gather(1, targets.token_ids), targets.token_ids)
        label_z, label_slope = self.transformed(logits.gather(1, labels[:, None]), labels[:, None])
        logits.scatter_(1, targets.token_ids, -math.inf)
        rows, state = self.softmax_rows(logits)
        rows.accumulate(state)
        tail_lse, _, tail_plain = log_normalizers(state, self.softmax)
        top_u = top_z / self.options.temperature
        lse = torch.logaddexp(tail_lse, top_u.logsumexp(1))
        plain = torch.logaddexp(tail_plain, top_z.logsumexp(1))
        log_q = torch.cat([top_u, tail_lse[:, None]], 1) - lse[:, None]
        log_p = torch.cat([targets.log_probs, targets.tail_log_mass[:, None]], 1).to(self.state_dtype)
        divergence, slope = self._coarse_divergence(log_p, log_q, weights[1])
        if any(self.needs):
            total = slope.sum(1)
            tail_weights = torch.stack(
                [
                    weights[0] * (tail_plain - plain).exp(),
                    slope[:, -1] - total * log_q[:, -1].exp(),
                ]
            )
            gradient = rows.gradient(state, tail_weights, self.dtype)  # [C, V], 0 at the k tokens
            on_top = (slope[:, :-1] - log_q[:, :-1].exp() * total[:, None]) / self.options.temperature
            if self.options.alpha < 1.0:
                on_top += weights[0][:, None] * (top_z - plain[:, None]).exp()
            gradient.scatter_(1, targets.token_ids, (on_top * top_slope).to(gradient.dtype))
            if self.options.alpha < 1.0:
                # In fp32 and rounded once: at a confident token q - 1 is a difference of nearly equal numbers.
                listed = targets.token_ids == labels[:, None]
                label_u = label_z[:, 0] / self.options.temperature
                in_tail = tail_weights[1] / self.options.temperature * (label_u - tail_lse).exp()
                in_tail += weights[0] * (label_z[:, 0] - plain).exp()
                at_label = torch.where(listed.any(1), torch.where(listed, on_top, 0.0).sum(1), in_tail) - weights[0]
                gradient.scatter_(1, labels[:, None], (at_label[:, None] * label_slope).to(gradient.dtype))
            sums.add(gradient, hidden, here, undo)
        return self._terms(state, targets, log_p, log_q, top_u, plain - label_z[:, 0], divergence, lse)

    def _coarse_divergence(self, log_p: Tensor, log_q: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(D of each row over k + 1 outcomes, weights * dD / dlog_q up to a multiple of q, which drops out)."""
        options = self.options
        if options.kind == "none":
            return torch.zeros_like(weights), torch.zeros_like(log_q)
        value = divergence_of(log_p, log_q, divergence=options.divergence, beta=options.beta, skew=options.skew)
        return value, weights[:, None] * divergence_slope(log_p, log_q, options)

    def _terms(self, state, targets, log_p, log_q, top_u, cross_entropy, divergence, lse) -> TokenTerms:
        tail_mass = log_q[:, -1].exp()
        tail_mean = torch.where(tail_mass == 0, 0.0, state[STUDENT_MEAN] / state[STUDENT_SUM])
        q = log_q[:, :-1].exp()
        mean = torch.where(q == 0, 0.0, q * top_u).sum(1) + tail_mass * tail_mean
        first = (top_u.argmax(1) == targets.log_probs.argmax(1)) & (top_u.amax(1) >= state[STUDENT_MAX])
        p = log_p.exp()
        return TokenTerms(
            torch.zeros_like(lse) if self.options.alpha == 1.0 else cross_entropy,
            divergence,
            lse - mean,
            -torch.where(p == 0, 0.0, p * log_p).sum(1),
            first.to(lse.dtype),
        )


class VectorPlan(_CachedPlan):
    """Forward KL of a frozen head from p @ weight alone."""

    def chunk_terms(self, hidden, targets, labels, weights, sums, *, here, undo):
        options, scale = self.options, self.options.student_logit_scale
        logits = product(hidden, self.head.weight.T)
        label_z, _ = self.transformed(logits.gather(1, labels[:, None]), labels[:, None])
        rows, state = self.softmax_rows(logits)
        gradient = rows.complete(state, weights if self.needs.hidden_states else None, self.state_dtype)
        lse, _, plain = log_normalizers(state, self.softmax)
        vectors = targets.vectors.to(self.state_dtype)
        mean_z = scale * (torch.linalg.vecdot(hidden.to(self.state_dtype), vectors) + targets.mean_bias)
        if gradient is not None:
            expected = accurate_product(gradient, self.head.weight)
            target = weights[1][:, None] / options.temperature * vectors
            if options.alpha < 1.0:
                target += weights[0][:, None] * self.head.weight[labels].to(self.state_dtype)
            sums.add_hidden(expected.sub_(target, alpha=scale), here, undo)
        return TokenTerms(
            torch.zeros_like(lse) if options.alpha == 1.0 else plain - label_z[:, 0],
            torch.zeros_like(lse) if options.kind == "none" else lse - mean_z / options.temperature - targets.entropy,
            lse - state[STUDENT_MEAN] / state[STUDENT_SUM],
            targets.entropy.to(lse.dtype),
            (state[STUDENT_TOP].long() == targets.top_token).to(lse.dtype),
        )


def _run(plan_class: type[_CachedPlan], targets_class: type, arguments: tuple) -> tuple[Tensor, ...]:
    """(loss, TokenTerms [5, num_tokens], dh, dw, db) of an op's arguments: student, targets, the rest of a ``Call``."""
    count = len(targets_class._fields)
    call = Call(*arguments[:3], None, None, None, *arguments[3 + count :])
    plan = plan_class(
        call.student,
        targets_class(*arguments[3 : 3 + count]),
        call.labels,
        call.weights,
        call.options,
        call.needs,
        chunk_size=call.chunk_size,
        chunk_bytes=call.chunk_bytes,
        autocast_dtype=call.autocast_dtype,
    )
    with torch.autocast(call.labels.device.type, enabled=False):
        loss, terms, sums, undo = plan.run()
        gradients = sums.results(undo)
    return loss, terms, *(or_empty(gradient, call.student_hidden_states) for gradient in gradients)


def _make_op(name: str, plan_class: type[_CachedPlan], targets_class: type):
    """One plan as a dispatcher op, like those of ``linear_ops.py``."""
    targets = ", ".join(f"Tensor {field}" for field in targets_class._fields)
    schema = f"({SCHEMA_STUDENT}, {targets}, {SCHEMA_REST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"

    @custom_op(f"trsd::{name}", mutates_args=(), schema=schema, tags=TAGS)
    def op(*arguments):
        return _run(plan_class, targets_class, arguments)

    @op.register_fake
    def _(*arguments):
        call = Call(*arguments[:3], None, None, None, *arguments[3 + len(targets_class._fields) :])
        terms = call.weights.new_empty(len(TokenTerms._fields), call.labels.shape[0])
        return call.weights.new_empty(()), terms, *empty_gradients(*call.student, call.needs)

    op.register_autograd(tokens_backward, setup_context=tokens_setup)
    return op


distill_top_k = _make_op("distill_top_k", TopKPlan, TopK)
distill_vectors = _make_op("distill_vectors", VectorPlan, Vectors)
