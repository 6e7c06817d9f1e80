"""The checkpoint folders of a run: published whole, replaced, found, and removed.

A checkpoint is filled in a hidden folder ``.checkpoint-<step>.<pid>``, brought to the disk, given its manifest, and
then renamed. One that is replaced is first renamed to ``.checkpoint-<step>.replaced``, so that nothing whole is removed
before its successor is there; ``sweep`` puts back what a crash left in between.
"""

import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from trsd.errors import InputError
from trsd.files import share_like_folder, sync, sync_tree, write_json
from trsd.manifest import verify, write_manifest

TRAINER = Path("state") / "trainer.json"
BEST = "best.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run by name, oldest first; ``verify`` says of each whether it is whole."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def temporary_folder(output_dir: Path, step: int, process: int | None = None) -> Path:
    """Where this process, or the one of that number, fills the checkpoint of ``step``."""
    return output_dir / f".checkpoint-{step}.{process or os.getpid()}"


def publish(temporary: Path, step: int) -> Path:
    """Make the filled folder ``temporary`` the checkpoint of ``step`` beside it, in place of one that is there."""
    share_like_folder(temporary)
    sync_tree(temporary)
    write_manifest(temporary)
    sync(temporary)
    folder = temporary.with_name(f"checkpoint-{step}")
    aside = temporary.with_name(f".checkpoint-{step}.replaced")
    _settle(aside)
    if os.path.lexists(folder):
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        _settle(aside)
        raise
    sync(folder.parent)
    _remove(aside)
    return folder


def sweep(output_dir: Path) -> None:
    """Remove the checkpoint folders that a crash left half written, and put back one that it left set aside.

    Nothing else that begins with a dot is touched.
    """
    for leftover in output_dir.glob(".checkpoint-*"):
        if re.fullmatch(r"\.checkpoint-\d+\.replaced", leftover.name):
            _settle(leftover)
        elif re.fullmatch(r"\.checkpoint-\d+\.\d+", leftover.name):
            _remove(leftover)


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that is what was written, or None where there are no checkpoints at all.

    Each newer one that is not is named in a warning, with the reason.

    Raises:
        InputError: there are checkpoints and none is whole.
    """
    found = checkpoints(output_dir)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
            return checkpoint
        except (InputError, OSError) as error:
            print(f"warning: {checkpoint.name} is passed over: {error}", file=sys.stderr)
    if found:
        raise InputError(
            f"none of the {len(found)} checkpoints of {output_dir} is whole (see the reasons above). To start anew, "
            f"choose another output_dir; the traces can be used again: --data {output_dir}/traces/train.jsonl"
        )
    return None


def keep_within(output_dir: Path, limit: int | None, *, saved: Path) -> None:
    """Name the best checkpoint in best.json, and remove the oldest beyond ``limit``.

    Never removed: the newest, the best, and ``saved``, which is not the newest where an older one was resumed.
    """
    best = _note_best(output_dir)
    if limit is None:
        return
    found = checkpoints(output_dir)
    removable = [path for path in found[:-1] if path not in (best, saved)]
    for path in removable[: max(0, len(found) - limit)]:
        hidden = temporary_folder(output_dir, step_of(path))
        os.rename(path, hidden)  # a crash amid the removal must not leave half a checkpoint under its name
        _remove(hidden)


def best_checkpoint(output_dir: Path) -> dict[str, Any] | None:
    """What best.json says: checkpoint, step and validation_loss; None where no loss was measured."""
    path = output_dir / BEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _note_best(output_dir: Path) -> Path | None:
    """The checkpoint of the least validation loss, of several the oldest, written to best.json; None without one."""
    losses = {path: loss for path in checkpoints(output_dir) if (loss := _validation_loss(path)) is not None}
    if not losses:
        return None
    best = min(losses, key=lambda path: (losses[path], step_of(path)))
    entry = {"checkpoint": best.name, "step": step_of(best), "validation_loss": losses[best]}
    write_json(output_dir / BEST, entry)
    return best


def _validation_loss(checkpoint: Path) -> float | None:
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        loss = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8")).get("validation_loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            return float(loss)
    return None


def _settle(aside: Path) -> None:
    """Put a checkpoint that was set aside back where its successor never came, and remove it where it did."""
    folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
    if not os.path.lexists(aside):
        return
    if os.path.lexists(folder):
        _remove(aside)
    else:
        os.rename(aside, folder)


def _remove(path: Path) -> None:
    """A folder and all in it; of a link or file, that alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
