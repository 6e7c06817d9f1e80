"""Triton row kernels: the passes of ``row_state.py`` over rows of fp32, bf16 or fp16 logits, computed in fp32.

One program owns one row and walks it in tiles of BLOCK_V: ``_accumulate_kernel`` merges the row into its state in one
read of both models, ``_mixture_kernel`` adds a divergence's mixture terms in a second, ``_gradient_kernel`` writes
dloss/dlogits. The gradient may lie in the student's own buffer: as fp32 each element replaces its logit; as bf16 or
fp16 it fills the first half of the same row, tile i behind the tiles already read (bytes 2v <= 4v). Sums stay spread
over the lanes until a row ends, so their order is fixed and long rows lose no precision; nothing is atomic.

Traffic per logit and model: 4 bytes read per pass, 2 (half) or 4 written by the gradient. No scratch memory.

torch.compile takes the kernels' source over, and hands them Python floats as fp64: scalars are cast first thing (by
``tl.cast``, for its analysis of what is written runs on Python numbers), and no global is infinite, which it would
write down as the name ``inf``.
"""

import triton
import triton.language as tl

from trsd_kernels import row_state

# In kernels: KIND 1 to 5 have a teacher, 3 to 5 a mixture; "softmax" is one model alone (``options.SoftmaxOptions``).
KINDS = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3, "skew_kl": 4, "skew_reverse_kl": 5, "softmax": 6}

STUDENT_MAX = tl.constexpr(row_state.STUDENT_MAX)
STUDENT_SUM = tl.constexpr(row_state.STUDENT_SUM)
STUDENT_GAP = tl.constexpr(row_state.STUDENT_GAP)
STUDENT_MEAN = tl.constexpr(row_state.STUDENT_MEAN)
STUDENT_TOP = tl.constexpr(row_state.STUDENT_TOP)
TEACHER_MAX = tl.constexpr(row_state.TEACHER_MAX)
TEACHER_SUM = tl.constexpr(row_state.TEACHER_SUM)
TEACHER_GAP = tl.constexpr(row_state.TEACHER_GAP)
TEACHER_MEAN = tl.constexpr(row_state.TEACHER_MEAN)
TEACHER_TOP = tl.constexpr(row_state.TEACHER_TOP)
PLAIN_MAX = tl.constexpr(row_state.PLAIN_MAX)
PLAIN_SUM = tl.constexpr(row_state.PLAIN_SUM)
LABEL_LOGIT = tl.constexpr(row_state.LABEL_LOGIT)
VALUE = tl.constexpr(row_state.VALUE)
SLOPE = tl.constexpr(row_state.SLOPE)
TEACHER_AT_TOP = tl.constexpr(row_state.TEACHER_AT_TOP)

NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _tanh(x):
    """tanh to fp32 rounding of its absolute value; never overflows."""
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _load_logits(ptr, bias_ptr, offs, mask, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Transformed logits z; -inf outside the mask."""
    z = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    possible = mask & (z != -float("inf"))
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return tl.where(possible, z, -float("inf"))


@triton.jit
def _finite(maximum):
    """A maximum to subtract: 0 where every token so far is impossible."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _factor(old, new):
    """e^(old - new), 0 where ``old`` holds nothing."""
    return tl.where(old == -float("inf"), 0.0, tl.exp(old - _finite(new)))


@triton.jit
def _accumulate_kernel(
    student_ptr,  # [C, V'] logits
    teacher_ptr,  # [C, V'] logits
    student_bias_ptr,  # [V']
    teacher_bias_ptr,  # [V']
    labels_ptr,  # [C]
    state_ptr,  # [NUM_FIELDS, C]
    student_stride,
    teacher_stride,
    state_stride,
    vocab_size,
    vocab_start,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    KIND: tl.constexpr,
    WITH_CE: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    student_scale, student_softcap = tl.cast(student_scale, tl.float32), tl.cast(student_softcap, tl.float32)
    teacher_scale, teacher_softcap = tl.cast(teacher_scale, tl.float32), tl.cast(teacher_softcap, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    state_ptr += row
    HAS_TEACHER: tl.constexpr = KIND >= 1 and KIND <= 5
    MIXTURE: tl.constexpr = KIND >= 3 and KIND <= 5

    m_s = tl.load(state_ptr + STUDENT_MAX * state_stride)
    first_m_s = m_s
    top_s = tl.load(state_ptr + STUDENT_TOP * state_stride)
    s_s = tl.zeros([BLOCK_V], tl.float32)
    e_s = tl.zeros([BLOCK_V], tl.float32)
    b = tl.zeros([BLOCK_V], tl.float32)
    s_1 = tl.zeros([BLOCK_V], tl.float32)
    m_t = tl.load(state_ptr + TEACHER_MAX * state_stride)
    first_m_t = m_t
    top_t = tl.load(state_ptr + TEACHER_TOP * state_stride)
    s_t = tl.zeros([BLOCK_V], tl.float32)
    e_t = tl.zeros([BLOCK_V], tl.float32)
    a = tl.zeros([BLOCK_V], tl.float32)
    w_top = tl.load(state_ptr + TEACHER_AT_TOP * state_stride)

    for start in range(0, vocab_size, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        mask = offs < vocab_size
        z = _load_logits(
            student_ptr,
            student_bias_ptr,
            offs,
            mask,
            student_scale,
            student_softcap,
            HAS_STUDENT_BIAS,
            HAS_STUDENT_SOFTCAP,
        )
        u = z
        if AT_TEMPERATURE:
            u = z / temperature
        w = u
        if HAS_TEACHER:
            w = _load_logits(
                teacher_ptr,
                teacher_bias_ptr,
                offs,
                mask,
                teacher_scale,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            if AT_TEMPERATURE:
                w = w / temperature

        highest = tl.max(u, 0)
        new_m = tl.maximum(m_s, highest)
        factor = _factor(m_s, new_m)
        if highest > m_s:
            place = tl.min(tl.where(u == highest, offs, NO_TOKEN), 0)
            top_s = (place + vocab_start).to(tl.float32)
            if MIXTURE:
                w_top = tl.sum(tl.where(offs == place, w, 0.0), 0)
        weight = tl.exp(u - _finite(new_m))
        s_s = s_s * factor + weight
        e_s = e_s * factor + tl.where(weight == 0, 0.0, weight * u)
        if KIND == 2:
            b = b * factor + tl.where(weight == 0, 0.0, weight * (u - w))
        if WITH_CE and AT_TEMPERATURE:
            # The student's maximum times T serves z as well: a sum needs a near maximum, not the maximum.
            s_1 = s_1 * _factor(m_s * temperature, new_m * temperature) + tl.exp(z - _finite(new_m * temperature))
        m_s = new_m

        if HAS_TEACHER:
            highest = tl.max(w, 0)
            new_m = tl.maximum(m_t, highest)
            factor = _factor(m_t, new_m)
            if highest > m_t:
                top_t = (tl.min(tl.where(w == highest, offs, NO_TOKEN), 0) + vocab_start).to(tl.float32)
            weight = tl.exp(w - _finite(new_m))
            s_t = s_t * factor + weight
            e_t = e_t * factor + tl.where(weight == 0, 0.0, weight * w)
            if KIND == 1:
                a = a * factor + tl.where(weight == 0, 0.0, weight * (w - u))
            m_t = new_m

    factor = _factor(first_m_s, m_s)
    tl.store(state_ptr + STUDENT_MAX * state_stride, m_s)
    tl.store(state_ptr + STUDENT_TOP * state_stride, top_s)
    field = state_ptr + STUDENT_SUM * state_stride
    tl.store(field, tl.load(field) * factor + tl.sum(s_s, 0))
    field = state_ptr + STUDENT_MEAN * state_stride
    tl.store(field, tl.load(field) * factor + tl.sum(e_s, 0))
    if KIND == 2:
        field = state_ptr + STUDENT_GAP * state_stride
        tl.store(field, tl.load(field) * factor + tl.sum(b, 0))
    if HAS_TEACHER:
        factor = _factor(first_m_t, m_t)
        tl.store(state_ptr + TEACHER_MAX * state_stride, m_t)
        tl.store(state_ptr + TEACHER_TOP * state_stride, top_t)
        field = state_ptr + TEACHER_SUM * state_stride
        tl.store(field, tl.load(field) * factor + tl.sum(s_t, 0))
        field = state_ptr + TEACHER_MEAN * state_stride
        tl.store(field, tl.load(field) * factor + tl.sum(e_t, 0))
        if KIND == 1:
            field = state_ptr + TEACHER_GAP * state_stride
            tl.store(field, tl.load(field) * factor + tl.sum(a, 0))
    if MIXTURE:
        tl.store(state_ptr + TEACHER_AT_TOP * state_stride, w_top)
    if WITH_CE:
        if AT_TEMPERATURE:
            factor = _factor(first_m_s * temperature, m_s * temperature)
            tl.store(state_ptr + PLAIN_MAX * state_stride, m_s * temperature)
            field = state_ptr + PLAIN_SUM * state_stride
            tl.store(field, tl.load(field) * factor + tl.sum(s_1, 0))
        label = tl.load(labels_ptr + row) - vocab_start
        if (label >= 0) & (label < vocab_size):
            z = tl.load(student_ptr + label).to(tl.float32)
            if HAS_STUDENT_BIAS:
                z += tl.load(student_bias_ptr + label).to(tl.float32)
            impossible = z == -float("inf")
            z *= student_scale
            if HAS_STUDENT_SOFTCAP:
                z = student_softcap * _tanh(z / student_softcap)
            tl.store(state_ptr + LABEL_LOGIT * state_stride, tl.where(impossible, -float("inf"), z))


@triton.jit
def _log_normalizer(state_ptr, state_stride, MAX: tl.constexpr, SUM: tl.constexpr):
    return tl.load(state_ptr + MAX * state_stride) + tl.log(tl.load(state_ptr + SUM * state_stride))


@triton.jit
def _mixture_logs(log_p, log_q, share):
    """(x = ln p/q, t = e^-|x|, m / max(p, q)) for m = share p + (1 - share) q.

    Ratios, not differences of logarithms: where one model is certain, tokens of equal ratio get equal slopes exactly.
    """
    gap = log_p - log_q
    ratio = tl.exp(-tl.abs(gap))
    larger = tl.where(gap > 0, share + (1.0 - share) * ratio, (1.0 - share) + share * ratio)
    return gap, ratio, larger


@triton.jit
def _mixture_value(log_p, log_q, share, KIND: tl.constexpr):
    """Each token's term of D."""
    gap, _, larger = _mixture_logs(log_p, log_q, share)
    log_larger = tl.log(larger)
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    # "== 0", never "> 0": a NaN must pass through.
    from_p = tl.where(p == 0, 0.0, p * (tl.minimum(gap, 0.0) - log_larger))
    from_q = tl.where(q == 0, 0.0, q * (tl.minimum(-gap, 0.0) - log_larger))
    if KIND == 4:
        value = from_p
    elif KIND == 5:
        value = from_q
    else:
        value = share * from_p + (1.0 - share) * from_q
    return value


@triton.jit
def _mixture_slope(log_p, log_q, share, KIND: tl.constexpr):
    """d = dD/dq of each token; 0 where q is 0 exactly."""
    gap, ratio, larger = _mixture_logs(log_p, log_q, share)
    if KIND == 4:
        slope = (share - 1.0) * tl.where(gap > 0, 1.0, ratio) / larger
    elif KIND == 5:
        slope = tl.minimum(-gap, 0.0) - tl.log(larger) + 1.0
        slope -= (1.0 - share) * tl.where(gap > 0, ratio, 1.0) / larger
    else:
        slope = (1.0 - share) * (tl.minimum(-gap, 0.0) - tl.log(larger))
    return tl.where(log_q == -float("inf"), 0.0, slope)


@triton.jit
def _slope_from_top(log_p, log_q, offs, top, slope_at_top, share, KIND: tl.constexpr):
    """d minus its value at the student's top token; exactly 0 there, however the scalar was rounded."""
    return tl.where(offs == top, 0.0, _mixture_slope(log_p, log_q, share, KIND) - slope_at_top)


@triton.jit
def _mixture_kernel(
    student_ptr,  # [C, V'] logits
    teacher_ptr,  # [C, V'] logits
    student_bias_ptr,  # [V']
    teacher_bias_ptr,  # [V']
    state_ptr,  # [NUM_FIELDS, C]
    student_stride,
    teacher_stride,
    state_stride,
    vocab_size,
    vocab_start,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    share,
    KIND: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    student_scale, student_softcap = tl.cast(student_scale, tl.float32), tl.cast(student_softcap, tl.float32)
    teacher_scale, teacher_softcap = tl.cast(teacher_scale, tl.float32), tl.cast(teacher_softcap, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    share = tl.cast(share, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    state_ptr += row
    lse_s = _log_normalizer(state_ptr, state_stride, STUDENT_MAX, STUDENT_SUM)
    lse_t = _log_normalizer(state_ptr, state_stride, TEACHER_MAX, TEACHER_SUM)
    slope_at_top = _mixture_slope(
        tl.load(state_ptr + TEACHER_AT_TOP * state_stride) - lse_t,
        tl.load(state_ptr + STUDENT_MAX * state_stride) - lse_s,
        share,
        KIND,
    )
    top = tl.load(state_ptr + STUDENT_TOP * state_stride).to(tl.int32) - vocab_start
    value = tl.zeros([BLOCK_V], tl.float32)
    slope = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        mask = offs < vocab_size
        u = _load_logits(
            student_ptr,
            student_bias_ptr,
            offs,
            mask,
            student_scale,
            student_softcap,
            HAS_STUDENT_BIAS,
            HAS_STUDENT_SOFTCAP,
        )
        w = _load_logits(
            teacher_ptr,
            teacher_bias_ptr,
            offs,
            mask,
            teacher_scale,
            teacher_softcap,
            HAS_TEACHER_BIAS,
            HAS_TEACHER_SOFTCAP,
        )
        if AT_TEMPERATURE:
            u = u / temperature
            w = w / temperature
        log_q = u - lse_s
        log_p = w - lse_t
        value += _mixture_value(log_p, log_q, share, KIND)
        slope += tl.exp(log_q) * _slope_from_top(log_p, log_q, offs, top, slope_at_top, share, KIND)
    field = state_ptr + VALUE * state_stride
    tl.store(field, tl.load(field) + tl.sum(value, 0))
    field = state_ptr + SLOPE * state_stride
    tl.store(field, tl.load(field) + tl.sum(slope, 0))


@triton.jit
def _gradient_kernel(
    student_ptr,  # [C, V'] logits
    teacher_ptr,  # [C, V'] logits
    student_bias_ptr,  # [V']
    teacher_bias_ptr,  # [V']
    labels_ptr,  # [C]
    state_ptr,  # [NUM_FIELDS, C]
    weights_ptr,  # [2, C]: cross-entropy, divergence
    out_ptr,  # [C, V'], may lie in the student's buffer
    student_stride,
    teacher_stride,
    state_stride,
    weights_stride,
    out_stride,
    vocab_size,
    vocab_start,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    share,
    KIND: tl.constexpr,
    WITH_CE: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    student_scale, student_softcap = tl.cast(student_scale, tl.float32), tl.cast(student_softcap, tl.float32)
    teacher_scale, teacher_softcap = tl.cast(teacher_scale, tl.float32), tl.cast(teacher_softcap, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    share = tl.cast(share, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    HAS_TEACHER: tl.constexpr = KIND >= 1 and KIND <= 5
    MIXTURE: tl.constexpr = KIND >= 3 and KIND <= 5
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    out_ptr += row * out_stride
    state_ptr += row
    ce_weight = tl.load(weights_ptr + row)
    divergence_weight = tl.load(weights_ptr + weights_stride + row) / temperature
    inert = (ce_weight == 0) & (divergence_weight == 0)  # passes nothing on, whatever its logits are
    label = tl.load(labels_ptr + row) - vocab_start
    lse_s = _log_normalizer(state_ptr, state_stride, STUDENT_MAX, STUDENT_SUM)
    lse_1 = lse_s
    if WITH_CE and AT_TEMPERATURE:
        lse_1 = _log_normalizer(state_ptr, state_stride, PLAIN_MAX, PLAIN_SUM)
    lse_t = lse_s
    center = 0.0  # what is taken off every slope: its mean under q
    slope_at_top = 0.0
    top = tl.load(state_ptr + STUDENT_TOP * state_stride).to(tl.int32) - vocab_start
    if HAS_TEACHER:
        lse_t = _log_normalizer(state_ptr, state_stride, TEACHER_MAX, TEACHER_SUM)
    if KIND == 2:
        mean_gap = tl.load(state_ptr + STUDENT_GAP * state_stride) / tl.load(state_ptr + STUDENT_SUM * state_stride)
        center = mean_gap - lse_s + lse_t
    if MIXTURE:
        center = tl.load(state_ptr + SLOPE * state_stride)
        slope_at_top = _mixture_slope(
            tl.load(state_ptr + TEACHER_AT_TOP * state_stride) - lse_t,
            tl.load(state_ptr + STUDENT_MAX * state_stride) - lse_s,
            share,
            KIND,
        )

    for start in range(0, vocab_size, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        mask = offs < vocab_size
        z = _load_logits(
            student_ptr,
            student_bias_ptr,
            offs,
            mask,
            student_scale,
            student_softcap,
            HAS_STUDENT_BIAS,
            HAS_STUDENT_SOFTCAP,
        )
        u = z
        if AT_TEMPERATURE:
            u = z / temperature
        gradient = tl.zeros([BLOCK_V], tl.float32)
        if WITH_CE:
            gradient = ce_weight * (tl.exp(z - lse_1) - tl.where(offs == label, 1.0, 0.0))
        if KIND == 6:
            gradient += divergence_weight * tl.exp(u - lse_s)
        if HAS_TEACHER:
            w = _load_logits(
                teacher_ptr,
                teacher_bias_ptr,
                offs,
                mask,
                teacher_scale,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            if AT_TEMPERATURE:
                w = w / temperature
            log_q = u - lse_s
            log_p = w - lse_t
            q = tl.exp(log_q)
            if KIND == 1:
                gradient += divergence_weight * (q - tl.exp(log_p))
            if KIND == 2:
                gradient += divergence_weight * q * tl.where(q == 0, 0.0, log_q - log_p - center)
            if MIXTURE:
                slope = _slope_from_top(log_p, log_q, offs, top, slope_at_top, share, KIND)
                gradient += divergence_weight * q * (slope - center)
        if HAS_STUDENT_SOFTCAP:
            gradient *= tl.where(z == -float("inf"), 0.0, 1.0 - (z / student_softcap) * (z / student_softcap))
        gradient *= student_scale
        gradient = tl.where(inert, 0.0, gradient)
        # Every lane has read this tile before any lane writes over it (half-precision rows lie in the logits' bytes).
        tl.debug_barrier()
        tl.store(out_ptr + offs, gradient.to(out_ptr.dtype.element_ty), mask=mask)
