"""What a model folder's weight files hold, by their headers alone: whether all are there and whole, and how much."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trsd.errors import InputError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5")


def count_weights(folder: Path) -> int:
    """How many numbers the safetensors files of a model folder hold.

    Raises:
        InputError: there are none, one that the index names is missing, or one is not whole.
    """
    return sum(_count(path) for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    """The files that a loader would take: those of the index, else the one of the usual name, else all."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        other = next((path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
        raise InputError(
            f"{folder} holds no safetensors weights{f', but {other}' if other else ''}: convert them with "
            "save_pretrained of transformers first"
        )
    if not (folder / INDEX).exists():
        return [path for path in found if path.name == WHOLE] or found
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX} is no index of weight files ({error!r}): copy it again") from None
    missing = [str(name) for name in names if not (folder / str(name)).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing[:3])}, {len(missing)} of its {len(names)} weight files: copy or "
            "download them again"
        )
    return [folder / name for name in names]


def _count(path: Path) -> int:
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path} is a pointer of Git LFS and no weights: fetch them with git lfs pull")
    try:
        with safe_open(path, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be loaded, for it is not whole or no safetensors file ({error}): copy or download it again"
        ) from None
