"""Peak bytes of live tensors, exact and repeatable where a process's memory is neither: on a CPU, and on no device.

On the meta device, where tensors have shapes and no content, it tells what a GPU would have to hold.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside it, from their making until nothing refers to them.

    Inputs made before are not counted, nor is scratch inside a single operation. A custom op is a single operation, so
    what it is made of must be called directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest_numel = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # live bytes as if nothing had been freed since they were last summed

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Torch's question whether it may compile and run compiled code beside this; else it would compile nothing."""
        return True

    @property
    def live(self) -> int:
        """Bytes of the counted storages that something still refers to."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._at_most = sum(size for _, size in self._alive.values())
        return self._at_most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        made = [x for x in tensors if x.untyped_storage()._cdata not in known]
        self.hold_results(made)
        self.ran(func, args, kwargs or {}, result, made=bool(made))
        return result

    def hold_results(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of ``tensors``, which an operation made, from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._at_most += storage.nbytes()
            self.largest_numel = max(self.largest_numel, storage.nbytes() // tensor.element_size())
        if self._at_most > self.peak and self.live > self.peak:
            self.peak = self._at_most
            self.reached_peak()

    def reached_peak(self) -> None:
        """For those who want to look at what is live at a new peak."""

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any, *, made: bool) -> None:
        """For those who want to count something else of each operation; ``made``: it is no view of its inputs."""
