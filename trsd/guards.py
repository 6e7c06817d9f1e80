"""What must hold before an optimizer step: a finite loss and gradient norm, checked before anything is scaled.

Loss and norm are sums over all ranks by then, so that every rank decides alike. A *spike* is a finite step whose loss
or gradient norm is more than ``SPIKE`` times the median of the last ``WINDOW`` steps.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SPIKE, WINDOW, LEAST_STEPS = 10.0, 64, 16


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; no parameter was changed."""


class Verdict(NamedTuple):
    """Of one step."""

    norm: float
    """Of the gradients, before they are scaled."""
    is_spike: bool
    is_skipped: bool
    """Whether the optimizer must not step."""


class StepGuard:
    """Decides before every optimizer step whether its gradients may be used, and scales them to ``max_norm``."""

    def __init__(self, max_norm: float, *, max_skipped_steps: int = 0) -> None:
        """Take the options of a run.

        Args:
            max_norm: gradients are scaled down to it.
            max_skipped_steps: so many steps in a row may be left out for a spike or what is not finite; 0 lets spikes
                pass, counted, and stops at what is not finite.
        """
        self.max_norm, self.max_skipped_steps = max_norm, max_skipped_steps
        self.num_spikes = self.num_skipped = 0
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def admit(self, parameters: Iterable[Tensor], *, step: int, loss: float) -> Verdict:
        """Judge the gradients of ``parameters``; raises, touching nothing, where training must stop.

        Raises:
            NonFiniteError: loss or norm is not finite, or too many steps in a row were left out.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = total_norm(gradients)
        finite = math.isfinite(norm) and math.isfinite(loss)
        is_spike = finite and (_stands_out(loss, self._losses) or _stands_out(norm, self._norms))
        self.num_spikes += is_spike
        if not finite or (is_spike and self.max_skipped_steps):
            self._skip(step, loss, norm, finite=finite)
            return Verdict(norm, is_spike, True)
        self._in_a_row = 0
        self._losses.append(loss)
        self._norms.append(norm)
        if norm > self.max_norm:
            torch._foreach_mul_(gradients, self.max_norm / (norm + 1e-6))
        return Verdict(norm, is_spike, False)

    def _skip(self, step: int, loss: float, norm: float, *, finite: bool) -> None:
        self._in_a_row += 1
        self.num_skipped += 1
        if self._in_a_row <= self.max_skipped_steps:
            return
        again = f" after {self.max_skipped_steps} steps that were left out" if self.max_skipped_steps else ""
        what = "a spike" if finite else "not finite"
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}: {what}{again}; no parameter was changed. Look at the "
            "data of this step, or start a new output_dir with a lower learning_rate (the traces can be used again: "
            "--data OUTPUT_DIR/traces/train.jsonl)" + ("" if again else "; max_skipped_steps leaves such steps out")
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run must know to decide alike, for JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "num_spikes": self.num_spikes,
            "num_skipped": self.num_skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``."""
        self._losses = deque(map(float, state["losses"]), maxlen=WINDOW)
        self._norms = deque(map(float, state["norms"]), maxlen=WINDOW)
        self._in_a_row = int(state["in_a_row"])
        self.num_spikes, self.num_skipped = int(state["num_spikes"]), int(state["num_skipped"])


def total_norm(gradients: list[Tensor]) -> float:
    """Of all gradients together, over the ranks where they are sharded."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _stands_out(value: float, before: deque[float]) -> bool:
    return len(before) >= LEAST_STEPS and 0 < SPIKE * statistics.median(before) < value
