"""Teacher targets on disk: what their format costs beside one plain safetensors file of the same bytes.

A store is hashed and brought to the disk as it is written; the plain file is neither, and one line says what bringing
it to the disk takes. Reads come from the page cache. Rows are random, but for one line that has a teacher.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.lines import TransferLine
from bench.teacher_rows import BundledTeacher, RandomRows, Sizes, kinds_of, store_read, store_write
from bench.transfers import fields_in_turn, plain_read, plain_write
from trsd.teacher_cache import bytes_per_row, hidden_layout

SUITE = ("teacher_caches", "teacher targets on disk: written, and read from the page cache")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Qwen3-4B's hidden size on a GPU, the bundled reasoner's on a CPU.
SIZES = Sizes(2560, torch.bfloat16, 64, 200, 600, 32) if ON_GPU else Sizes(192, torch.float32, 256, 60, 180, 32)
EVERY_TRACE = range(SIZES.num_traces)
KINDS = kinds_of(SIZES.hidden_size, SIZES.dtype)
TAUGHT = Sizes(192, SIZES.dtype, 64 if ON_GPU else 16, 60, 180, 1)
REFERENCE = "the reference is one safetensors file"
WRITTEN = f"{SIZES.num_traces} traces written; {REFERENCE}"


def name_of(kind: object) -> str:
    return kind.name


@pytest.fixture(scope="module", params=KINDS, ids=name_of)
def rows(request: pytest.FixtureRequest) -> RandomRows:
    """Each kind's rows once."""
    return RandomRows(request.param, SIZES.rows_per_trace, device=DEVICE)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the stores are that are read."""
    folder = tmp_path_factory.mktemp("stores")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def line_of(group: str, name: str, rows: RandomRows, traces: Sequence[int]) -> Callable[..., TransferLine]:
    shape = dict(rows=rows.rows_of(traces), moved_bytes=rows.bytes_of(traces))
    return partial(TransferLine, group=group, contender=name, **shape)


def test_stores_are_written(rows, folder, benchmark, record):
    benchmark.group = WRITTEN

    def measure() -> list[dict[str, object]]:
        plain = plain_write(rows.tensors, folder / "plain")
        return [fields_in_turn(benchmark, store_write(rows, folder / "store"), plain)]

    record([line_of(WRITTEN, rows.kind.name, rows, EVERY_TRACE)], measure)


@pytest.mark.parametrize("rows", KINDS[:1], indirect=True, ids=name_of)
def test_a_plain_file_is_brought_to_the_disk(rows, folder, benchmark, record):
    benchmark.group = WRITTEN

    def measure() -> list[dict[str, object]]:
        plain, to_disk = (plain_write(rows.tensors, folder / f"{flag}", to_disk=flag) for flag in (False, True))
        return [fields_in_turn(benchmark, to_disk, plain)]

    record([line_of(WRITTEN, f"{rows.kind.name}, one file brought to the disk", rows, EVERY_TRACE)], measure)


@pytest.mark.parametrize("open_anew", [False, True], ids=["step", "all"])
def test_rows_are_read(rows, open_anew, stores, folder, benchmark, record):
    traces = EVERY_TRACE if open_anew else SIZES.step
    what = "traces read and their files' sha256 checked, once a run" if open_anew else "random traces read, a step's"
    benchmark.group = f"{len(traces)} {what}; {REFERENCE}"

    def measure() -> list[dict[str, object]]:
        plain = plain_read(rows.of(traces), folder / "plain", DEVICE)
        store = store_read(rows, stores / rows.kind.name, traces, open_anew=open_anew)
        return [fields_in_turn(benchmark, store, plain)]

    record([line_of(benchmark.group, rows.kind.name, rows, traces)], measure)


def test_a_teacher_is_asked_and_its_rows_are_written(folder, benchmark, record):
    group = f"{TAUGHT.num_traces} traces by the bundled reasoner; the reference asks it too and writes one file"
    benchmark.group = group

    def measure() -> list[dict[str, object]]:
        teacher = BundledTeacher(TAUGHT.rows_per_trace, max_tokens=4096)
        return [fields_in_turn(benchmark, teacher.cached(folder / "store"), teacher.plainly_saved(folder / "plain"))]

    rows = sum(TAUGHT.rows_per_trace)
    moved = rows * bytes_per_row(hidden_layout(TAUGHT.hidden_size, TAUGHT.dtype))
    record([partial(TransferLine, group=group, contender="hidden states", rows=rows, moved_bytes=moved)], measure)
