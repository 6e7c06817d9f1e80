"""What compute-sanitizer's memcheck and racecheck look for on a GPU, found in Triton's interpreter.

Every launch is recorded: which bytes a program reads and writes, from which element of a tile, and between which of its
barriers. Two things end a test: an address outside every tensor that the kernel was given, and bytes that one side
writes and another touches while nothing orders the two. Programs of a launch are never ordered; the elements of a tile
are handled by different threads, which only a barrier orders. (So do reductions and changes of layout on a GPU, which
no kernel should have to rely upon.) The element that is read may be written over: its value was there first. Atomic
operations are not looked at; no kernel here has any.
"""

from contextlib import contextmanager

import numpy as np

LOAD, STORE = 0, 1


class Launch:
    """The accesses to memory of one launch.

    Args:
        name: the kernel's.
        tensors: what it was given, at the addresses that the interpreter works on.
    """

    def __init__(self, name, tensors):
        self.name, self.program, self.barriers = name, 0, 0
        spans = _merged(
            (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in tensors if tensor.numel()
        )
        self.starts, self.ends = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.accesses = [[] for _ in spans]  # (first bytes, bytes each, elements, kind, program, barriers before)

    def record(self, pointers, mask, kind):
        """Note that the elements of a tile for which ``mask`` holds are loaded or stored."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        elements = np.flatnonzero(mask)
        addresses = np.asarray(pointers.data).reshape(-1)[elements].astype(np.uint64)
        if not len(addresses):
            return
        span = np.searchsorted(self.starts, addresses.min(), side="right") - 1
        inside = span >= 0 and addresses.max() + np.uint64(size) <= self.ends[span]
        assert inside, f"{self.name}: an access outside every tensor it was given, in program {self.program}"
        self.accesses[span].append((addresses, size, elements, kind, self.program, self.barriers))

    def check(self):
        """Fail where bytes are written by one and touched by another with nothing to order the two."""
        for accesses in self.accesses:
            if any(access[3] == STORE for access in accesses):
                self._check(accesses)

    def _check(self, accesses):
        unit = min(access[1] for access in accesses)
        rows = [self._units(access, unit) for access in accesses]
        places, elements, kinds, programs, barriers = (np.concatenate(column) for column in zip(*rows, strict=True))
        written = np.isin(places, places[kinds == STORE])
        places, elements, kinds, programs, barriers = (
            column[written] for column in (places, elements, kinds, programs, barriers)
        )
        assert not _differ((places,), programs, kinds).any(), (
            f"{self.name}: a program writes what another one reads or writes"
        )
        assert not _differ((places, programs, barriers), elements, kinds).any(), (
            f"{self.name}: a thread writes what another one reads or writes, without a barrier between"
        )

    @staticmethod
    def _units(access, unit):
        """An access as columns, one entry for every ``unit`` bytes of it."""
        addresses, size, elements, *rest = access
        count = size // unit
        places = (addresses[:, None] // np.uint64(unit) + np.arange(count, dtype=np.uint64)).reshape(-1)
        return places, np.repeat(elements, count), *(np.full(len(places), each) for each in rest)


def _merged(spans):
    """``spans``, (start, end) of memory, in order, those that overlap as one: views of one tensor."""
    merged = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _extent(tensor):
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _differ(keys, owners, kinds):
    """For every group of equal ``keys``: whether something in it is stored and not all of its ``owners`` are one."""
    order = np.lexsort(keys)
    keys = [key[order] for key in keys]
    begins = np.flatnonzero(np.any([np.r_[True, key[1:] != key[:-1]] for key in keys], axis=0))
    owners, kinds = owners[order], kinds[order]
    several = np.minimum.reduceat(owners, begins) != np.maximum.reduceat(owners, begins)
    return several & (np.maximum.reduceat(kinds, begins) == STORE)


@contextmanager
def sanitized():
    """Inside, every launch in the interpreter is checked as it ends."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launch = None
    was = {
        (kind, name): getattr(kind, name)
        for kind, names in (
            (GridExecutor, ("__call__", "_init_args_hst")),
            (InterpreterBuilder, ("set_grid_idx", "create_masked_load", "create_masked_store", "create_barrier")),
        )
        for name in names
    }

    def given(self, arguments, keywords):
        nonlocal launch
        found = was[GridExecutor, "_init_args_hst"](self, arguments, keywords)
        tensors = [each for each in (*found[0], *found[1].values()) if hasattr(each, "data_ptr")]
        launch = Launch(self.fn.__name__, tensors)
        return found

    def launched(self, *arguments, **keywords):
        was[GridExecutor, "__call__"](self, *arguments, **keywords)
        launch.check()

    def next_program(self, x, y, z):
        launch.program, launch.barriers = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z, 0
        was[InterpreterBuilder, "set_grid_idx"](self, x, y, z)

    def load(self, pointers, mask, *rest, **options):
        launch.record(pointers, mask.data, LOAD)
        return was[InterpreterBuilder, "create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        launch.record(pointers, mask.data, STORE)
        return was[InterpreterBuilder, "create_masked_store"](self, pointers, value, mask, *rest, **options)

    def barrier(self):
        launch.barriers += 1

    instead = [launched, given, next_program, load, store, barrier]
    for (kind, name), function in zip(was, instead, strict=True):
        setattr(kind, name, function)
    try:
        yield
    finally:
        for (kind, name), function in was.items():
            setattr(kind, name, function)
