"""The one error for input that cannot be used: its message says what is wrong and what to do; programs exit with 2."""

import errno

# What the system says in few words, in more of them.
ADVICE = {
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENOTDIR: "a part of this path is a file and no folder: choose another path",
    errno.EISDIR: "this is a folder, a file was expected: check the path",
    errno.EEXIST: "this exists already: choose another path, or move it away",
    errno.EACCES: "no permission: choose a path that you may read and write",
    errno.EPERM: "no permission: choose a path that you may read and write",
    errno.EROFS: "this disk is read-only: choose a path on another one",
    errno.ENOSPC: "the disk is full: free some space, or choose a path on another one",
    errno.EDQUOT: "your share of the disk is full: free some space, or choose a path on another one",
}


class InputError(ValueError):
    """Data, a model, a recipe or a folder that a user can mend."""


def message_of(error: Exception) -> str:
    """What a command prints of ``error``: of the system's own errors the path, and what to do."""
    if not isinstance(error, OSError) or error.errno not in ADVICE:
        return str(error)
    return f"{error.filename}: {ADVICE[error.errno]}" if error.filename else ADVICE[error.errno]
