"""The results page's first figures, computed from the lines alone: what was not measured is not said."""

from collections.abc import Callable, Sequence

from bench.lines import LossLine, TrainingLine
from bench.page_groups import (
    OUT_OF_MEMORY,
    BranchGroup,
    branch_groups,
    fraction_settings,
    in_order,
    is_ours,
    memory_times,
    nearest,
    of_kind,
    ran_out_of_memory,
    times,
)
from bench.page_markdown import table
from bench.record import shown
from bench.results_files import Suites

WHOLE, HALF = 1.0, 0.5
REFERENCE, BEST = "LSP reference", "LSP reference, best settings"
TRAINING_COLUMNS = (
    *("lines of", "contender", "whole : halves, time", "whole : halves, memory"),
    *("halves : halves, time", "halves : halves, memory"),
)


def headlines(suites: Suites) -> list[str]:
    """Markdown lines; none where nothing was measured that they speak of."""
    parts = [_training(suites), _branches(suites), [*_losses(suites), *_plans(suites)]]
    return [line for part in parts if part for line in (*part, "")][:-1]


def _training(suites: Suites) -> list[str]:
    """A table: ours on whole sequences and on halves against the reference on halves, a row a setting and contender."""
    rows = []
    for suite in suites.values():
        for setting, lines in fraction_settings(suite.lines).items():
            for contender in in_order(line.contender for line in lines if is_ours(line.contender)):
                cells = _training_cells(lines, contender)
                if any(cell != "-" for cell in cells):
                    rows.append([f"{suite.name}: {setting}", contender, *cells])
    if not rows:
        return []
    return [
        f"**Training.** Step time and peak memory of ours as multiples of the {REFERENCE}'s, which trains on halves of "
        f"sequences (f = {HALF}); in brackets, of its best settings'. Halves and halves were measured in turn; whole "
        "sequences (f = 1) and halves are medians of two groups.",
        "",
        *table(TRAINING_COLUMNS, rows, text_columns=2),
    ]


def _training_cells(lines: Sequence[TrainingLine], contender: str) -> list[str]:
    """Time and memory, ours at f = 1 and then at f = 0.5."""
    cells = []
    for fraction in (WHOLE, HALF):
        ours = nearest(lines, contender, fraction)
        for ratio in (_time_of_halves, memory_times):
            against = [_ratio_cell(ours, nearest(lines, name, HALF), ratio) for name in (REFERENCE, BEST)]
            cells.append(against[0] if against[1] == "-" else f"{against[0]} ({against[1]})")
    return cells


def _time_of_halves(ours: TrainingLine, reference: TrainingLine) -> float | None:
    """By the reference that ran in turn with both where their groups are the same; else of medians."""
    if not ours.milliseconds or not reference.milliseconds:
        return None
    return times(ours, reference) if ours.group == reference.group else ours.milliseconds / reference.milliseconds


def _ratio_cell(
    ours: TrainingLine | None,
    reference: TrainingLine | None,
    ratio: Callable[[TrainingLine, TrainingLine], float | None],
) -> str:
    """A ratio, or who of the two ran out of memory."""
    if ours is None or reference is None:
        return "-"
    for name, line in (("ours", ours), ("reference", reference)):
        if ran_out_of_memory(line):
            return f"{name} {OUT_OF_MEMORY}"
    value = ratio(ours, reference) if ours.outcome == reference.outcome == "ok" else None
    return "-" if value is None else f"{value:.2f}"


def _losses(suites: Suites) -> list[str]:
    """Best and worst of our loss against the bare products, in time and in memory."""
    lines = [(suite, line) for suite, line in of_kind(suites.values(), LossLine) if is_ours(line.contender)]
    bullets = []
    for quantity, attribute in (("Time", "time_ratio"), ("Peak memory", "memory_ratio")):
        known = sorted((x for x in lines if getattr(x[1], attribute)), key=lambda x: getattr(x[1], attribute))
        if not known:
            continue
        ends = [("at best ", known[0]), ("at worst ", known[-1])] if len(known) > 1 else [("", known[0])]
        said = ", ".join(
            f"{how}**{getattr(line, attribute):.2f}** times ({line.contender}; {line.group})" for how, (_, line) in ends
        )
        count = "one line" if len(known) == 1 else f"{len(known)} lines"
        bullets.append(f"- {quantity} of our loss against the bare products: {said}; {count} of {known[0][0]}.")
    return bullets


def _branches(suites: Suites) -> list[str]:
    """A table: our branches against the fastest that ran the same sequences separately, a row a group."""
    rows = []
    for suite in suites.values():
        for group in branch_groups(suite):
            rows.append([f"{suite.name}: {group.group}", *_branch_cells(group)])
    if not rows:
        return []
    return [
        "**Branches.** Time and peak memory of branches as multiples of those of the same sequences one beside the "
        "other, by the fastest that runs them so.",
        "",
        *table(("lines of", "branches", "separate", "time", "memory"), rows, text_columns=3),
    ]


def _branch_cells(group: BranchGroup) -> list[str]:
    """Who is held against whom, and time and memory."""
    separate = group.fastest_separate
    if separate is None:
        return [
            group.ours.contender,
            ", ".join(line.contender for line in group.separate),
            OUT_OF_MEMORY,
            OUT_OF_MEMORY,
        ]
    memory = shown(memory_times(group.ours, separate), 2)
    return [group.ours.contender, separate.contender, f"{times(group.ours, separate):.2f}", memory]


def _plans(suites: Suites) -> list[str]:
    """How near ``trsd.plan`` came to what was measured."""
    bullets = []
    for name, planned, measured in (
        ("peak memory", "planned_bytes", "peak_bytes"),
        ("step time", "planned_milliseconds", "milliseconds"),
    ):
        ratios = [
            (suite, getattr(line, planned) / getattr(line, measured))
            for suite, line in of_kind(suites.values(), TrainingLine)
            if getattr(line, planned) and getattr(line, measured)
        ]
        if len(ratios) > 1:
            names, values = in_order(suite for suite, _ in ratios), [ratio for _, ratio in ratios]
            bullets.append(
                f"- The {name} that `trsd.plan` predicts is **{min(values):.2f}** to **{max(values):.2f}** times the "
                f"measured one, over {len(values)} lines of {' and '.join(names)}."
            )
    return bullets
