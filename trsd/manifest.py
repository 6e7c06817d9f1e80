"""Whether a checkpoint is what was written: ``manifest.json`` with the size and sha256 of every file, and its check.

    {"format": 1, "files": {"model.safetensors": {"num_bytes": 8, "sha256": "..."}, "state/trainer.json": ...}}

A folder is not trusted before it has been checked: first its names (no links, nothing beyond the folder, nothing to
unpickle), then sizes and headers, then every byte. Only what is listed in the manifest may be there to be loaded.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from trsd.errors import InputError
from trsd.files import write_json, write_text
from trsd.row_shards import MANIFEST, file_sha256

FORMAT = 1
INDEX = "model.safetensors.index.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 100 * 2**20
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DEPTH = 4
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
# What a loader may take without being told: by ending, or by lying in a folder of the checkpoint's own.
LOADED = {".safetensors", ".json", ".py", ".jinja", ".model", ".gguf"}


def write_manifest(folder: Path) -> None:
    """Write the manifest of every file under ``folder``; what is there must be complete."""
    names = sorted(_files(folder).keys() - {MANIFEST})
    entries = {
        name: {"num_bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, _digests(folder, names), strict=True)
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "files": entries})


def replace_unloaded(folder: Path, name: str, text: str) -> None:
    """Write ``text`` to the file ``name`` of a written ``folder``, which is what its manifest says at every moment.

    ``name`` is of a kind that no loader takes, so for as long as it changes it may stand outside the manifest.
    """
    if "/" in name or PurePosixPath(name).suffix.lower() in LOADED:
        raise ValueError(f"expected a file that no loader takes, got {name}")
    entries = _manifest(folder, _files(folder))
    others = {other: entry for other, entry in entries.items() if other != name}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": others})
    write_text(folder / name, text)
    written = {"num_bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": dict(sorted((others | {name: written}).items()))})


def verify(folder: Path) -> None:
    """Raise InputError, naming the file and what is wrong with it, unless ``folder`` is what its manifest says."""
    sizes = _files(folder)
    for name in sizes:
        if PurePosixPath(name).suffix.lower() in PICKLES:
            raise InputError(f"{folder / name}: only safetensors and JSON are read from a checkpoint: remove this file")
    entries = _manifest(folder, sizes)
    for name, entry in entries.items():
        if name not in sizes:
            raise InputError(f"{folder / name} is missing, the manifest lists it")
        if sizes[name] != entry["num_bytes"]:
            raise InputError(f"{folder / name} has {sizes[name]} bytes, {entry['num_bytes']} were written")
    for name in sizes.keys() - entries.keys() - {MANIFEST}:
        if "/" in name or PurePosixPath(name).suffix.lower() in LOADED:
            raise InputError(f"{folder / name} is not in the manifest and could be loaded: remove it")
    for name in entries:
        if name.endswith(".safetensors"):
            _check_header(folder / name, sizes[name])
    if INDEX in entries:
        _check_index(folder / INDEX, sizes[INDEX], entries)
    for name, digest in zip(entries, _digests(folder, entries), strict=True):
        if digest != entries[name]["sha256"]:
            raise InputError(f"{folder / name} is damaged: its sha256 is not that of what was written")


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in ``path``; InputError when it is none, or larger than ``max_bytes``."""
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is missing, or no file")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(f"{path} has {size} bytes, expected at most {max_bytes}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _files(folder: Path) -> dict[str, int]:
    """Sizes of the files under ``folder`` by relative name; InputError for anything but plain files and folders."""
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, not a link or a file")
    return dict(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    if prefix.count("/") > MAX_DEPTH:
        raise InputError(f"{folder}: expected at most {MAX_DEPTH} folders inside each other in a checkpoint")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif stat.S_ISREG(found.st_mode):
            yield prefix + entry.name, found.st_size
        else:
            raise InputError(f"{entry.path} is a link or a device: a checkpoint holds plain files only")


def _manifest(folder: Path, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    if MANIFEST not in sizes:
        raise InputError(
            f"{folder} has no {MANIFEST}: it was not written to its end, or by something else; it can be loaded as a "
            "model but not resumed"
        )
    path = folder / MANIFEST
    manifest = read_json_object(path, max_bytes=MAX_MANIFEST_BYTES)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: expected format {FORMAT}, got {manifest.get('format')!r}: another version wrote it")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected the files of the checkpoint by name under 'files'")
    for name, entry in entries.items():
        refuse_outside(path, name)
        well_formed = (
            isinstance(entry, dict)
            and type(entry.get("num_bytes")) is int
            and isinstance(entry.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        )
        if not well_formed:
            raise InputError(f"{path}: {name}: expected num_bytes and a sha256, got {str(entry)[:100]}")
    return entries


def refuse_outside(path: Path, name: Any) -> None:
    """Raise InputError unless ``name``, which the file ``path`` gives, is a plain relative one that stays inside."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00:]", name):
        raise InputError(f"{path}: {str(name)[:100]!r} is no plain name of a file inside the checkpoint")


def _check_header(path: Path, size: int) -> None:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise InputError(f"{path}: its header claims {length} bytes, the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: its header claims {length} bytes, expected at most {MAX_HEADER_BYTES}")


def _check_index(path: Path, size: int, entries: dict[str, Any]) -> None:
    shards = read_json_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{path}: expected a weight_map from tensors to files")
    for name in {str(name): name for name in shards.values()}.values():
        refuse_outside(path, name)
        if name not in entries:
            raise InputError(f"{path} names {name}, which the manifest does not list")


def _digests(folder: Path, names: Iterable[str]) -> list[str]:
    """sha256 of files; hashing leaves Python's lock, so large files are read side by side."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: file_sha256(folder / name), names))
