"""Triton kernels of causal varlen and branch attention, forward and backward, fp32 sums throughout.

A query at position i of its sequence sees the keys at positions 0 to i of the same sequence: the first ``cut`` of them
lie in the trunk, the others in its own segment. So the forward and dQ walk **positions**, and only the address of a key
row asks where it lies; no tile of keys is partly empty at the cut. dK and dV walk the two runs of queries that see a
tile of keys (``attention_tiles``). Nothing is atomic: every output element has one program and one order of summation.

    s_ij = softmax_scale q_i . k_j  (soft-capped where asked),   p_ij = exp(s_ij - lse_i),   o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i),   delta_i = do_i . o_i
    dq_i = softmax_scale sum_j ds_ij k_j,   dk_j = softmax_scale sum_i ds_ij q_i
"""

import triton
import triton.language as tl

from trsd_kernels.distill_rows import _tanh

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
QUERY_FIELDS = tl.constexpr(5)
KEY_FIELDS = tl.constexpr(5)


@triton.jit
def _load_rows(ptr, rows, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK, BLOCK_D] of rows of HEAD_DIM; 0 outside."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if BLOCK_D == HEAD_DIM:
        if MASKED:
            return tl.load(ptrs, mask=inside[:, None], other=0.0)
        else:
            return tl.load(ptrs)
    elif MASKED:
        return tl.load(ptrs, mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, rows, stride, inside, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(scores times log2 e, derivative of the soft cap)."""
    if HAS_SOFTCAP:
        t = _tanh(products * (scale / softcap))
        return t * (softcap * LOG2E), 1.0 - t * t
    else:
        return products * (scale * LOG2E), 1.0


@triton.jit
def _key_rows(offs_j, prefix_start, prefix_length, own_start):
    """Where the keys at positions ``offs_j`` of a sequence lie in the row."""
    return offs_j + tl.where(offs_j < prefix_length, prefix_start, own_start - prefix_length)


@triton.jit
def _first_key(first_position, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first position a tile of queries looks at, down to a tile of keys."""
    if HAS_WINDOW:
        return tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        return 0


@triton.jit
def _visible(offs_i, offs_j, window, HAS_WINDOW: tl.constexpr):
    """Whether the query at each position sees the key at each position, of one sequence."""
    visible = offs_j <= offs_i
    if HAS_WINDOW:
        visible = visible & (offs_i - offs_j < window)
    return visible


@triton.jit
def _attend(
    acc,
    highest,
    total,
    q,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    low,
    high,
    end,
    offs_i,
    prefix_start,
    prefix_length,
    own_start,
    scale,
    softcap,
    window,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the keys at positions ``low`` to ``high`` into a tile's online softmax."""
    for start in range(low, high, BLOCK_N):
        offs_j = start + tl.arange(0, BLOCK_N)
        rows = _key_rows(offs_j, prefix_start, prefix_length, own_start)
        inside = offs_j < end
        k = _load_rows(key_ptr, rows, key_stride, inside, HEAD_DIM, BLOCK_D, MASKED)
        s, _ = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
        if MASKED:
            s = tl.where(_visible(offs_i[:, None], offs_j[None, :], window, HAS_WINDOW), s, -INF)
        new = tl.maximum(highest, tl.max(s, 1))
        base = new
        if MASKED:
            base = tl.where(new == -INF, 0.0, new)
        p = tl.exp2(s - base[:, None])
        factor = tl.exp2(highest - base)
        total = total * factor + tl.sum(p, 1)
        v = _load_rows(value_ptr, rows, value_stride, inside, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
        highest = new
    return acc, highest, total


@triton.jit
def _forward_kernel(
    query_ptr,  # [T, H, D]
    key_ptr,  # [T, H_kv, D]
    value_ptr,  # [T, H_kv, D]
    out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32, natural logarithm
    tiles_ptr,  # [num_tiles, 5] int32
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_stride,
    out_head_stride,
    num_tokens,
    num_heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile = tiles_ptr + (tl.program_id(0) // num_heads) * QUERY_FIELDS
    query_start, query_end = tl.load(tile), tl.load(tile + 1)
    prefix_start, prefix_length, own_start = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    query_ptr += head * query_head_stride
    out_ptr += head * out_head_stride
    key_ptr += head // GROUP * key_head_stride
    value_ptr += head // GROUP * value_head_stride

    rows = query_start + tl.arange(0, BLOCK_M)
    inside = rows < query_end
    first = prefix_length + query_start - own_start
    offs_i = first + tl.arange(0, BLOCK_M)
    end = prefix_length + query_end - own_start
    q = _load_rows(query_ptr, rows, query_stride, inside, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = _first_key(first, window, BLOCK_N, HAS_WINDOW)
    FIRST_PHASE: tl.constexpr = 1 if HAS_WINDOW else 0
    for phase in tl.static_range(FIRST_PHASE, 2):
        # First the keys that every query of the tile sees, then, masked, those up to the diagonal; windows mask all.
        high = end if phase else (first + 1) // BLOCK_N * BLOCK_N
        acc, highest, total = _attend(
            acc,
            highest,
            total,
            q,
            key_ptr,
            value_ptr,
            key_stride,
            value_stride,
            low,
            high,
            end,
            offs_i,
            prefix_start,
            prefix_length,
            own_start,
            scale,
            softcap,
            window,
            MASKED=phase == 1,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HAS_WINDOW=HAS_WINDOW,
            PRECISION=PRECISION,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )
        low = high
    _store_rows(out_ptr, rows, out_stride, inside, acc / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * num_tokens + rows, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit
def _add_query_gradient(
    dq,
    q,
    do,
    lse2,
    delta,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    low,
    high,
    end,
    offs_i,
    prefix_start,
    prefix_length,
    own_start,
    scale,
    softcap,
    window,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what the keys at positions ``low`` to ``high`` pass back to a tile of queries, without softmax_scale."""
    for start in range(low, high, BLOCK_N):
        offs_j = start + tl.arange(0, BLOCK_N)
        rows = _key_rows(offs_j, prefix_start, prefix_length, own_start)
        inside = offs_j < end
        k = _load_rows(key_ptr, rows, key_stride, inside, HEAD_DIM, BLOCK_D, MASKED)
        v = _load_rows(value_ptr, rows, value_stride, inside, HEAD_DIM, BLOCK_D, MASKED)
        s, slope = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
        p = tl.exp2(s - lse2[:, None])
        if MASKED:
            p = tl.where(_visible(offs_i[:, None], offs_j[None, :], window, HAS_WINDOW), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if HAS_SOFTCAP:
            ds *= slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_gradient_kernel(
    query_ptr,  # [T, H, D]
    key_ptr,  # [T, H_kv, D]
    value_ptr,  # [T, H_kv, D]
    out_ptr,  # [T, H, D]
    grad_out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32, written
    grad_query_ptr,  # [T, H, D], written
    tiles_ptr,  # [num_tiles, 5] int32
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_stride,
    out_head_stride,
    grad_out_stride,
    grad_out_head_stride,
    grad_query_stride,
    grad_query_head_stride,
    num_tokens,
    num_heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile = tiles_ptr + (tl.program_id(0) // num_heads) * QUERY_FIELDS
    query_start, query_end = tl.load(tile), tl.load(tile + 1)
    prefix_start, prefix_length, own_start = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    query_ptr += head * query_head_stride
    out_ptr += head * out_head_stride
    grad_out_ptr += head * grad_out_head_stride
    grad_query_ptr += head * grad_query_head_stride
    key_ptr += head // GROUP * key_head_stride
    value_ptr += head // GROUP * value_head_stride

    rows = query_start + tl.arange(0, BLOCK_M)
    inside = rows < query_end
    first = prefix_length + query_start - own_start
    offs_i = first + tl.arange(0, BLOCK_M)
    end = prefix_length + query_end - own_start
    do = _load_rows(grad_out_ptr, rows, grad_out_stride, inside, HEAD_DIM, BLOCK_D, True)
    out = _load_rows(out_ptr, rows, out_stride, inside, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_tokens + rows, delta, mask=inside)
    lse2 = tl.load(lse_ptr + head * num_tokens + rows, mask=inside, other=INF) * LOG2E
    q = _load_rows(query_ptr, rows, query_stride, inside, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = _first_key(first, window, BLOCK_N, HAS_WINDOW)
    FIRST_PHASE: tl.constexpr = 1 if HAS_WINDOW else 0
    for phase in tl.static_range(FIRST_PHASE, 2):  # as in the forward
        high = end if phase else (first + 1) // BLOCK_N * BLOCK_N
        dq = _add_query_gradient(
            dq,
            q,
            do,
            lse2,
            delta,
            key_ptr,
            value_ptr,
            key_stride,
            value_stride,
            low,
            high,
            end,
            offs_i,
            prefix_start,
            prefix_length,
            own_start,
            scale,
            softcap,
            window,
            MASKED=phase == 1,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HAS_WINDOW=HAS_WINDOW,
            PRECISION=PRECISION,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )
        low = high
    _store_rows(grad_query_ptr, rows, grad_query_stride, inside, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_kernel(
    query_ptr,  # [T, H, D]
    key_ptr,  # [T, H_kv, D]
    value_ptr,  # [T, H_kv, D]
    grad_out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32
    grad_key_ptr,  # [T, H_kv, D], written
    grad_value_ptr,  # [T, H_kv, D], written
    prefix_ends_ptr,  # [T] int32
    positions_ptr,  # [T] int32
    tiles_ptr,  # [num_tiles, 5] int32
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    grad_out_stride,
    grad_out_head_stride,
    grad_key_stride,
    grad_key_head_stride,
    grad_value_stride,
    grad_value_head_stride,
    num_tokens,
    num_kv_heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    tile = tiles_ptr + (tl.program_id(0) // num_kv_heads) * KEY_FIELDS
    key_start, key_end, own_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    branches_start, branches_end = tl.load(tile + 3), tl.load(tile + 4)
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    key_rows = key_start + tl.arange(0, BLOCK_N)
    inside = key_rows < key_end
    k = _load_rows(key_ptr, key_rows, key_stride, inside, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(value_ptr, key_rows, value_stride, inside, HEAD_DIM, BLOCK_D, True)
    key_positions = key_rows
    if HAS_WINDOW:
        key_positions = tl.load(positions_ptr + key_rows, mask=inside, other=0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    own_tiles = tl.cdiv(own_end - key_start, BLOCK_M)
    branch_tiles = tl.cdiv(branches_end - branches_start, BLOCK_M)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_query_ptr = query_ptr + head * query_head_stride
        head_grad_out_ptr = grad_out_ptr + head * grad_out_head_stride
        for number in range(0, own_tiles + branch_tiles):
            # A tile is of one run, so that its rows are consecutive.
            own = number < own_tiles
            first = tl.where(own, key_start + number * BLOCK_M, branches_start + (number - own_tiles) * BLOCK_M)
            rows = first + tl.arange(0, BLOCK_M)
            valid = rows < tl.where(own, own_end, branches_end)
            q = _load_rows(head_query_ptr, rows, query_stride, valid, HEAD_DIM, BLOCK_D, True)
            lse2 = tl.load(lse_ptr + head * num_tokens + rows, mask=valid, other=INF) * LOG2E
            s, slope = _scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
            p = tl.exp2(s - lse2[None, :])
            ends = rows + 1
            if not own:
                ends = tl.load(prefix_ends_ptr + rows, mask=valid, other=0)
            visible = key_rows[:, None] < ends[None, :]
            if HAS_WINDOW:
                positions = tl.load(positions_ptr + rows, mask=valid, other=0)
                visible = visible & (positions[None, :] - key_positions[:, None] < window)
            p = tl.where(visible, p, 0.0)
            do = _load_rows(head_grad_out_ptr, rows, grad_out_stride, valid, HEAD_DIM, BLOCK_D, True)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            delta = tl.load(delta_ptr + head * num_tokens + rows, mask=valid, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            if HAS_SOFTCAP:
                ds *= slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    grad_key_ptr += kv_head * grad_key_head_stride
    grad_value_ptr += kv_head * grad_value_head_stride
    _store_rows(grad_key_ptr, key_rows, grad_key_stride, inside, dk * scale, HEAD_DIM, BLOCK_D)
    _store_rows(grad_value_ptr, key_rows, grad_value_stride, inside, dv, HEAD_DIM, BLOCK_D)
