"""Writing a store of rows (``row_shards.py``): resumable after any end, by one process at a time, whole or not there.

A store is built in a hidden folder beside its place, shard by shard. A shard is written under a temporary name, brought
to the disk, hashed, renamed and entered in the manifest; the complete folder is renamed to its place. Whatever ends a
build, ``kill -9`` included, the next one keeps every shard whose sha256 is right and makes the others. What a shard
holds depends on its traces alone, so the result is the same, byte for byte, as that of a build that was never ended.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trsd.errors import InputError
from trsd.files import exclusively, share_like_folder, sync
from trsd.row_shards import MANIFEST, building_folder, check_fingerprint, file_sha256, lock_file, read_manifest

TRACES_PER_SHARD = 128
BYTES_PER_SHARD = 256 * 2**20
"""A shard's rows are in memory once when it is made; one trace may be larger than this."""


def plan_shards(rows_per_trace: Sequence[int], bytes_per_row: int) -> list[range]:
    """The traces of each shard, in order."""
    shards, first, size = [], 0, 0
    for index, rows in enumerate(rows_per_trace):
        full = size + rows * bytes_per_row > BYTES_PER_SHARD or index - first == TRACES_PER_SHARD
        if full and index > first:
            shards.append(range(first, index))
            first, size = index, 0
        size += rows * bytes_per_row
    return [*shards, range(first, len(rows_per_trace))]


def build_shards(
    folder: Path,
    *,
    fingerprint: dict[str, str],
    rows_per_trace: Sequence[int],
    bytes_per_row: int,
    make: Callable[[range], dict[str, Tensor]],
    files: dict[str, dict[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build the store ``folder``, or what an earlier build left of it to do.

    Args:
        folder: where the complete store will be; nothing or an empty folder is there.
        fingerprint: of what the rows are made from.
        rows_per_trace: of every trace.
        bytes_per_row: of all tensors together.
        make: the tensors of a range of traces on the CPU, their rows one after the other; of the same traces the same.
        files: further files by name, with their tensors.
        progress: is told (done, total) traces.

    Raises:
        InputError: another process builds this store, what was begun has another fingerprint, something else is at
            ``folder``, or nothing can be written there.
    """
    with _writing(folder, "nothing was begun"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / MANIFEST).exists():
            return  # another process was faster
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and no teacher cache: choose another folder, or empty this one")
        building = building_folder(folder)
        plan = plan_shards(rows_per_trace, bytes_per_row)
        shards = _begin(building, fingerprint)
        kept_files = [_write(building / name, tensors) for name, tensors in files.items()]
        manifest = {"fingerprint": fingerprint, "files": kept_files, "shards": shards}
        for number, indices in enumerate(plan):
            path, rows = building / f"rows-{number:05d}.safetensors", [rows_per_trace[index] for index in indices]
            if number == len(shards) or not _is_whole(path, shards[number], rows):
                shards[number : number + 1] = [{**_write(path, make(indices)), "rows_per_trace": rows}]
                _write_manifest(building, manifest)
            if progress:
                progress(indices.stop, len(rows_per_trace))
        del shards[len(plan) :]
        _complete(building, folder, manifest)


def _begin(building: Path, fingerprint: dict[str, str]) -> list[dict[str, Any]]:
    """The shards that an earlier build entered in its manifest; a new folder where there was none."""
    if (building / MANIFEST).exists():
        manifest = read_manifest(building)
        check_fingerprint(building, manifest["fingerprint"], fingerprint)
        return manifest["shards"]
    with _writing(building, "nothing was begun"):
        building.mkdir(exist_ok=True)
        _write_manifest(building, {"fingerprint": fingerprint, "files": [], "shards": []})
    return []


def _is_whole(path: Path, entry: dict[str, Any], rows_per_trace: list[int]) -> bool:
    """Whether a shard that was entered is there as it was written, and still the one that is wanted."""
    if (entry["name"], entry["rows_per_trace"]) != (path.name, rows_per_trace) or not path.exists():
        return False
    return path.stat().st_size == entry["num_bytes"] and file_sha256(path) == entry["sha256"]


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a file, whole or not at all; returns its entry of the manifest."""
    temporary = path.with_name(f".{path.name}")
    with _writing(path, "the shards before it are kept"):
        try:
            save_file(tensors, temporary)
            sync(temporary)
            entry = {"name": path.name, "num_bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return entry


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f".{MANIFEST}"
    with _writing(folder / MANIFEST, "the shards before it are kept"):
        temporary.write_text(json.dumps(manifest) + "\n")
        sync(temporary)
        os.replace(temporary, folder / MANIFEST)


def _complete(building: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Rename a folder that holds all shards to its place, without what interrupted builds left in it."""
    wanted = {MANIFEST, *(entry["name"] for entry in [*manifest["files"], *manifest["shards"]])}
    for path in building.iterdir():
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    _write_manifest(building, manifest)
    with _writing(folder, "all shards are kept"):
        share_like_folder(building)
        sync(building)
        os.replace(building, folder)


@contextmanager
def _writing(path: Path, kept: str) -> Iterator[None]:
    """Say what a disk that is full or read-only means here."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the teacher's targets cannot be written to {path} ({error}): make room there or choose another "
            f"teacher_cache_dir, and start again; {kept}"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the one process that builds ``folder``."""
    path = lock_file(folder)
    with _writing(path, "nothing was begun"):
        path.touch()
    with exclusively(
        path,
        f"another process is building the teacher cache {folder}: start again when it is done, and it is taken from "
        "there",
    ):
        yield
