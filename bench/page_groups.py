"""Which lines belong together on the results page: fractions of one setting, branches and separate sequences."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.lines import InTurnLine, TrainingLine
from bench.record import grouped
from bench.results_files import Suite

OUT_OF_MEMORY = "out of memory"
FRACTION = re.compile(r",?\s*\bf = [\d.]+")
NUM_BRANCHES = re.compile(r"\b\d+(?= (?:even )?(?:branches|cuts)\b)|(?<=\bK = )\d+")


def is_ours(contender: str) -> bool:
    """Whether a contender is this package."""
    return contender.startswith("ours")


def setting_of(line: Any) -> str:
    """The line's group without its fraction."""
    return FRACTION.sub("", line.group)


def fraction_settings(lines: Iterable[Any]) -> dict[str, list[TrainingLine]]:
    """Training lines without branches by their setting, each setting's by fraction."""
    settings: dict[str, list[TrainingLine]] = {}
    for line in lines:
        if isinstance(line, TrainingLine) and line.branches is None:
            settings.setdefault(setting_of(line), []).append(line)
    return {setting: sorted(found, key=lambda line: line.fraction) for setting, found in settings.items()}


class BranchGroup(NamedTuple):
    """One group whose sequences ran both sharing what they begin with and separately."""

    group: str
    shared: list[InTurnLine]
    """Ours first, which was measured; others may have run out of memory."""
    separate: list[InTurnLine]

    @property
    def ours(self) -> InTurnLine:
        """The branches that others are held against."""
        return self.shared[0]

    @property
    def fastest_separate(self) -> InTurnLine | None:
        """Of those that were measured."""
        measured = [line for line in self.separate if line.outcome == "ok"]
        return min(measured, key=lambda line: times(line, self.ours), default=None)

    @property
    def num_branches(self) -> int | None:
        """As the lines or the group's name say."""
        found = NUM_BRANCHES.search(self.group)
        return getattr(self.ours, "branches", None) or (int(found[0]) if found else None)

    @property
    def setting(self) -> str:
        """The group without its number of branches."""
        return NUM_BRANCHES.sub("K", FRACTION.sub("", self.group))


def branch_groups(suite: Suite) -> list[BranchGroup]:
    """The suite's groups in which sequences ran separately beside branches that were measured."""
    known = [line for line in suite.lines if isinstance(line, InTurnLine)]
    found = []
    for group, lines in grouped([line for line in known if line.milliseconds or ran_out_of_memory(line)]).items():
        separate = [line for line in lines if "separate" in line.contender]
        partners = {_without_how(line.contender) for line in separate}
        # Ours is what was also run separately; a back end that only runs separately has no partner.
        shared = sorted(
            (line for line in lines if "separate" not in line.contender),
            key=lambda line: (line.outcome != "ok", _without_how(line.contender) not in partners),
        )
        if shared and separate and shared[0].outcome == "ok":
            found.append(BranchGroup(group, shared, separate))
    return found


def branch_settings(suite: Suite) -> dict[str, list[BranchGroup]]:
    """Groups that differ in their number of branches alone, by that number; each other group by itself."""
    settings: dict[str, list[BranchGroup]] = {}
    for group in branch_groups(suite):
        settings.setdefault(group.setting if group.num_branches else group.group, []).append(group)
    return {name: sorted(groups, key=lambda group: group.num_branches or 0) for name, groups in settings.items()}


def _without_how(contender: str) -> str:
    """A contender's name without the words for sharing or not."""
    return re.sub(r",?\s*(separate sequences|branches)", "", contender)


def times(line: InTurnLine, other: InTurnLine) -> float:
    """The time of a line as a multiple of another's of its group: by their ratios to the reference run in turn."""
    if line.time_ratio and other.time_ratio:
        return line.time_ratio / other.time_ratio
    return line.milliseconds / other.milliseconds


def memory_times(line: InTurnLine, other: InTurnLine) -> float | None:
    """The peak of a line as a multiple of another's, where both are known."""
    return line.peak_bytes / other.peak_bytes if line.peak_bytes and other.peak_bytes else None


def short_outcome(line: Any) -> str:
    """An outcome without its reason."""
    return line.outcome.split(":")[0].strip()


def ran_out_of_memory(line: Any) -> bool:
    """Whether that is the line's outcome."""
    return short_outcome(line) == OUT_OF_MEMORY


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of its first appearance."""
    return list(dict.fromkeys(names))


def of_kind(suites: Iterable[Suite], kind: type) -> list[tuple[str, Any]]:
    """(suite name, line) of every measured line of a kind."""
    return [(suite.name, line) for suite in suites for line in suite.measured if isinstance(line, kind)]


def nearest(lines: Sequence[TrainingLine], contender: str, fraction: float) -> TrainingLine | None:
    """The contender's line at a fraction, whatever came of it."""
    for line in lines:
        if line.contender == contender and abs(line.fraction - fraction) < 1e-6:
            return line
    return None
