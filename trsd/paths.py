"""Paths that users write: plain ones, and ``bundled:NAME`` for what ships with the package."""

from pathlib import Path

BUNDLED = "bundled:"


def resolve_bundled(path: str) -> str:
    """``bundled:NAME`` is a file or folder that ships inside ``trsd/demo``; anything else stays as it is."""
    if not path.startswith(BUNDLED):
        return path
    inside = Path(__file__).parent / "demo" / path.removeprefix(BUNDLED)
    if not inside.exists():
        raise FileNotFoundError(
            f"nothing is bundled as {path}; there are bundled:reasoner, bundled:student and bundled:questions/*.jsonl"
        )
    return str(inside)
