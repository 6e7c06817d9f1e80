"""Shape, dtype, device and range checks shared by every op: a ValueError that says what to do, before any work."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_hidden_and_weight(hidden_states: Tensor, lm_head_weight: Tensor, *, who: str) -> None:
    """``hidden_states`` [num_tokens, hidden_size] and ``lm_head_weight`` [vocab_size, hidden_size] must multiply."""
    for name, tensor in ((f"{who}_hidden_states", hidden_states), (f"{who}_lm_head_weight", lm_head_weight)):
        if tensor.ndim != 2:
            hint = " (flatten batch and sequence first: x.flatten(0, -2))" if tensor.ndim > 2 else ""
            raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}{hint}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if hidden_states.shape[1] != lm_head_weight.shape[1]:
        raise ValueError(
            f"{who}_hidden_states have hidden size {hidden_states.shape[1]} but {who}_lm_head_weight expects "
            f"{lm_head_weight.shape[1]}: is the weight [vocab_size, hidden_size], and of the same model?"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors given must live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {listing}")


def check_labels(labels: Tensor, *, num_tokens: int, vocab_size: int, ignore_index: int) -> None:
    """``labels`` [num_tokens] int64, each in [0, vocab_size) or equal to ``ignore_index``."""
    if labels.shape != (num_tokens,):
        raise ValueError(f"labels: expected shape ({num_tokens},), one per hidden state, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype} (labels.long() if they are token ids)")
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels[{first}] = {int(labels[first])} is outside [0, {vocab_size}) and not ignore_index={ignore_index}: "
            "tokenizer and lm_head_weight of the same model?"
        )


def check_token_weights(token_weights: Tensor, *, num_tokens: int) -> None:
    """``token_weights`` [num_tokens], floating."""
    if token_weights.shape != (num_tokens,):
        raise ValueError(f"token_weights: expected shape ({num_tokens},), got {tuple(token_weights.shape)}")
    if token_weights.dtype not in FLOAT_DTYPES:
        raise ValueError(f"token_weights: expected a floating dtype, got {token_weights.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, *, total_tokens: int, device: torch.device) -> None:
    """``cu_seqlens`` int32 [num_seqs + 1], from 0 to ``total_tokens``, never decreasing, on ``device``."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape [num_seqs + 1] with num_seqs >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device} with the queries, got {cu_seqlens.device}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total_tokens:
        raise ValueError(
            f"cu_seqlens: expected to run from 0 to {total_tokens} tokens, got {bounds[0]} to {bounds[-1]}"
        )
    if any(end < start for start, end in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("cu_seqlens: expected non-decreasing offsets; is this the cumulative sum of the lengths?")
