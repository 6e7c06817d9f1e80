"""The row passes of ``row_state.py`` in plain torch: what runs on a CPU, in fp64, or where Triton is missing.

One ``TorchRows`` holds the logits of some rows over some part of the vocabulary, [C, V'], and answers three calls:
``accumulate`` and ``accumulate_mixture`` merge them into a state, ``gradient`` turns the student's logits into
dloss/dlogits in place. Memory beside the two inputs: some tensors of BLOCK_BYTES, or of one row where that is more.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

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

BLOCK_BYTES = 2**18  # with its temporaries a block stays in a core's second-level cache
BLOCK_TEMPORARIES, BLOCK_TEMPORARIES_OF_MIXTURES = 7, 13


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
    impossible = logits == -math.inf
    logits *= transform.scale
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits.masked_fill_(impossible, -math.inf)


def _expectation(weights: Tensor, values: Tensor, masked: bool) -> Tensor:
    """sum_v weights * values over the last dimension, where an impossible token (weight 0) counts nothing."""
    if masked:
        values = torch.where(weights == 0, 0.0, values)
    return torch.linalg.vecdot(weights, values)


class _Mixture:
    """Terms and slopes against m = share p + (1 - share) q, from the log-probabilities.

    Made of ratios, not differences of logarithms: where one model is certain, tokens of equal ratio get equal slopes
    exactly.
    """

    def __init__(self, log_p: Tensor, log_q: Tensor, options: DistillOptions) -> None:
        self.kind, self.share = options.kind, options.teacher_share
        self.log_p, self.log_q = log_p, log_q
        self.gap = log_p - log_q
        self.ratio = torch.exp(-self.gap.abs())
        # m / max(p, q)
        self.larger = torch.where(
            self.gap > 0, self.share + (1.0 - self.share) * self.ratio, (1.0 - self.share) + self.share * self.ratio
        )
        self.log_larger = self.larger.log()

    def value(self) -> Tensor:
        """D of each row."""
        # "== 0", never "> 0": a NaN must pass through.
        total = 0.0
        if self.kind != "skew_reverse_kl":
            p = self.log_p.exp()
            from_p = torch.where(p == 0, 0.0, p * (self.gap.clamp(max=0.0) - self.log_larger))  # p ln(p / m)
            total = from_p.sum(1) * (self.share if self.kind == "jsd" else 1.0)
        if self.kind != "skew_kl":
            q = self.log_q.exp()
            from_q = torch.where(q == 0, 0.0, q * (-self.gap.clamp(min=0.0) - self.log_larger))  # q ln(q / m)
            total += from_q.sum(1) * ((1.0 - self.share) if self.kind == "jsd" else 1.0)
        return total

    def slope(self) -> Tensor:
        """d = dD/dq of each token; 0 where q is 0 exactly."""
        if self.kind == "skew_kl":
            slope = (self.share - 1.0) * torch.where(self.gap > 0, 1.0, self.ratio) / self.larger
        else:
            slope = self.log_larger.add(self.gap.clamp(min=0.0)).neg_()  # ln(q / m)
            if self.kind == "jsd":
                slope *= 1.0 - self.share
            else:
                slope += 1.0 - (1.0 - self.share) * torch.where(self.gap > 0, self.ratio, 1.0) / self.larger
        return slope.masked_fill_(self.log_q == -math.inf, 0.0)


def divergence_slope(log_p: Tensor, log_q: Tensor, options: DistillOptions) -> Tensor:
    """q (d - d at the top of q), d = dD/dq, of rows of whole distributions; 0 where q is 0."""
    q = log_q.exp()
    if options.kind == "none":
        return torch.zeros_like(q)
    if options.kind == "forward_kl":
        return q - log_p.exp()  # any multiple of q may be added
    slope = log_q - log_p if options.kind == "reverse_kl" else _Mixture(log_p, log_q, options).slope()
    slope = slope - slope.gather(1, log_q.argmax(1, keepdim=True))
    return torch.where(q == 0, 0.0, q * slope)


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
        tensors = BLOCK_TEMPORARIES_OF_MIXTURES if options.kind in MIXTURES else BLOCK_TEMPORARIES
        return tensors * min(max(BLOCK_BYTES, row), num_rows * row)

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
        length = num_rows
        if masked is None:
            length = BLOCK_BYTES // (student_logits.element_size() * vocab_size)
        self.blocks = []
        for part in row_chunks(num_rows, max(1, length)):
            student = transform_(student_logits[part], student_bias, options.student_transform)
            teacher = None
            if teacher_logits is not None:
                teacher = transform_(teacher_logits[part], teacher_bias, options.teacher_transform)
            self.blocks.append((part, _RowBlock(options, student, teacher, labels[part], vocab_start, masked)))

    def accumulate(self, state: Tensor) -> None:
        """Merge these logits into ``state`` [NUM_FIELDS, C]: every field but the mixture's."""
        for part, block in self.blocks:
            block.accumulate(state[:, part])

    def accumulate_mixture(self, state: Tensor) -> None:
        """Add these logits' share of D and M to ``state``, whose normalisers are complete."""
        for part, block in self.blocks:
            block.accumulate_mixture(state[:, part])

    def gradient(self, state: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """dloss/dlogits [C, V'] in ``dtype``, before the bias, in the student's own bytes where the dtypes agree.

        Args:
            state: complete, [NUM_FIELDS, C].
            weights: [2, C]: what each row's cross-entropy and divergence count in the loss.
        """
        for part, block in self.blocks:
            gradient = block.gradient(state[:, part], weights[:, part])
            if gradient is not block.student:
                block.student.copy_(gradient)
        return self.student.to(dtype)


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
    ) -> None:
        self.options, self.student, self.teacher, self.vocab_start = options, student, teacher, vocab_start
        self.labels = labels - vocab_start
        # Impossible tokens (-inf) cost masked passes; rows without them do not pay for it.
        self.masked = masked
        if masked is None:
            self.masked = any(bool((x == -math.inf).any()) for x in (student, teacher) if x is not None)

    def _place(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """([C, 1] a valid column for each row's token, [C] whether the token lies in this part of the vocabulary)."""
        last = self.student.shape[1] - 1
        return tokens.clamp(0, last)[:, None], (tokens >= 0) & (tokens <= last)

    def _at_temperature(self, logits: Tensor) -> Tensor:
        temperature = self.options.softmax_temperature
        return logits if temperature == 1.0 else logits / temperature

    def accumulate(self, state: Tensor) -> None:
        scaled = self._at_temperature(self.student)
        teacher = None if self.teacher is None else self._at_temperature(self.teacher)
        self._merge(state, (STUDENT_MAX, STUDENT_SUM, STUDENT_GAP, STUDENT_MEAN, STUDENT_TOP), scaled, teacher)
        if teacher is not None:
            self._merge(state, (TEACHER_MAX, TEACHER_SUM, TEACHER_GAP, TEACHER_MEAN, TEACHER_TOP), teacher, scaled)
        if self.options.alpha == 1.0:
            return
        if scaled is not self.student:
            maximum = torch.maximum(state[PLAIN_MAX], self.student.amax(1))
            rescale(state, PLAIN_MAX, maximum)
            state[PLAIN_SUM] += torch.exp(self.student - _finite(maximum)[:, None]).sum(1)
        place, here = self._place(self.labels)
        state[LABEL_LOGIT] = torch.where(here, self.student.gather(1, place)[:, 0], state[LABEL_LOGIT])

    def _merge(self, state: Tensor, fields: tuple[int, ...], own: Tensor, other: Tensor | None) -> None:
        """Merge one model's maximum, sums and top token."""
        max_field, sum_field, gap_field, mean_field, top_field = fields
        highest, top = own.max(1)
        higher = highest > state[max_field]
        state[top_field] = torch.where(higher, (top + self.vocab_start).to(state.dtype), state[top_field])
        if top_field == STUDENT_TOP and self.options.kind in MIXTURES:
            state[TEACHER_AT_TOP] = torch.where(higher, other.gather(1, top[:, None])[:, 0], state[TEACHER_AT_TOP])
        maximum = torch.maximum(state[max_field], highest)
        rescale(state, max_field, maximum)
        weights = torch.exp(own - _finite(maximum)[:, None])
        state[sum_field] += weights.sum(1)
        state[mean_field] += _expectation(weights, own, self.masked)
        wanted = {"forward_kl": TEACHER_GAP, "reverse_kl": STUDENT_GAP}.get(self.options.kind)
        if gap_field == wanted:
            state[gap_field] += _expectation(weights, own - other, self.masked)

    def accumulate_mixture(self, state: Tensor) -> None:
        if self.options.kind not in MIXTURES:
            return
        log_p, log_q = self._log_probabilities(state)
        mixture = _Mixture(log_p, log_q, self.options)
        state[VALUE] += mixture.value()
        slope = mixture.slope()
        state[SLOPE] += torch.linalg.vecdot(log_q.exp(), self._slope_from_top_(slope, state))

    def _slope_from_top_(self, slope: Tensor, state: Tensor) -> Tensor:
        """The slope minus its value at the student's top token, in place; exactly 0 there, whatever was rounded."""
        student, teacher, _ = log_normalizers(state, self.options)
        log_p, log_q = state[TEACHER_AT_TOP] - teacher, state[STUDENT_MAX] - student
        slope -= _Mixture(log_p[:, None], log_q[:, None], self.options).slope()
        place, here = self._place(state[STUDENT_TOP].long() - self.vocab_start)
        return slope.scatter_(1, place, torch.where(here[:, None], 0.0, slope.gather(1, place)))

    def _log_probabilities(self, state: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher, _ = log_normalizers(state, self.options)
        log_q = self._at_temperature(self.student) - student[:, None]
        return self._at_temperature(self.teacher) - teacher[:, None], log_q

    def gradient(self, state: Tensor, weights: Tensor) -> Tensor:
        options, transform = self.options, self.options.student_transform
        slope_of_cap = None
        if transform.softcap is not None:
            slope_of_cap = 1.0 - (self.student / transform.softcap).square_()
            slope_of_cap.masked_fill_(self.student == -math.inf, 0.0)
        plain = None
        if options.alpha < 1.0:
            plain = torch.exp(self.student - log_normalizers(state, options)[2][:, None]).mul_(weights[0][:, None])
            place, here = self._place(self.labels)
            plain.scatter_add_(1, place, torch.where(here, -weights[0], 0.0)[:, None])
        gradient = plain if options.kind == "none" else self._divergence_gradient(state, weights[1])
        if plain is not None and gradient is not plain:
            gradient += plain
        if slope_of_cap is not None:
            gradient *= slope_of_cap
        if transform.scale != 1.0:
            gradient *= transform.scale
        # A row that weighs nothing passes nothing on, whatever its logits are.
        return gradient.masked_fill_((weights == 0).all(0)[:, None], 0.0)

    def _divergence_gradient(self, state: Tensor, weights: Tensor) -> Tensor:
        """weights / T * q (d - M)."""
        options = self.options
        weights = (weights / options.temperature)[:, None]
        student, teacher, _ = log_normalizers(state, options)
        if options.temperature != 1.0:
            self.student.div_(options.temperature)
            if self.teacher is not None:
                self.teacher.div_(options.temperature)
        if options.kind == "softmax":
            return self.student.sub_(student[:, None]).exp_().mul_(weights)
        log_q, log_p = self.student.sub_(student[:, None]), self.teacher.sub_(teacher[:, None])
        if options.kind == "forward_kl":
            return log_q.exp_().sub_(log_p.exp_()).mul_(weights)
        q = log_q.exp()
        if options.kind == "reverse_kl":
            slope = log_q.sub_(log_p).sub_(divergence_of_state(state, options)[:, None])
            if self.masked:
                slope = torch.where(q == 0, 0.0, slope)
        else:
            slope = _Mixture(log_p, log_q, options).slope()
            slope = self._slope_from_top_(slope, state).sub_(state[SLOPE][:, None])
        return q.mul_(slope).mul_(weights)


def _finite(maximum: Tensor) -> Tensor:
    """A maximum to subtract: where every token is impossible, 0, so that the sums stay 0 instead of NaN."""
    return torch.where(maximum == -math.inf, 0.0, maximum)
