"""Plan ``vocab`` with the rows of both heads spread over a process group.

Every rank holds the same hidden states and labels and its own slice of the vocabulary of both heads. Each sweeps its
slice (``vocab_plan.py``); then the states are completed by one MAX and one SUM all-reduce of 3 and 9 values a token (a
divergence from a mixture adds one SUM of 2), never logits. In backward dh is summed over the group; dw and db stay
where their rows are. The result is the single-rank one to rounding, on every rank.

The MAX carries a maximum and where it sits in one int64: the number's bits, put in order, above the token id.
"""

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trsd_kernels.checks import check_chunks, check_distillation_inputs
from trsd_kernels.linear_distill import autocast_dtype
from trsd_kernels.linear_ops import chunk_length, operand_dtypes, refuse_second_derivative
from trsd_kernels.options import MIXTURES, DistillOptions
from trsd_kernels.products import Head, accumulator_dtype, scatter_rows, supervised_rows
from trsd_kernels.reduction import LinearDistillationOutput, check_reduction, reduced_output, weights_and_items
from trsd_kernels.row_state import (
    LABEL_LOGIT,
    MAXIMA,
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
    TokenTerms,
    finish,
    rescale,
)
from trsd_kernels.token_plan import Needs
from trsd_kernels.vocab_plan import VocabSweep

_SUMMED = (
    STUDENT_SUM,
    STUDENT_GAP,
    STUDENT_MEAN,
    TEACHER_SUM,
    TEACHER_GAP,
    TEACHER_MEAN,
    PLAIN_SUM,
    LABEL_LOGIT,
    TEACHER_AT_TOP,
)
_TOPS = {STUDENT_MAX: STUDENT_TOP, TEACHER_MAX: TEACHER_TOP}
_LOW_BITS = 2**31 - 1


def _packed(maximum: Tensor, top: Tensor) -> Tensor:
    """int64 keys whose order is that of fp32 maxima, equal ones by the lower token id."""
    bits = maximum.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _LOW_BITS, bits).long()
    return ordered * 2**32 + (_LOW_BITS - top.long())


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(fp32 maxima, token ids) of ``_packed`` keys."""
    ordered = (keys >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ _LOW_BITS, ordered)
    return bits.view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)


def _reduce_maxima(maxima: Tensor, tops: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Maxima [3, N] over the group and the token ids [3, N] where they sit."""
    if maxima.dtype == torch.float32:
        keys = _packed(maxima, tops)
        dist.all_reduce(keys, dist.ReduceOp.MAX, group=group)
        return _unpacked(keys)
    reduced = maxima.clone()
    dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group)
    # fp64 leaves no room for the id: a second, smaller exchange.
    ids = torch.where(maxima == reduced, tops, float(_LOW_BITS))
    dist.all_reduce(ids, dist.ReduceOp.MIN, group=group)
    return reduced, ids.long()


def merge_states(state: Tensor, group: dist.ProcessGroup | None) -> None:
    """Complete the states [NUM_FIELDS, N] of the ranks' slices, in place and alike on every rank."""
    tops = torch.stack([state[STUDENT_TOP], state[TEACHER_TOP], torch.zeros_like(state[0])])
    maxima, ids = _reduce_maxima(torch.stack([state[field] for field in MAXIMA]), tops, group)
    # The teacher's logit at the student's top token comes from the rank that holds that token.
    mine = (state[STUDENT_TOP].long() == ids[0]) & (state[STUDENT_MAX] == maxima[0])
    state[TEACHER_AT_TOP] = torch.where(mine, state[TEACHER_AT_TOP], 0.0)
    for place, field in enumerate(MAXIMA):
        rescale(state, field, maxima[place])
        if field != PLAIN_MAX:
            state[_TOPS[field]] = ids[place].to(state.dtype)
    _all_reduce_fields(state, _SUMMED, group)


def _all_reduce_fields(state: Tensor, fields: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
    sums = torch.stack([state[field] for field in fields])
    dist.all_reduce(sums, group=group)
    for place, field in enumerate(fields):
        state[field] = sums[place]


class _Shard(NamedTuple):
    """What a call fixes beside its tensors."""

    options: DistillOptions
    chunk_size: int | None
    chunk_bytes: int | None
    vocab_start: int
    group: dist.ProcessGroup | None
    autocast_dtype: torch.dtype | None


class VocabParallelFunction(torch.autograd.Function):
    """Differentiable per-token cross-entropy and divergence over sharded heads; the other terms and nothing else."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, labels, rows, shard = arguments
        sweep = _sweep(tensors, labels, rows, shard)
        state = sweep.state(merge=lambda state: merge_states(state, shard.group))
        if shard.options.kind in MIXTURES:
            sweep.add_mixture(state)
            _all_reduce_fields(state, (VALUE, SLOPE), shard.group)
        terms = scatter_rows(torch.stack(finish(state, shard.options)), rows, len(labels))
        ctx.save_for_backward(state, *tensors, labels, rows)
        ctx.shard = shard
        cross_entropy, divergence, others = terms[0].clone(), terms[1].clone(), terms[2:].clone()
        ctx.mark_non_differentiable(others)
        return cross_entropy, divergence, others

    @staticmethod
    def backward(ctx, grad_cross_entropy, grad_divergence, _):
        refuse_second_derivative()
        state, *tensors, labels, rows = ctx.saved_tensors
        grads = torch.stack([grad_cross_entropy, grad_divergence]).to(state.dtype)
        if rows is not None:
            grads = grads[:, rows]
        needs = Needs(*ctx.needs_input_grad[:3])
        # Autograd runs this under whatever autocast is on where backward() is called.
        with torch.autocast(labels.device.type, enabled=False):
            sweep = _sweep(tensors, labels, rows, ctx.shard)
            dh, dw, db = sweep.gradients(state, grads.contiguous(), needs)
        if needs.hidden_states:
            dist.all_reduce(dh, group=ctx.shard.group)
            full = torch.zeros_like(tensors[0])
            full[slice(None) if rows is None else rows] = dh.to(full.dtype)
            dh = full
        weight, bias = tensors[1:3]
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None else db.to(bias.dtype)
        return dh, dw, db, *[None] * 6


def _sweep(tensors: list[Tensor | None], labels: Tensor, rows: Tensor | None, shard: _Shard) -> VocabSweep:
    """This rank's sweep over the supervised rows, from both models' hidden states, weights and biases."""
    student, teacher = Head(*tensors[:3]), None if tensors[3] is None else Head(*tensors[3:])
    dtypes = operand_dtypes(
        *(student.hidden_states, student.weight, teacher and teacher.hidden_states, teacher and teacher.weight),
        shard.autocast_dtype,
    )
    if rows is not None:
        student, teacher, labels = student.on_rows(rows), teacher and teacher.on_rows(rows), labels[rows]
    dtype = accumulator_dtype(dtypes["student_dtype"])
    chunk = shard.chunk_size or chunk_length(len(labels), dtype, labels.device, shard.chunk_bytes)
    return VocabSweep(student, teacher, labels, shard.options, chunk=chunk, vocab_start=shard.vocab_start, **dtypes)


def _checksum(tensor: Tensor) -> int:
    """A number that differs where the tensors of two ranks do."""
    bits = tensor.detach().to(torch.float64).contiguous().view(torch.int64)
    return int((bits * torch.arange(1, bits.numel() + 1, device=bits.device).view_as(bits)).sum())


def _agree(
    problem: Exception | None, shared: list[int], vocab_size: int, device: torch.device, group: dist.ProcessGroup | None
) -> tuple[int, int]:
    """(this rank's first token id, the whole vocabulary's size), once every rank's inputs are known to fit together.

    A rank that refused its inputs would leave the others waiting; so every rank learns of it and raises.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([problem is not None, vocab_size, *shared], device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine, group=group)
    refused, sizes, *facts = torch.stack(everyone).T.tolist()
    if problem:
        raise problem
    if any(refused):
        raise ValueError(f"rank {refused.index(1)} of the group refused its inputs: its own error says why")
    names = ("number of tokens", "labels", "token_weights or num_items_in_batch", "options or reduction")
    for name, values in zip(names, facts, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"expected the same {name} on every rank of the group: a head is sharded over ranks that share their "
                "batch"
            )
    return sum(sizes[:rank]), sum(sizes)


def vocab_parallel_distillation(
    student_hidden_states: Tensor,  # [num_tokens, student_hidden_size], the same on every rank
    student_lm_head_weight: Tensor,  # [local_vocab_size, student_hidden_size]
    teacher_hidden_states: Tensor | None,  # [num_tokens, teacher_hidden_size], the same on every rank
    teacher_lm_head_weight: Tensor | None,  # [local_vocab_size, teacher_hidden_size]
    labels: Tensor,  # [num_tokens], ids over the whole vocabulary, the same on every rank
    *,
    group: dist.ProcessGroup | None = None,
    student_lm_head_bias: Tensor | None = None,  # [local_vocab_size]
    teacher_lm_head_bias: Tensor | None = None,  # [local_vocab_size]
    token_weights: Tensor | None = None,  # [num_tokens]
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LinearDistillationOutput:
    """``fused_linear_distillation`` over heads whose rows are sharded over ``group``, in the order of its ranks.

    Every rank of the group calls it with the same tokens; shards may differ in size. The loss is the same on every
    rank, and so is its gradient for the hidden states, which is complete: do not sum it again.

    Args:
        group: the process group; None: all ranks.
        chunk_size: vocabulary entries of the shard at a time.
        others: as in ``fused_linear_distillation``.

    Returns:
        As ``fused_linear_distillation``.

    Raises:
        ValueError: on every rank, when the inputs of one do not fit or the ranks hold different tokens.
    """
    problem, shared = None, [0] * 4
    try:
        settings = DistillOptions(**options)
        check_reduction(reduction, num_items_in_batch)
        check_chunks(chunk_size, chunk_bytes)
        check_distillation_inputs(
            student_hidden_states,
            student_lm_head_weight,
            teacher_hidden_states,
            teacher_lm_head_weight,
            labels,
            student_lm_head_bias=student_lm_head_bias,
            teacher_lm_head_bias=teacher_lm_head_bias,
            token_weights=token_weights,
            options=settings,
        )
        weights, num_items = weights_and_items(
            labels,
            token_weights,
            num_items_in_batch,
            reduction,
            ignore_index=settings.ignore_index,
            dtype=accumulator_dtype(torch.promote_types(student_hidden_states.dtype, student_lm_head_weight.dtype)),
        )
        text = f"{settings.encode()};{reduction}"
        shared = [len(labels), _checksum(labels), _checksum(weights), zlib.crc32(text.encode())]
    except (ValueError, TypeError) as error:
        problem = error
    vocab_start, vocab_size = _agree(problem, shared, student_lm_head_weight.shape[0], labels.device, group)
    rows = supervised_rows(labels, weights, vocab_size=vocab_size, ignore_index=settings.ignore_index)
    teacher = (None, None, None)
    if settings.alpha > 0.0:
        teacher = (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    autocast = autocast_dtype(labels.device)
    with torch.autocast(labels.device.type, enabled=False):
        cross_entropy, divergence, others = VocabParallelFunction.apply(
            student_hidden_states,
            student_lm_head_weight,
            student_lm_head_bias,
            *(None if tensor is None else tensor.detach() for tensor in teacher),
            labels,
            rows,
            _Shard(settings, chunk_size, chunk_bytes, vocab_start, group, autocast),
        )
    terms = TokenTerms(cross_entropy, divergence, *others.unbind())
    return reduced_output(terms, weights, num_items, settings, reduction)
