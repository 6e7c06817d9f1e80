"""What the device can do at best: large products and copies as ``trsd.ceilings`` measures them, and its disk."""

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.lines import CeilingLine
from bench.measure import Rounds
from bench.transfers import ceiling_fields, file_read, file_system, file_write
from trsd.ceilings import known_device, large_copy, large_product

SUITE = ("ceilings", "what the device can do at best")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
FILE_BYTES = 2**28 if ON_GPU else 2**26
FILES = {
    "written and brought to the disk": file_write,
    "read from the disk": partial(file_read, from_disk=True),
    "read from the page cache": partial(file_read, from_disk=False),
}


@pytest.fixture(scope="module")
def content() -> bytes:
    """Random, so that no file system makes less of it."""
    return random.Random(0).randbytes(FILE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Of a file that is removed."""
    yield tmp_path / "bytes"
    shutil.rmtree(tmp_path)


def in_tera(rate: float | None) -> float | None:
    return rate and rate / 1e12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, benchmark, record):
    benchmark.group = "large dense products, on random numbers"
    entry = known_device(DEVICE)
    stated = in_tera(entry.stated_products) if entry and dtype == torch.bfloat16 else None
    name = str(dtype).removeprefix("torch.")
    line = partial(CeilingLine, group=benchmark.group, contender=name, unit="TFLOP/s", stated=stated)

    def measure() -> list[dict[str, object]]:
        work = large_product(DEVICE, dtype)
        return [ceiling_fields(benchmark, Rounds(work.run, on_gpu=ON_GPU), work.amount / 1e12)]

    record([line], measure)


def test_copies(benchmark, record):
    benchmark.group = "a large copy in memory, bytes read and written"
    entry = known_device(DEVICE)
    stated = entry.stated_copies / 1e9 if entry else None
    line = partial(CeilingLine, group=benchmark.group, contender="GPU" if ON_GPU else "CPU", unit="GB/s", stated=stated)

    def measure() -> list[dict[str, object]]:
        work = large_copy(DEVICE)
        return [ceiling_fields(benchmark, Rounds(work.run, on_gpu=ON_GPU), work.amount / 1e9)]

    record([line], measure)


@pytest.mark.parametrize("name", FILES)
def test_files(name, content, path, benchmark, record):
    benchmark.group = f"a file of {len(content) / 2**20:.0f} MiB on {file_system(path.parent)}"
    line = partial(CeilingLine, group=benchmark.group, contender=name, unit="GB/s")
    record([line], lambda: [ceiling_fields(benchmark, FILES[name](content, path), len(content) / 1e9)])
