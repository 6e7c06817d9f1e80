"""What torchrun told this process, by its environment alone: torch is not imported."""

import os

from trsd.errors import InputError


def launched_ranks() -> tuple[int, int]:
    """(rank, number of ranks) that torchrun says; (0, 1) without it.

    Raises:
        InputError: an environment of torchrun's that is not whole.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0")
    if not size.isdecimal() or not rank.isdecimal() or not 0 <= int(rank) < int(size):
        raise InputError(f"RANK {rank} and WORLD_SIZE {size} are no rank of a run: start it by torchrun")
    if int(size) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError(f"WORLD_SIZE is {size} and MASTER_ADDR or MASTER_PORT is missing: start it by torchrun")
    return int(rank), int(size)


def refuse_ranks(command: str) -> None:
    """Raise InputError in a command that runs in one process when torchrun started several."""
    if launched_ranks()[1] > 1:
        raise InputError(f"{command} runs in one process: start it without torchrun")
