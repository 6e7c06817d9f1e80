"""The row passes of ``row_state.py`` in plain torch: what runs on a CPU, in fp64, or where Triton is missing.

One ``TorchRows`` holds the logits of some rows over some part of the vocabulary, [C, V'], and answers three calls:
``accumulate`` and ``accumulate_mixture`` merge them into a state, ``gradient`` turns the student's logits into
dloss/dlogits in place. Where the part is the whole vocabulary, ``complete`` does all three and takes each exponential
once. Memory beside the two inputs: some tensors of BLOCK_BYTES, or of one row where that is more.

On a CPU torch compares, selects and finds the place of a maximum an element at a time, at ten to thirty times the price
of a sum, so none of these stands in the way of rows without impossible tokens.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trsd_kernels.mixtures import Mixture, expectation, halves
from trsd_kernels.options import MIXTURES, DistillOptions, LogitTransform
from trsd_kernels.row_state import (
    LABEL_LOGIT,
    PLAIN_MAX,
    PLAIN_SUM,
    SLOPE,
    STUDENT_GAP,
    STUDENT_MAX,
    STUDENT_MEAN,
    STUDENT_SUM,
    STUDENT_TOP,
    TEACHER_AT_TOP,
    TEACHER_GAP,
    TEACHER_MAX,
    TEACHER_MEAN,
    TEACHER_SUM,
    TEACHER_TOP,
    VALUE,
    divergence_of_state,
    log_normalizers,
    rescale,
)

STUDENT_FIELDS = (STUDENT_MAX, STUDENT_SUM, STUDENT_GAP, STUDENT_MEAN, STUDENT_TOP)
TEACHER_FIELDS = (TEACHER_MAX, TEACHER_SUM, TEACHER_GAP, TEACHER_MEAN, TEACHER_TOP)
BLOCK_BYTES = 2**20  # with its temporaries a block stays in the cache, and is worth some hundred calls of torch
SEGMENT = 256


def even_chunk(total: int, limit: int) -> int:
    """The length of a chunk, at most ``limit``, that leaves no small last one; a multiple of 128 where that fits."""
    if total <= limit:
        return max(1, total)
    even = -(-total // -(-total // limit))
    rounded = even + -even % 128
    return rounded if rounded <= limit else even


def row_chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk``."""
    return (slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk))


def transform_(logits: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """The head's bias, scale and soft cap, in place; what is -inf stays -inf."""
    if bias is not None:
        logits += bias
    if transform == LogitTransform():
        return logits
    if transform.softcap is None and transform.scale > 0.0:
        return logits.mul_(transform.scale)
    impossible = logits == -math.inf
    logits *= transform.scale
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits.masked_fill_(impossible, -math.inf)


class _Scratch:
    """Temporaries like ``logits`` of one block after another: fresh memory costs a CPU more than a pass over it."""

    def __init__(self, logits: Tensor, num_rows: int) -> None:
        self.logits, self.num_rows = logits, num_rows
        self.buffers: list[Tensor] = []
        self.taken = 0

    def take(self, num_rows: int) -> Tensor:
        """[num_rows, V'] of anything, the caller's until ``release``."""
        if self.taken == len(self.buffers):
            self.buffers.append(self.logits.new_empty(self.num_rows, self.logits.shape[1]))
        self.taken += 1
        return self.buffers[self.taken - 1][:num_rows]

    def release(self) -> None:
        """All of them are free again."""
        self.taken = 0


def row_maximum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and where it first is: ``rows.max(1)`` of rows that are wide, from the maxima of segments."""
    width = rows.shape[1]
    if width < 4 * SEGMENT:
        return rows.max(1)
    whole = width - width % SEGMENT
    maxima = rows[:, :whole].unflatten(1, (-1, SEGMENT)).amax(2)
    if whole < width:
        maxima = torch.cat([maxima, rows[:, whole:].amax(1, keepdim=True)], 1)
    maximum, segment = maxima.max(1)
    start = (segment * SEGMENT).clamp_(max=width - SEGMENT)[:, None]
    inside = rows.gather(1, start + torch.arange(SEGMENT, device=rows.device)).argmax(1)
    return maximum, start[:, 0] + inside


class TorchRows:
    """Logits of C rows over ``[vocab_start, vocab_start + V')``; both tensors are taken over as scratch.

    Args:
        student_logits: [C, V'] products of hidden states and weights, fp32 or fp64.
        teacher_logits: like ``student_logits``, or None.
        labels: [C] int64, ids over the whole vocabulary.
        student_bias, teacher_bias: [V'] or None.
        masked: whether a logit may be -inf. None looks, and works on a few rows at a time; a given answer makes the
            passes free of control flow, as tracing wants them.
    """

    live_tensors = 2

    @staticmethod
    def scratch_bytes(options: DistillOptions, num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
        """Temporaries beside the logits, at most."""
        row = dtype.itemsize * vocab_size
        tensors = 4.5  # two exponentials, a product, and what impossible tokens take
        if options.softmax_temperature != 1.0:
            tensors += 2 if options.alpha == 1.0 else 3
        if options.student_transform.softcap is not None:
            tensors += 1
        if options.kind in MIXTURES:
            tensors += 3 if halves(options) else 6
        return int(tensors * min(max(BLOCK_BYTES, row), num_rows * row))

    def __init__(
        self,
        options: DistillOptions,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        vocab_start: int = 0,
        masked: bool | None = None,
    ) -> None:
        self.student = student_logits
        num_rows, vocab_size = student_logits.shape
        length, self.scratch = num_rows, None
        if masked is None:
            length = min(num_rows, max(1, BLOCK_BYTES // (student_logits.element_size() * vocab_size)))
            self.scratch = _Scratch(student_logits, length)
        self.blocks = []
        for part in row_chunks(num_rows, max(1, length)):
            student = transform_(student_logits[part], student_bias, options.student_transform)
            teacher = None
            if teacher_logits is not None:
                teacher = transform_(teacher_logits[part], teacher_bias, options.teacher_transform)
            block = _RowBlock(options, student, teacher, labels[part] - vocab_start, vocab_start, masked, self.scratch)
            self.blocks.append((part, block))

    def _visited(self) -> Iterator[tuple[slice, "_RowBlock"]]:
        for part, block in self.blocks:
            yield part, block
            block.kept = None
            if self.scratch is not None:
                self.scratch.release()

    def complete(self, state: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """All passes over the whole vocabulary, an empty ``state`` filled in; ``gradient``, or None without weights."""
        for part, block in self._visited():
            block.accumulate(state[:, part], keep=True)
            block.accumulate_mixture(state[:, part])
            if weights is not None:
                block.gradient(state[:, part], weights[:, part])
        return None if weights is None else self.student.to(dtype)

    def accumulate(self, state: Tensor) -> None:
        """Merge these logits into ``state`` [NUM_FIELDS, C]: every field but the mixture's. They stay as they are."""
        for part, block in self._visited():
            block.accumulate(state[:, part])

    def accumulate_mixture(self, state: Tensor) -> None:
        """Add these logits' share of D and M to ``state``, whose normalisers are complete."""
        for part, block in self._visited():
            block.accumulate_mixture(state[:, part])

    def gradient(self, state: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """dloss/dlogits [C, V'] in ``dtype``, before the bias, in the student's own bytes where the dtypes agree.

        Args:
            state: complete, [NUM_FIELDS, C].
            weights: [2, C]: what each row's cross-entropy and divergence count in the loss.
        """
        for part, block in self._visited():
            block.gradient(state[:, part], weights[:, part])
        return self.student.to(dtype)


@dataclass
class _Kept:
    """What ``accumulate`` keeps of rows whose vocabulary is whole, for the passes that follow at once."""

    student: Tensor  # u
    teacher: Tensor | None  # w
    q: Tensor  # softmax(u)
    p: Tensor | None  # softmax(w)
    plain: Tensor | None  # softmax(z), where it is wanted and not q
    slope_of_cap: Tensor | None
    slope: Tensor | None = None  # of a mixture, less that of the student's top token


class _RowBlock:
    """The passes over a few rows, small enough that their temporaries stay in the processor's cache."""

    def __init__(
        self,
        options: DistillOptions,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        vocab_start: int,
        masked: bool | None,
        scratch: _Scratch | None,
    ) -> None:
        self.options, self.student, self.teacher = options, student, teacher
        self.labels, self.vocab_start, self.scratch = labels, vocab_start, scratch
        self.traced = masked is not None
        if masked is not None:
            self.masked = masked
        self.kept: _Kept | None = None

    @functools.cached_property
    def masked(self) -> bool:
        """Impossible tokens (-inf) cost masked passes; rows without them do not pay for it."""
        return any(bool((x.amin(1) == -math.inf).any()) for x in (self.student, self.teacher) if x is not None)

    def _new(self) -> Tensor | None:
        """Bytes for a temporary; None, torch's own, where the passes are traced."""
        return None if self.scratch is None else self.scratch.take(len(self.student))

    def _place(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """([C, 1] a valid column for each row's token, [C] whether the token lies in this part of the vocabulary)."""
        last = self.student.shape[1] - 1
        return tokens.clamp(0, last)[:, None], (tokens >= 0) & (tokens <= last)

    def _at_temperature(self, logits: Tensor | None) -> Tensor | None:
        temperature = self.options.softmax_temperature
        return logits if logits is None or temperature == 1.0 else torch.div(logits, temperature, out=self._new())

    def accumulate(self, state: Tensor, *, keep: bool = False) -> None:
        """``keep``: the state was empty and is complete hereafter; the other passes follow and take the logits over."""
        options = self.options
        student, teacher = self._at_temperature(self.student), self._at_temperature(self.teacher)
        q, p, plain, work = self._new(), self._new(), None, self._new()
        q = self._merge(state, STUDENT_FIELDS, student, teacher, options.kind == "reverse_kl", q, work)
        if teacher is None:
            p = None
        else:
            p = self._merge(state, TEACHER_FIELDS, teacher, student, options.kind == "forward_kl", p, work)
        if options.alpha < 1.0:
            if student is not self.student:
                maximum = torch.maximum(state[PLAIN_MAX], self.student.amax(1))
                rescale(state, PLAIN_MAX, maximum)
                plain = torch.sub(self.student, _finite(maximum)[:, None], out=self._new()).exp_()
                state[PLAIN_SUM] += plain.sum(1)
            place, here = self._place(self.labels)
            state[LABEL_LOGIT] = torch.where(here, self.student.gather(1, place)[:, 0], state[LABEL_LOGIT])
        if keep:
            for weights, field in ((q, STUDENT_SUM), (p, TEACHER_SUM), (plain, PLAIN_SUM)):
                if weights is not None:
                    weights /= state[field][:, None]
            self.kept = _Kept(student, teacher, q, p, plain, self._slope_of_cap())

    def _merge(
        self,
        state: Tensor,
        fields: tuple[int, ...],
        own: Tensor,
        other: Tensor | None,
        with_gap: bool,
        out: Tensor | None,
        work: Tensor | None,
    ) -> Tensor:
        """Merge one model's maximum, sums and top token; returns e^(own - maximum)."""
        max_field, sum_field, gap_field, mean_field, top_field = fields
        highest, top = own.max(1) if self.traced else row_maximum(own)
        higher = highest > state[max_field]
        state[top_field] = torch.where(higher, (top + self.vocab_start).to(state.dtype), state[top_field])
        if top_field == STUDENT_TOP and self.options.kind in MIXTURES:
            state[TEACHER_AT_TOP] = torch.where(higher, other.gather(1, top[:, None])[:, 0], state[TEACHER_AT_TOP])
        maximum = torch.maximum(state[max_field], highest)
        rescale(state, max_field, maximum)
        weights = torch.sub(own, _finite(maximum)[:, None], out=out).exp_()
        state[sum_field] += weights.sum(1)
        state[mean_field] += expectation(weights, own, self.masked, out=work)
        if with_gap:
            state[gap_field] += expectation(weights, torch.sub(own, other, out=work), self.masked, out=work)
        return weights

    def accumulate_mixture(self, state: Tensor) -> None:
        """Takes over the logits."""
        if self.options.kind not in MIXTURES:
            return
        kept, masked = self.kept, self.masked
        log_q, log_p = self._log_probabilities_(state)
        if kept is None:
            q, p = torch.exp(log_q, out=self._new()), torch.exp(log_p, out=self._new())
        else:
            q, p = kept.q, kept.p
        mixture = Mixture(log_p, log_q, self.options, masked, self._new)
        state[VALUE] += mixture.value(p, q)
        slope = self._slope_from_top_(mixture.slope(), state)
        state[SLOPE] += torch.mul(q, slope, out=mixture.work).sum(1)
        if kept is not None:
            kept.slope = slope

    def _log_probabilities_(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """(ln q, ln p), in the bytes of the logits, or of what was kept of them."""
        student, teacher = (self.student, self.teacher) if self.kept is None else (self.kept.student, self.kept.teacher)
        log_normalizer, log_normalizer_of_teacher, _ = log_normalizers(state, self.options)
        if self.kept is None and self.options.softmax_temperature != 1.0:
            student /= self.options.softmax_temperature
            if teacher is not None:
                teacher /= self.options.softmax_temperature
        student -= log_normalizer[:, None]
        if teacher is not None:
            teacher -= log_normalizer_of_teacher[:, None]
        return student, teacher

    def _slope_from_top_(self, slope: Tensor, state: Tensor) -> Tensor:
        """The slope minus its value at the student's top token, in place; exactly 0 there, whatever was rounded."""
        student, teacher, _ = log_normalizers(state, self.options)
        log_p, log_q = state[TEACHER_AT_TOP] - teacher, state[STUDENT_MAX] - student
        slope -= Mixture(log_p[:, None], log_q[:, None], self.options, masked=True).slope()
        place, here = self._place(state[STUDENT_TOP].long() - self.vocab_start)
        return slope.scatter_(1, place, torch.where(here[:, None], 0.0, slope.gather(1, place)))

    def _slope_of_cap(self) -> Tensor | None:
        """dz / d(scaled logit) under the student's soft cap; None without."""
        softcap = self.options.student_transform.softcap
        if softcap is None:
            return None
        slope = torch.div(self.student, softcap, out=self._new()).square_().neg_().add_(1.0)
        return slope.masked_fill_(self.student == -math.inf, 0.0) if self.masked else slope

    def gradient(self, state: Tensor, weights: Tensor) -> None:
        """dloss/dlogits, written over the student's logits."""
        options, transform = self.options, self.options.student_transform
        on_labels, on_divergence = weights[0][:, None], (weights[1] / options.temperature)[:, None]
        if options.kind == "none":
            on_divergence = torch.zeros_like(on_divergence)
        slope_of_cap = self._slope_of_cap() if self.kept is None else self.kept.slope_of_cap
        if options.alpha < 1.0:
            gradient = self._both_terms(state, on_labels, on_divergence)
        else:
            gradient = self._weighted_(*self._factors(state), on_divergence)
        if slope_of_cap is not None:
            gradient *= slope_of_cap
        if transform.scale != 1.0:
            gradient *= transform.scale
        # A row that weighs nothing passes nothing on, whatever its logits are.
        nothing = (weights == 0).all(0)
        if self.traced or bool(nothing.any()):
            gradient.masked_fill_(nothing[:, None], 0.0)
        if gradient is not self.student:
            self.student.copy_(gradient)

    def _both_terms(self, state: Tensor, on_labels: Tensor, on_divergence: Tensor) -> Tensor:
        """weights[0] (softmax(z) - 1 at the label) + weights[1] / T q (d - M)."""
        place, here = self._place(self.labels)
        plain = None  # where q serves both terms
        if self.options.softmax_temperature != 1.0:
            plain = self._plain_softmax(state)
        q, other = self._factors(state)
        # Apart and in this order: at a confident token q - 1 is a difference of nearly equal numbers.
        at_label = (q if plain is None else plain).gather(1, place).sub_(1.0).mul_(on_labels)
        columns = q.gather(1, place), None if other is None else other.gather(1, place)
        at_label += self._weighted_(*columns, on_divergence)
        gradient = self._weighted_(q, other, on_divergence, on_labels if plain is None else None)
        if plain is not None:
            gradient += plain.mul_(on_labels)
        return gradient.scatter_(1, place, torch.where(here[:, None], at_label, gradient.gather(1, place)))

    def _weighted_(self, q: Tensor, other: Tensor | None, weight: Tensor, more: Tensor | None = None) -> Tensor:
        """weight q (d - M) + more q, in place, from what ``_factors`` returns."""
        of_q = weight if more is None else weight + more
        if other is None:
            return q.mul_(of_q)
        if self.options.kind == "forward_kl":
            return q.mul_(of_q).sub_(other.mul_(weight))
        other *= weight
        return q.mul_(other if more is None else other.add_(more))

    def _plain_softmax(self, state: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept.plain
        return torch.sub(self.student, log_normalizers(state, self.options)[2][:, None], out=self._new()).exp_()

    def _factors(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """(q, p) for the forward KL, whose q (d - M) is q - p; (q, d - M) for others; (q, None) without a divergence.

        Takes over the logits, or what was kept.
        """
        options, kept = self.options, self.kept
        if options.kind in MIXTURES and kept is not None:
            return kept.q, kept.slope.sub_(state[SLOPE][:, None])
        if options.kind not in ("reverse_kl", *MIXTURES) and kept is not None:
            return kept.q, kept.p
        if options.kind in ("none", "softmax", "forward_kl"):
            log_q, log_p = self._log_probabilities_(state)
            return log_q.exp_(), None if log_p is None else log_p.exp_()
        masked = self.masked  # looked at before the logits go
        log_q, log_p = self._log_probabilities_(state)
        if options.kind == "reverse_kl":
            other = torch.sub(log_q, log_p, out=log_p).sub_(divergence_of_state(state, options)[:, None])
            q = log_q.exp_() if kept is None else kept.q
            return q, torch.where(q == 0, 0.0, other) if masked else other
        slope = self._slope_from_top_(Mixture(log_p, log_q, options, masked, self._new).slope(), state)
        return log_q.exp_(), slope.sub_(state[SLOPE][:, None])


def _finite(maximum: Tensor) -> Tensor:
    """A maximum to subtract: where every token is impossible, 0, so that the sums stay 0 instead of NaN."""
    return torch.where(maximum == -math.inf, 0.0, maximum)
