"""Bytes that go to disk and come from it, timed: plain files here, teacher rows and checkpoints in files of their own.

The outcome of a first round is compared with what it must be, bit for bit; a way that loses a bit is not timed.
safetensors maps the files it loads and reads nothing, so before a round ends what was loaded is brought into memory of
its own, where a training step would bring it.
"""

import ctypes
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.measure import MAX_ROUNDS, NotMeasured, Rounds, timed_fields

SECONDS, MIN_ROUNDS = 0.5, 3
MOST_SECONDS = 4.0  # of a line's rounds: large checkpoints and slow disks make do with one or two

Tensors = dict[str, Tensor]


class Transfer(Rounds):
    """Work that moves bytes, timed on the CPU's clock once the GPU has them too."""

    def __init__(
        self,
        move: Callable[[], Any],
        *,
        check: Callable[[Any], object],
        undo: Callable[[], object] = lambda: None,
    ) -> None:
        """Take the work.

        Args:
            move: what is timed; returns its outcome.
            check: raises for an outcome that is not what it must be; asked once, of the first round.
            undo: makes everything what it was before a round; not timed.
        """
        super().__init__(self._move, on_gpu=False)
        self.move, self.check, self.undo = move, check, undo
        self._outcome, self._checked = None, False

    def once(self) -> None:
        """One timed round; what ``undo`` still does on a GPU is not its."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().once()

    def warm_up(self) -> float:
        """Seconds of a first round, whose outcome was right."""
        self.once()
        return self.seconds.pop()

    def clean_up(self) -> None:
        if not self._checked:
            self.check(self._outcome)
            self._checked = True
        self._outcome = None
        self.undo()

    def _move(self) -> None:
        self._outcome = self.move()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def fields_in_turn(benchmark: Callable, run: Transfer, reference: Transfer) -> dict[str, object]:
    """The measured fields of a ``TransferLine``: both checked, then both round by round."""
    slowest = run.warm_up() + reference.warm_up()
    benchmark.pedantic(run.once, setup=reference.once, rounds=_rounds_of(slowest, MAX_ROUNDS))
    return timed_fields(run, reference)


def ceiling_fields(benchmark: Callable, run: Rounds, amount: float) -> dict[str, object]:
    """The measured fields of a ``CeilingLine``: ``amount`` a second, in a round of median length."""
    # Many short rounds, so that a GPU's clock is what it is under load.
    benchmark.pedantic(run.once, rounds=_rounds_of(run.warm_up(), 1000))
    return dict(measured=1000 * amount / run.milliseconds, rounds=len(run.seconds))


def _rounds_of(seconds: float, most: int) -> int:
    wanted = max(MIN_ROUNDS, min(most, int(SECONDS / seconds)))
    return max(1, min(wanted, int(MOST_SECONDS / seconds)))


def refuse_unlike(got: Tensors, wanted: Tensors) -> None:
    """Raise ValueError unless both have the same names, types, shapes and bits."""
    if got.keys() != wanted.keys():
        raise ValueError(f"got {', '.join(sorted(got.keys() ^ wanted.keys()))} on one side only")
    for name, tensor in got.items():
        other = wanted[name].to(tensor.device)
        alike = (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        if not (alike and torch.equal(_bits(tensor), _bits(other))):
            raise ValueError(f"{name} is not what was written")


def owned(tensors: Tensors) -> Tensors:
    """The same tensors, in memory of their own even where a file was mapped: every page has been written to."""
    for tensor in tensors.values():
        if tensor.device.type == "cpu":
            _bits(tensor)[:: mmap.PAGESIZE].add_(0)
    return tensors


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors; those that share their memory count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def remove(path: Path) -> None:
    """A file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    """Return when the file's content is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def plain_write(tensors: Tensors, path: Path, *, to_disk: bool = False) -> Transfer:
    """The tensors as one safetensors file, left in the page cache or brought ``to_disk``."""

    def write() -> None:
        save_file(tensors, path)
        if to_disk:
            bring_to_disk(path)

    return Transfer(write, check=lambda _: refuse_unlike(load_file(path), tensors), undo=partial(remove, path))


def plain_read(tensors: Tensors, path: Path, device: str) -> Transfer:
    """The tensors from one safetensors file, which is written here, onto the device."""
    save_file(tensors, path)
    return Transfer(lambda: owned(load_file(path, device=device)), check=lambda got: refuse_unlike(got, tensors))


def file_write(content: bytes, path: Path) -> Transfer:
    """The bytes brought to the disk as a file."""

    def write() -> None:
        path.write_bytes(content)
        bring_to_disk(path)

    def check(_: None) -> None:
        _refuse_other_bytes(path.read_bytes(), content)

    return Transfer(write, check=check, undo=partial(remove, path))


def file_read(content: bytes, path: Path, *, from_disk: bool) -> Transfer:
    """The bytes from a file, which is written here, in the page cache or ``from_disk``.

    Raises:
        NotMeasured: the file system keeps its files in memory, or does not say whether it does.
    """
    path.write_bytes(content)
    bring_to_disk(path)
    buffer = bytearray(len(content))

    def read() -> bytearray:
        with path.open("rb", buffering=0) as stream:
            stream.readinto(buffer)
        return buffer

    if from_disk:
        leave_page_cache(path)
    elif share_in_page_cache(path) < 0.99:
        raise NotMeasured(f"{file_system(path)} does not let files stay in the page cache")
    undo = partial(leave_page_cache, path) if from_disk else lambda: None
    return Transfer(read, check=lambda got: _refuse_other_bytes(got, content), undo=undo)


def _refuse_other_bytes(got: bytes | bytearray, wanted: bytes) -> None:
    if got != wanted:
        raise ValueError("the file is not what was written")


def share_in_page_cache(path: Path) -> float:
    """How much of a file is read without a disk; asking does not change it.

    Raises:
        NotMeasured: the system does not say.
    """
    size = path.stat().st_size
    mapped = torch.from_file(str(path), size=size, dtype=torch.uint8)
    pages = (ctypes.c_ubyte * math.ceil(size / mmap.PAGESIZE))()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(size), pages):
        raise NotMeasured(f"what is in the page cache is not said: {os.strerror(ctypes.get_errno())}")
    return sum(page & 1 for page in pages) / len(pages)


def leave_page_cache(path: Path) -> None:
    """Drop a file that is on the disk from the page cache; NotMeasured where it stays."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_page_cache(path) > 0.01:
        raise NotMeasured(f"{file_system(path)} does not let files leave the page cache")


def file_system(path: Path) -> str:
    """What is mounted where ``path`` is, such as ext4."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if path.resolve().is_relative_to(mount[0])]
    return sorted(above, key=lambda mount: len(mount[0]))[-1][1]
