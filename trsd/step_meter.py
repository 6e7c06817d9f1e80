"""What a step's operations cost, counted as they are dispatched: live bytes, floating-point operations, bytes moved.

An operation takes at least the longer of its products at the device's rate and its bytes at the device's bandwidth:

    seconds = sum over operations of max(flops / products, (bytes read + written) / copies)                    (1)

which is a floor: kernels launched one after the other, each as fast as the device allows. Attention and the
distillation loss are single operations of ours; what they do inside is said by formulas.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trsd.live_bytes import LiveBytes
from trsd.meta_results import tensors_in
from trsd.quiet import quiet_imports

with quiet_imports():
    from torch.utils.flop_counter import flop_registry

TEACHER, PRODUCTS, ATTENTION, LOSS, ELEMENTWISE, OPTIMIZER = FAMILIES = (
    "teacher",
    "products of the body",
    "attention",
    "loss",
    "norms, activations and other elementwise work",
    "optimizer",
)


FP8_RATE = 2.0  # of products in 8 bits to those in bf16, on every GPU that has them


class StepMeter(LiveBytes):
    """Counts by family; ``products`` and ``copies`` are the device's ceilings (``trsd.ceilings``)."""

    def __init__(self, *, products: float, copies: float) -> None:
        super().__init__()
        self.products, self.copies = products, copies
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.num_fused = 0
        """Groups of operations that ran as one, in layers that are compiled."""
        self._family: str | None = None

    @contextmanager
    def family(self, name: str) -> Iterator[None]:
        """Inside, everything counts for this family; the outermost one holds."""
        before, self._family = self._family, self._family or name
        try:
            yield
        finally:
            self._family = before

    def add(self, family: str, *, flops: float = 0.0, moved_bytes: float = 0.0, rate: float = 1.0) -> None:
        """Count one operation, whose products run at ``rate`` times the ceiling."""
        family = self._family or family
        self.flops[family] += flops
        self.seconds[family] += max(flops / (rate * self.products), moved_bytes / self.copies)

    def hold(self, num_bytes: int) -> None:
        """Scratch of a single operation, beside all that is live at this moment."""
        if self.live + num_bytes > self.peak:
            self.peak = self.live + num_bytes
            self.reached_peak(scratch=num_bytes)

    def reached_peak(self, scratch: int = 0) -> None:
        """For those who want to look at what is live at a new peak."""

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any, *, made: bool) -> None:
        packet = getattr(func, "overloadpacket", None)
        counted = packet in flop_registry
        mutates = func._schema.is_mutable
        if not (made or mutates):
            return  # a view
        flops = float(flop_registry[packet](*args, **kwargs, out_val=result)) if counted else 0.0
        moved = moved_bytes((args, kwargs, result))
        rate = FP8_RATE if packet is torch.ops.aten._scaled_mm else 1.0
        self.add(PRODUCTS if counted else ELEMENTWISE, flops=flops, moved_bytes=moved, rate=rate)


def moved_bytes(tensors: Any) -> int:
    """Of all tensors in a nest of arguments and results, each read or written once."""
    return sum(map(_moved, tensors_in(tensors)))


def _moved(tensor: Tensor) -> int:
    """Bytes of a tensor that are there; what was broadcast is read once."""
    if tensor.numel() == 0:
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
