"""A frozen teacher's linear layers in 8 bits: up to twice the rate of bf16 products on a Hopper GPU, half the memory.

    y = s_x s_w (x / s_x)_e4m3 (W / s_w)_e4m3^T                                                                (1)

with a scale for each row of x (made when it comes) and of W (once), the largest magnitude over 448. Products add up in
fp32. This is no longer the teacher that was asked for: each layer's output is off by some percent, so it is an option
and never a default, and the lm_head, which the loss reads, stays as it is.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsd.errors import InputError

LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16  # what the hardware wants both sizes of W to be a multiple of


def scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(rows in e4m3, their scales [rows, 1] in fp32) of [rows, columns]."""
    scale = tensor.abs().amax(1, keepdim=True).float().clamp_(min=1e-12) / LARGEST
    return (tensor / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """Equation (1) for a layer that is only read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = scaled(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.T.contiguous())  # [1, out_features]
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows, scale = scaled(hidden.flatten(0, -2))
        out = torch._scaled_mm(rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        out = out.unflatten(0, hidden.shape[:-1])
        return out if self.bias is None else out + self.bias


def rows_have_products() -> bool:
    """Whether torch multiplies in 8 bits with a scale for each row on a CPU: 2.13 does, 2.11 does not."""
    rows, scale = scaled(torch.ones(MULTIPLE, MULTIPLE))
    try:
        torch._scaled_mm(rows, rows.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def to_fp8(model: PreTrainedModel) -> int:
    """Turn the linear layers of the body of a bf16 ``model`` into 8 bits, in place; returns how many.

    Raises:
        InputError: the GPU, or torch on a CPU, has no such products, or the model is not in bf16.
    """
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (9, 0):
        raise InputError(f"teacher: {torch.cuda.get_device_name(model.device)} has no fp8 products: use teacher online")
    if model.device.type == "cpu" and not rows_have_products():
        raise InputError(f"teacher: torch {torch.__version__} has no fp8 products on a CPU: update it, or use online")
    if model.dtype != torch.bfloat16:
        raise InputError("teacher: online_fp8 takes a teacher that is read in bf16: add --bf16 True, or use online")
    changed = 0
    for module in list(model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and not any(size % MULTIPLE for size in layer.weight.shape):
                setattr(module, name, Fp8Linear(layer))
                changed += 1
    return changed
