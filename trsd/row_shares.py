"""Which rows of a step each rank runs: as many as any other, of like length in each round."""

from collections.abc import Sequence


def share_rows(rows: Sequence[Sequence[int]], lengths: Sequence[int], *, num_ranks: int, rank: int) -> list[list[int]]:
    """The rows that ``rank`` runs, as many as any other rank does.

    The longest rows are split until their number is a multiple of the ranks; rows of a round are of like length, so
    that no rank waits long for another. Where there are fewer sequences than ranks, some ranks get an empty row.

    Args:
        rows: indices into ``lengths``, as ``pack_sequences`` makes them.
        lengths: tokens of each sequence.
        num_ranks, rank: of the run.
    """
    found = [list(row) for row in rows]
    if num_ranks == 1:
        return found

    def tokens(row: Sequence[int]) -> int:
        return sum(lengths[index] for index in row)

    while len(found) % num_ranks:
        splittable = [place for place, row in enumerate(found) if len(row) > 1]
        if not splittable:
            found.append([])
            continue
        place = max(splittable, key=lambda place: tokens(found[place]))
        found[place : place + 1] = _halves(found[place], lengths)
    found.sort(key=lambda row: (-tokens(row), row))
    return found[rank::num_ranks]


def _halves(row: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """A row as two of about the same length: each sequence, longest first, to the shorter one."""
    halves: list[list[int]] = [[], []]
    sums = [0, 0]
    for index in sorted(row, key=lambda index: (-lengths[index], index)):
        place = sums.index(min(sums))
        halves[place].append(index)
        sums[place] += lengths[index]
    return [sorted(half) for half in halves]
