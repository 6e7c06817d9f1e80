"""What must hold before an optimizer step: a finite loss and gradient norm, checked before anything is scaled."""

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; no parameter was changed."""


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, *, step: int, loss: float) -> float:
    """Scale the gradients down to ``max_norm``, return the norm they had; raises, touching nothing, if not finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = norm.item()
    if not torch.isfinite(norm) or loss != loss or loss in (float("inf"), float("-inf")):
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {value}; no parameter was changed. Look at the "
            "data of this step, or start a new output_dir with a lower learning_rate (the traces can be used again: "
            "--data OUTPUT_DIR/traces/train.jsonl)"
        )
    if value > max_norm:
        torch._foreach_mul_(gradients, max_norm / (value + 1e-6))
    return value
