"""What both plans share: the rows that take part, and products whose results are never rounded to half precision."""

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.checks import label_out_of_range
from trsd_kernels.options import DistillOptions
from trsd_kernels.torch_rows import TorchRows

HALF = (torch.float16, torch.bfloat16)
FP16_GRADIENT_PEAK = 2.0**10  # fp16 dloss/dlogits are scaled so that the heaviest row peaks about here


class Head(NamedTuple):
    """One model's side of the loss: rows of hidden states and the head they meet."""

    hidden_states: Tensor  # [num_tokens, hidden_size]
    weight: Tensor  # [vocab_size, hidden_size]
    bias: Tensor | None  # [vocab_size]

    def on_rows(self, rows: slice | Tensor) -> "Head":
        return self._replace(hidden_states=self.hidden_states[rows])

    def on_vocab(self, part: slice) -> "Head":
        return self._replace(weight=self.weight[part], bias=None if self.bias is None else self.bias[part])

    def cast_weight(self, dtype: torch.dtype) -> "Head":
        """Weight and bias as the products take them; no copy where they already are."""
        bias = None if self.bias is None else self.bias.detach().contiguous()
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)

    def cast_hidden_states(self, dtype: torch.dtype) -> "Head":
        """Hidden states as the products take them; no copy where they already are."""
        return self._replace(hidden_states=self.hidden_states.detach().to(dtype))

    def logits(self) -> Tensor:
        """hidden_states @ weight.T without the bias, [num_tokens, vocab_size], fp32 or fp64."""
        return product(self.hidden_states, self.weight.T)


def product_dtype(hidden_states: Tensor, weight: Tensor, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the operands of every product with ``weight``.

    Half precision only where the hardware returns fp32 from it (CUDA) and both operands have it, or autocast rounds
    them anyway; else fp32, or fp64 for fp64 inputs.
    """
    dtypes = {hidden_states.dtype, weight.dtype}
    if torch.float64 in dtypes:
        return torch.float64
    if not hidden_states.is_cuda:
        return torch.float32
    if autocast_dtype in HALF:
        return autocast_dtype
    return hidden_states.dtype if len(dtypes) == 1 else torch.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with an fp32 (fp64) result."""
    if left.dtype in HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


@functools.cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a half-precision product into an fp32 sum in one call; said once where it does not."""
    total, operand = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(total, operand, operand, torch.float32, out=total)
    except (RuntimeError, NotImplementedError, AttributeError):
        warnings.warn(
            f"trsd_kernels: torch {torch.__version__} cannot add a half-precision product into an fp32 sum, so a "
            "trained head takes the memory of one more fp32 gradient; a newer torch does not",
            stacklevel=2,
        )
        return False
    return bool((total == 17).all())


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in ``total``'s fp32 or fp64."""
    if left.dtype not in HALF:
        total.addmm_(left, right)
    elif _adds_into_fp32(total.device, left.dtype):
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total += product(left, right)


def supervised_rows(labels: Tensor, weights: Tensor, *, vocab_size: int, ignore_index: int) -> Tensor | None:
    """Indices of the rows that take part, [num_kept] int64, or None for all of them.

    Also the check of the labels' range: on a GPU both together cost the one wait for the device of a call.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    labelled = labels != ignore_index
    kept = labelled & (weights != 0)
    outside = labelled & ((labels < 0) | (labels >= vocab_size))
    num_kept, num_outside = torch.stack([kept.sum(), outside.sum()]).tolist()
    if num_outside:
        raise label_out_of_range(labels, outside, vocab_size=vocab_size, ignore_index=ignore_index)
    if num_kept == len(labels):
        return None
    return torch.argsort((~kept).to(torch.uint8), stable=True)[:num_kept]


def scatter_rows(values: Tensor, rows: Tensor | None, num_tokens: int) -> Tensor:
    """[..., num_kept] back to [..., num_tokens], 0 elsewhere."""
    if rows is None:
        return values
    full = values.new_zeros(*values.shape[:-1], num_tokens)
    full[..., rows] = values
    return full


class GradientScale(NamedTuple):
    """Row weights as the gradient kernel takes them, and the factor that undoes their scaling (None: unscaled)."""

    weights: Tensor  # [2, num_tokens]: what cross-entropy and divergence count
    undo: Tensor | None  # scalar

    @staticmethod
    def of(weights: Tensor, dtype: torch.dtype, options: DistillOptions) -> "GradientScale":
        """fp16 holds nothing below 6e-8, so its gradients are computed large and scaled back in fp32."""
        if dtype != torch.float16 or not weights.numel():
            return GradientScale(weights, None)
        largest = torch.maximum(weights[0].abs().max(), weights[1].abs().max() / options.softmax_temperature)
        peak = (largest * abs(options.student_logit_scale)).clamp_(min=torch.finfo(torch.float32).tiny)
        return GradientScale(weights * (FP16_GRADIENT_PEAK / peak), peak / FP16_GRADIENT_PEAK)


@functools.cache
def _triton_rows() -> type | None:
    """The Triton row passes, or None (said once) where Triton is not installed."""
    try:
        from trsd_kernels.triton_rows import TritonRows
    except ImportError:
        warnings.warn(
            "trsd_kernels: Triton is not installed, so the distillation loss runs in plain torch, several times slower "
            "on a GPU (pip install triton)",
            stacklevel=2,
        )
        return None
    return TritonRows


def triton_interpreted(device: torch.device) -> bool:
    """Triton kernels run on CPU tensors, in the interpreter."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def rows_class(device: torch.device, dtype: torch.dtype) -> type:
    """The row passes for states of ``dtype`` on ``device``: Triton on a GPU and in its interpreter, else torch."""
    if dtype == torch.float32 and (device.type == "cuda" or triton_interpreted(device)):
        return _triton_rows() or TorchRows
    return TorchRows


def row_weights(weights: Tensor, options: DistillOptions) -> Tensor:
    """[2, num_tokens]: what each row's cross-entropy and divergence count in the loss."""
    return torch.stack([(1.0 - options.alpha) * weights, options.divergence_scale * weights])
