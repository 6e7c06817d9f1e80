"""Peak bytes of live tensors, exact and repeatable where a process's memory is neither: on a CPU, and on no device.

On the meta device, where tensors have shapes and no content, it tells what a GPU would have to hold.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trsd.meta_results import MetaResults, new_tensors


class HeldStorages:
    """Storages that something refers to, and their bytes: what is freed leaves by itself, in this moment."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count ``storage``, once however often it is added."""
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, partial(self._leave, key, num_bytes))
            self.num_bytes += num_bytes

    def _leave(self, key: int, num_bytes: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._references[key]
        self.num_bytes -= num_bytes


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside it, from their making until nothing refers to them.

    Inputs made before are not counted, nor is scratch inside a single operation. A custom op is a single operation, so
    what it is made of must be called directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest_numel = 0
        self._made = HeldStorages()
        self._results = MetaResults()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Torch's question whether it may compile and run compiled code beside this; else it would compile nothing."""
        return True

    @property
    def live(self) -> int:
        """Bytes of the counted storages that something still refers to."""
        return self._made.num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = self._results(func, args, kwargs)
        made = new_tensors(result, (args, kwargs))
        self.hold_results(made)
        self.ran(func, args, kwargs, result, made=bool(made))
        return result

    def hold_results(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of ``tensors``, which an operation made, from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._made.add(storage)
            self.largest_numel = max(self.largest_numel, storage.nbytes() // tensor.element_size())
        if self.live > self.peak:
            self.peak = self.live
            self.reached_peak()

    def reached_peak(self) -> None:
        """For those who want to look at what is live at a new peak."""

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any, *, made: bool) -> None:
        """For those who want to count something else of each operation; ``made``: it is no view of its inputs."""
