"""Shape, dtype, device and range checks shared by every op: a ValueError that says what to do, before any work."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from trsd_kernels.options import DistillOptions
from trsd_kernels.row_state import MAX_VOCAB_SIZE

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**values: object) -> None:
    """Every value given is a tensor, or None."""
    for name, value in values.items():
        if value is None or isinstance(value, Tensor):
            continue
        hint = "pass its .weight" if isinstance(getattr(value, "weight", None), Tensor) else "torch.as_tensor makes one"
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__} ({hint})")


def check_hidden_and_weight(hidden_states: Tensor, lm_head_weight: Tensor, *, who: str) -> None:
    """``hidden_states`` [num_tokens, hidden_size] and ``lm_head_weight`` [vocab_size, hidden_size] must multiply."""
    for name, tensor in ((f"{who}_hidden_states", hidden_states), (f"{who}_lm_head_weight", lm_head_weight)):
        check_tensors(**{name: tensor})
        if tensor.ndim != 2:
            hint = " (flatten batch and sequence first: x.flatten(0, -2))" if tensor.ndim > 2 else ""
            raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}{hint}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, sharded over ranks: compute the loss inside the forward of the module that owns "
                "the weight (FSDP gathers it there), or pass weight.full_tensor()"
            )
    if hidden_states.shape[1] != lm_head_weight.shape[1]:
        raise ValueError(
            f"{who}_hidden_states have hidden size {hidden_states.shape[1]} but {who}_lm_head_weight expects "
            f"{lm_head_weight.shape[1]}: is the weight [vocab_size, hidden_size], and of the same model?"
        )


def check_logits(student_logits: Tensor, teacher_logits: Tensor | None) -> None:
    """Two floating [num_tokens, vocab_size] tensors of one shape; the teacher's may be absent."""
    check_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is None:
            continue
        if logits.ndim != 2:
            raise ValueError(f"{name}: expected [num_tokens, vocab_size], got {tuple(logits.shape)} (x.flatten(0, -2))")
        if logits.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {logits.dtype}")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "expected two [num_tokens, vocab_size] tensors of one shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}: same vocabulary?"
        )
    check_vocab_size(student_logits.shape[1], "student_logits")


def check_vocab_size(vocab_size: int, name: str) -> None:
    """Token ids must be exact as fp32 numbers."""
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"{name}: expected a vocabulary of 1 to {MAX_VOCAB_SIZE:,} tokens, got {vocab_size:,}")


def check_chunks(chunk_size: int | None, chunk_bytes: int | None) -> None:
    """Chunks of something."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a positive number of bytes, got {chunk_bytes}")


def check_bias(bias: Tensor | None, *, vocab_size: int, who: str) -> None:
    """``bias`` [vocab_size], floating, or None."""
    if bias is None:
        return
    if bias.shape != (vocab_size,):
        raise ValueError(f"{who}_lm_head_bias: expected shape ({vocab_size},), got {tuple(bias.shape)}")
    if bias.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{who}_lm_head_bias: expected a floating dtype, got {bias.dtype}")


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors given must be tensors, on one device."""
    check_tensors(**tensors)
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {listing}")


def check_labels(labels: Tensor, *, num_tokens: int) -> None:
    """``labels`` [num_tokens] int64; what is in them: ``check_label_range``."""
    if labels.shape != (num_tokens,):
        raise ValueError(f"labels: expected shape ({num_tokens},), one per hidden state, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype} (labels.long() if they are token ids)")


def label_out_of_range(labels: Tensor, outside: Tensor, *, vocab_size: int, ignore_index: int) -> ValueError:
    """The error for the first label marked in ``outside``."""
    first = int(outside.nonzero()[0, 0])
    return ValueError(
        f"labels[{first}] = {int(labels[first])} is outside [0, {vocab_size}) and not ignore_index={ignore_index}: "
        "tokenizer and lm_head_weight of the same model?"
    )


def check_label_range(labels: Tensor, *, vocab_size: int, ignore_index: int) -> None:
    """Every label in [0, vocab_size) or equal to ``ignore_index``; on a GPU this waits for the device."""
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if outside.any():
        raise label_out_of_range(labels, outside, vocab_size=vocab_size, ignore_index=ignore_index)


def check_token_weights(token_weights: Tensor, *, num_tokens: int) -> None:
    """``token_weights`` [num_tokens], floating."""
    if token_weights.shape != (num_tokens,):
        raise ValueError(f"token_weights: expected shape ({num_tokens},), got {tuple(token_weights.shape)}")
    if token_weights.dtype not in FLOAT_DTYPES:
        raise ValueError(f"token_weights: expected a floating dtype, got {token_weights.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, *, total_tokens: int | None = None) -> list[int]:
    """``cu_seqlens`` int32 [num_seqs + 1], from 0 to ``total_tokens``, never decreasing; returns it as a list."""
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape [num_seqs + 1] with num_seqs >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    bounds = cu_seqlens.tolist()
    total_tokens = bounds[-1] if total_tokens is None else total_tokens
    if bounds[0] != 0 or bounds[-1] != total_tokens:
        raise ValueError(
            f"cu_seqlens: expected to run from 0 to {total_tokens} tokens, got {bounds[0]} to {bounds[-1]}"
        )
    if any(end < start for start, end in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("cu_seqlens: expected non-decreasing offsets; is this the cumulative sum of the lengths?")
    return bounds


def check_cuts(lengths: Sequence[int], branches: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Trunks of ``lengths`` and their branches (cut, length): no length negative, every cut inside its trunk."""
    for trunk, (length, parts) in enumerate(zip(lengths, branches, strict=True)):
        for number in (length, *(number for part in parts for number in part)):
            try:
                operator.index(number)
            except TypeError:
                raise TypeError(f"trunk {trunk}: expected whole numbers of tokens, got {number!r} (int() it)") from None
        if length < 0:
            raise ValueError(f"trunk {trunk}: expected a length of 0 or more, got {length}")
        for number, (cut, size) in enumerate(parts):
            if not 0 <= cut <= length:
                raise ValueError(
                    f"trunk {trunk}, branch {number}: its cut at {cut} is outside the trunk's {length} tokens"
                )
            if size < 0:
                raise ValueError(f"trunk {trunk}, branch {number}: expected a length of 0 or more, got {size}")


def check_attention(query: Tensor, key: Tensor, value: Tensor, *, num_tokens: int, device: torch.device) -> None:
    """``query`` [num_tokens, num_heads, head_dim]; ``key``, ``value`` [num_tokens, num_kv_heads, head_dim]."""
    if query.ndim != 3 or key.shape != value.shape or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "expected query [total_tokens, num_heads, head_dim] and key, value [total_tokens, num_kv_heads, head_dim], "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != num_tokens:
        raise ValueError(f"query: expected the {num_tokens} tokens of the layout, got {query.shape[0]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"expected num_kv_heads to divide num_heads, got {key.shape[1]} and {query.shape[1]}")
    if query.dtype not in FLOAT_DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(f"expected one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    check_same_device(query=query, key=key, value=value)
    if query.device != device:
        raise ValueError(
            f"expected cu_seqlens or layout on {query.device} with the queries, got {device} (layout.to(device))"
        )


def check_distillation_inputs(
    student_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden_states: Tensor | None,
    teacher_lm_head_weight: Tensor | None,
    labels: Tensor,
    *,
    student_lm_head_bias: Tensor | None,
    teacher_lm_head_bias: Tensor | None,
    token_weights: Tensor | None,
    options: DistillOptions,
) -> None:
    """Raise for anything that could only give a wrong number later; looks at no data."""
    check_hidden_and_weight(student_hidden_states, student_lm_head_weight, who="student")
    num_tokens, vocab_size = student_hidden_states.shape[0], student_lm_head_weight.shape[0]
    check_vocab_size(vocab_size, "student_lm_head_weight")
    if (teacher_hidden_states is None) != (teacher_lm_head_weight is None):
        raise ValueError("expected teacher_hidden_states and teacher_lm_head_weight together, or neither with alpha=0")
    if teacher_hidden_states is None and teacher_lm_head_bias is not None:
        raise ValueError("teacher_lm_head_bias is given without teacher_hidden_states and teacher_lm_head_weight")
    if teacher_hidden_states is None and options.alpha > 0.0:
        raise ValueError(f"alpha={options.alpha} gives the divergence a share: teacher tensors are needed (or alpha=0)")
    if teacher_hidden_states is not None:
        check_hidden_and_weight(teacher_hidden_states, teacher_lm_head_weight, who="teacher")
        if teacher_hidden_states.shape[0] != num_tokens:
            raise ValueError(
                f"teacher_hidden_states hold {teacher_hidden_states.shape[0]} tokens, student_hidden_states "
                f"{num_tokens}: expected one teacher row per student row, aligned by answer position"
            )
        if teacher_lm_head_weight.shape[0] != vocab_size:
            raise ValueError(
                f"teacher vocabulary {teacher_lm_head_weight.shape[0]} differs from the student's {vocab_size}: check "
                "that the tokenizers agree, then pass the shared rows of both weights (weight[:shared])"
            )
    check_bias(student_lm_head_bias, vocab_size=vocab_size, who="student")
    check_bias(teacher_lm_head_bias, vocab_size=vocab_size, who="teacher")
    check_same_device(
        student_hidden_states=student_hidden_states,
        student_lm_head_weight=student_lm_head_weight,
        student_lm_head_bias=student_lm_head_bias,
        teacher_hidden_states=teacher_hidden_states,
        teacher_lm_head_weight=teacher_lm_head_weight,
        teacher_lm_head_bias=teacher_lm_head_bias,
        labels=labels,
        token_weights=token_weights,
    )
    check_labels(labels, num_tokens=num_tokens)
    if token_weights is not None:
        check_token_weights(token_weights, num_tokens=num_tokens)
