"""AdamW over two groups, and learning rates as pure functions of the step (so resuming needs no scheduler state)."""

import math

import torch
from torch import nn


def build_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not.

    On a GPU in one kernel: torch's default there makes temporaries of the weights' own size.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = bool(trained) and all(parameter.is_cuda for parameter in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=fused)


def learning_rate_factor(name: str, step: int, *, num_steps: int, warmup_ratio: float) -> float:
    """Learning rate of ``step`` (from 0) over its peak.

    ``constant`` and ``cosine`` warm up linearly over ``warmup_ratio`` of the steps; cosine then falls to 0.
    ``onecycle`` rises from 1/25 to 1 and falls to 1/250,000 along cosines (arXiv 1708.07120; torch's OneCycleLR with
    its momentum left alone).
    """
    if name == "onecycle":
        peak = float(warmup_ratio * num_steps) - 1
        if step <= peak and peak > 0:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / max(1e-9, num_steps - 1 - peak)))
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    return _cosine(1.0, 0.0, (step - warmup) / max(1, num_steps - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the learning rate ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = value
