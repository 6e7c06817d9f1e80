"""Small files written whole or not at all, and what it takes for files to outlast a power cut."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trsd.errors import InputError, message_of


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by way of a temporary file, so that a crash never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # or the name could reach the disk before the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_folder(folder: Path, name: str = "output_dir") -> None:
    """Raise InputError, naming the flag ``name``, where no file could be made in ``folder``, which need not exist yet.

    Leaves nothing behind.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{name}: {folder} cannot be written to: {message_of(error)}") from None
    finally:
        for path in new:
            with suppress(OSError):  # not made, or in use by now
                path.rmdir()


def check_free_of_evaluations(folder: Path) -> None:
    """Raise InputError where results would replace those of an evaluation, or could not be written."""
    if (folder / "evaluation.json").exists():
        raise InputError(f"output_dir: {folder} holds an evaluation already: choose another one, or move it away")
    check_folder(folder)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # but some network file systems cannot sync a folder
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync`` every file and folder under ``folder``, and itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def share_like_folder(folder: Path) -> None:
    """Let whoever may read ``folder`` read its files: safetensors writes for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | mode & 0o444)


@contextmanager
def exclusively(path: Path, refusal: str) -> Iterator[None]:
    """Be the one process that holds the lock file ``path``; the lock ends with the process, however that ends.

    Raises:
        InputError: ``refusal``, when another process holds it.
        OSError: no such file can be made.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(stream.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False  # another process has the lock, or has just finished and removed it
        if not held:
            raise InputError(refusal)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
