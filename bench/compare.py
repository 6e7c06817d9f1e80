"""Two results files side by side: ``python -m bench.compare BEFORE.json AFTER.json [--noise 5] [--fail-on-slower]``.

Lines are matched by suite, kind, group and contender. Two times are the same where they differ by less than the noise:
--noise percent, or the spreads (half the interquartile range) of all times that enter, in quadrature, if that is more.
Peaks differ where they do by more than --noise percent.

Where a line was measured in turn with a reference of others' making, it is the ratios to that reference that are
compared, which cancels a machine that became faster or slower. Milliseconds are compared where there is none: where a
line is the reference itself, and where the reference is ours, for a faster reference would make the others look slower.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.lines import AttentionLine, CeilingLine, DecodingLine, InTurnLine, StepLine, TrainingLine
from bench.record import GIB
from bench.results_files import NotResults, Suites, read_suites
from trsd.terminal import at_a_terminal

REFERENCES = ("bare GEMMs", "LSP reference")
REFERENCE_IS_OURS = (AttentionLine, StepLine, DecodingLine)
BY_TIME, BY_RATIO = "ms", "x ref"
SAME, FASTER, SLOWER, FAILS = "same", "faster", "slower", "fails now"
MAY_DIFFER = ("date", "commit")
COLUMNS = ("before", "after", "by", "ratio", "noise", "GiB before", "GiB after", "ratio")
MORE, LESS = "more memory", "less memory"
Key = tuple[str, str, str, str]


class Row(NamedTuple):
    """One line of both files."""

    contender: str
    before: Any
    after: Any
    by: str
    """What was compared: milliseconds, ratios to the reference, or a ceiling's unit."""
    ratio: float | None
    """After, as a multiple of before, of what was compared."""
    noise: float
    """As a share."""
    verdict: str
    """Of the time."""
    memory_verdict: str = ""
    """What is more than noise."""

    @property
    def memory_ratio(self) -> float | None:
        """The peak after as a multiple of the one before."""
        before, after = self.peaks
        return after / before if before and after else None

    @property
    def peaks(self) -> tuple[int | None, int | None]:
        """Bytes before and after."""
        return getattr(self.before, "peak_bytes", None), getattr(self.after, "peak_bytes", None)

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            *(_value(line) for line in (self.before, self.after)),
            self.by,
            _shown(self.ratio, ".3f"),
            "-" if self.ratio is None else f"±{100 * self.noise:.1f} %",
            *(_shown(peak and peak / GIB, ".3f") for peak in self.peaks),
            _shown(self.memory_ratio, ".3f"),
        )


@at_a_terminal()
def main(argv: Sequence[str] | None = None) -> None:
    """Compare from the command line; files that cannot be read exit with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="results file")
    parser.add_argument("after", type=Path, help="results file")
    parser.add_argument("--noise", type=float, default=5.0, help="percent that may always be noise (default: 5)")
    parser.add_argument(
        "--fail-on-slower",
        action="store_true",
        help="exit code 1 where a line is slower or no longer runs",
    )
    args = parser.parse_args(argv)
    if not args.noise >= 0:
        parser.error(f"expected --noise of 0 or more, got {args.noise}")
    try:
        before, after = read_suites(args.before), read_suites(args.after)
    except NotResults as error:
        parser.error(str(error))
    rows = compare(before, after, noise=args.noise / 100)
    for text in (*warnings(before, after), *table(rows), *missing(before, after), *summary(rows)):
        print(text)
    if args.fail_on_slower and not rows:
        sys.exit(1)
    if args.fail_on_slower and any(row.verdict in (SLOWER, FAILS) for row in rows.values()):
        sys.exit(1)


def compare(before: Suites, after: Suites, *, noise: float) -> dict[Key, Row]:
    """A row for every line that both have and one of them has measured; ``noise`` as a share."""
    old, new = _lines(before), _lines(after)
    rows = {
        key: _row(old[key], new[key], noise)
        for key in new
        if key in old and "ok" in (old[key].outcome, new[key].outcome)
    }
    words = {SLOWER: MORE, FASTER: LESS}
    return {
        key: row._replace(memory_verdict=words.get(_verdict(row.memory_ratio, noise), "")) for key, row in rows.items()
    }


def _lines(suites: Suites) -> dict[Key, Any]:
    """Every line by what it is matched by."""
    return {
        (suite.name, type(line).__name__, line.group, line.contender): line
        for suite in suites.values()
        for line in suite.lines
    }


def _row(before: Any, after: Any, least_noise: float) -> Row:
    """The comparison of one line."""
    if before.outcome != "ok" or after.outcome != "ok":
        broke = before.outcome == "ok" and not after.outcome.startswith("not measured")
        return Row(after.contender, before, after, "-", None, 0.0, FAILS if broke else "-")
    if isinstance(after, CeilingLine):
        ratio = after.measured / before.measured if before.measured and after.measured else None
        return Row(after.contender, before, after, after.unit, ratio, least_noise, _verdict(ratio, least_noise, -1))
    by_ratio = _has_foreign_reference(before) and _has_foreign_reference(after)
    noise = max(least_noise, math.hypot(*_spreads(before, by_ratio), *_spreads(after, by_ratio)))
    if by_ratio:
        ratio = after.time_ratio / before.time_ratio
    else:
        ratio = after.milliseconds / before.milliseconds if before.milliseconds and after.milliseconds else None
    by = BY_RATIO if by_ratio else BY_TIME
    return Row(after.contender, before, after, by, ratio, noise, _verdict(ratio, noise))


def _has_foreign_reference(line: Any) -> bool:
    """Whether the line ran in turn with something that is neither itself nor ours."""
    if not isinstance(line, InTurnLine) or isinstance(line, REFERENCE_IS_OURS) or not line.time_ratio:
        return False
    if isinstance(line, TrainingLine) and line.branches is not None:
        return False
    return line.contender not in REFERENCES and line.milliseconds != line.reference_milliseconds


def _spreads(line: Any, with_reference: bool) -> Iterator[float]:
    """Half the interquartile range of each time that enters, as a share of its median; what is unknown is left out."""
    times = [(line.milliseconds, getattr(line, "quartiles", None))]
    if with_reference:
        times.append((line.reference_milliseconds, line.reference_quartiles))
    for median, quartiles in times:
        if median and quartiles:
            yield (quartiles[1] - quartiles[0]) / 2 / median


def _verdict(ratio: float | None, noise: float, direction: int = 1) -> str:
    """Of a time, or with direction -1 of a rate; the same the other way round when files change places."""
    if ratio is None or not 0 < ratio < math.inf:  # NaN is neither
        return "-"
    change = direction * math.log(ratio)
    if abs(change) <= math.log1p(noise):
        return SAME
    return SLOWER if change > 0 else FASTER


def warnings(before: Suites, after: Suites) -> list[str]:
    """A line a fact of the environments that differs: times are then not comparable."""
    differing: dict[tuple[str, str, str], list[str]] = {}
    for name in after:
        if name in before:
            old, new = before[name].environment, after[name].environment
            for fact in dict.fromkeys((*old, *new)):
                values = old.get(fact, "unknown"), new.get(fact, "unknown")
                if fact not in MAY_DIFFER and values[0] != values[1]:
                    differing.setdefault((fact, *values), []).append(name)
    found = [
        f"warning: {fact} differs: {old} before, {new} after ({', '.join(names)})"
        for (fact, old, new), names in differing.items()
    ]
    return [*found, "warning: times of different environments are not comparable"] if found else []


def table(rows: dict[Key, Row]) -> list[str]:
    """Aligned rows under their suite and group, groups in the order of the second file."""
    cells = [row.cells() for row in rows.values()]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    name_width = max((len(row.contender) for row in rows.values()), default=0)
    text, group_before = [], None
    for (suite, _, group, contender), row in rows.items():
        if (suite, group) != group_before:
            group_before = (suite, group)
            text += ["", f"{suite}: {group}", _aligned("", COLUMNS, name_width, widths)]
        verdict = ", ".join(filter(None, (row.verdict, row.memory_verdict)))
        text.append(f"{_aligned(contender, row.cells(), name_width, widths)}  {verdict}")
    return text


def _aligned(name: str, cells: Sequence[str], name_width: int, widths: Sequence[int]) -> str:
    """A line of text: the name to the left, cells to the right."""
    return "  ".join([f"{name:<{name_width}}", *(f"{x:>{width}}" for x, width in zip(cells, widths, strict=True))])


def missing(before: Suites, after: Suites) -> list[str]:
    """The lines that only one file has."""
    old, new = _lines(before), _lines(after)
    text = []
    for which, keys in (
        ("before", [key for key in old if key not in new]),
        ("after", [k for k in new if k not in old]),
    ):
        if keys:
            text += ["", f"only {which}:", *(f"  {suite}: {group}: {name}" for suite, _, group, name in keys)]
    return text


def summary(rows: dict[Key, Row]) -> list[str]:
    """How many lines of each verdict, and how far the references moved that ratios are to."""
    if not rows:
        return ["", "no line was measured in either file that both have"]
    verdicts = [row.verdict for row in rows.values()]
    counts = [f"{verdicts.count(each)} {each}" for each in (FASTER, SAME, SLOWER, FAILS) if each in verdicts]
    counts += [
        f"{count} with {word}"
        for word in (MORE, LESS)
        if (count := [r.memory_verdict for r in rows.values()].count(word))
    ]
    text = ["", f"{len(rows)} lines: {', '.join(counts) or 'nothing to compare'}"]
    moved = [
        row.after.reference_milliseconds / row.before.reference_milliseconds
        for row in rows.values()
        if row.by == BY_RATIO
    ]
    if moved:
        text.append(
            f'"{BY_RATIO}": compared by the ratio to the reference run in turn. The references themselves took '
            f"{statistics.median(moved):.3f} times as long after as before (median of {len(moved)})"
        )
    return text


def _value(line: Any) -> str:
    """Milliseconds or a ceiling's rate; why there are none."""
    if line.outcome != "ok":
        return line.outcome.split(":")[0]
    value = line.measured if isinstance(line, CeilingLine) else line.milliseconds
    return _shown(value, ",.1f" if value and value >= 100 else ".3f")


def _shown(value: float | None, form: str) -> str:
    """A cell."""
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
