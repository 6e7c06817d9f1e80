"""Pictures of horizontal bars: the loss against the bare products, separate sequences against branches."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.contenders import BARE_GEMMS
from bench.lines import InTurnLine, LossLine
from bench.page_figure import (
    BLUE,
    FAINT,
    GREY,
    MARGIN,
    ORANGE,
    SECONDS_FROM,
    TEXT,
    Picture,
    make_figure,
    measured_on,
    save,
    slug,
    with_arrows,
)
from bench.page_groups import (
    OUT_OF_MEMORY,
    branch_settings,
    is_ours,
    memory_times,
    ran_out_of_memory,
    times,
)
from bench.record import grouped
from bench.results_files import Suite

NAME_WIDTH = 120  # characters of a section's name that fit the width
ROW = 0.235  # inches


class Bar(NamedTuple):
    """One contender's bars: of time and of memory."""

    label: str
    color: str
    time: float | str | None
    """A multiple, or a word in its place."""
    memory: float | str | None
    note: str = ""
    """Behind the multiple of time."""


class Row(NamedTuple):
    """A bar, or a section's name without one."""

    height: float
    """Downwards."""
    text: str
    bar: Bar | None = None


def losses(suite: Suite, folder: Path) -> list[Picture]:
    """The loss against the bare products, a picture a shape, a section a loss and kind of head."""
    shapes: dict[str, list[LossLine]] = {}
    for line in suite.lines:
        if isinstance(line, LossLine):
            shapes.setdefault(line.group.split(f", {line.loss},")[0], []).append(line)
    pictures = []
    for shape, lines in shapes.items():
        sections = {
            f"{found[0].loss}, {found[0].head} head": [_loss_bar(line) for line in found if _is_shown(line)]
            for found in grouped(lines).values()
        }
        path = folder / f"loss-{slug(shape)}.png"
        subtitle = measured_on(suite, "forward and backward, in turn with the bare matrix products; ours in blue")
        titles = ("Time, times the bare products", "Peak memory, times the bare products")
        if _draw(sections, path, with_arrows(f"The loss over {shape}"), subtitle, titles):
            pictures.append(Picture(path, f"The loss over {shape}: time and memory against the bare products"))
    return pictures


def _is_shown(line: LossLine) -> bool:
    """The products are the line at 1; what was not measured has no bar."""
    return line.contender != BARE_GEMMS.name and (line.outcome == "ok" or ran_out_of_memory(line))


def _loss_bar(line: LossLine) -> Bar:
    """Multiples of the bare products."""
    failed = OUT_OF_MEMORY if ran_out_of_memory(line) else None
    color = BLUE if is_ours(line.contender) else GREY
    return Bar(line.contender, color, failed or line.time_ratio, failed or line.memory_ratio)


def branches(suite: Suite, folder: Path) -> list[Picture]:
    """Everything of a group against our branches, a section a group; settings at several K are drawn as curves."""
    sections = {}
    for group in (groups[0] for groups in branch_settings(suite).values() if len(groups) == 1):
        name = with_arrows(group.group)
        sections[name] = [_branch_bar(line, group.ours, BLUE) for line in group.shared]
        sections[name] += [_branch_bar(line, group.ours, ORANGE) for line in group.separate]
    path = folder / f"branches-{slug(suite.name)}.png"
    subtitle = measured_on(suite, "medians; blue runs once what sequences begin with, orange runs each sequence alone")
    titles = ("Time, times our branches", "Peak memory, times our branches")
    if not _draw(sections, path, f"{suite.name}: branches and separate sequences", subtitle, titles):
        return []
    return [Picture(path, f"{suite.name}: time and memory of separate sequences against branches")]


def _branch_bar(line: InTurnLine, ours: InTurnLine, color: str) -> Bar:
    """Multiples of our branches, and the time itself."""
    if ran_out_of_memory(line):
        return Bar(line.contender, color, OUT_OF_MEMORY, OUT_OF_MEMORY)
    return Bar(line.contender, color, times(line, ours), memory_times(line, ours), note=f"   {_duration(line)}")


def _duration(line: InTurnLine) -> str:
    """With three digits or so."""
    ms = line.milliseconds
    if ms >= SECONDS_FROM:
        return f"{ms / 1000:,.2f} s"
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"


def _draw(sections: dict[str, list[Bar]], path: Path, title: str, subtitle: str, panels: tuple[str, str]) -> bool:
    """Time beside memory where it is known; False and no picture where there is no time."""
    sections = {name: bars for name, bars in sections.items() if any(isinstance(bar.time, float) for bar in bars)}
    if not sections:
        return False
    rows, end = _rows(sections)
    shown = [(panels[0], lambda bar: bar.time)]
    if any(isinstance(row.bar.memory, float) for row in rows if row.bar):
        shown.append((panels[1], lambda bar: bar.memory))
    figure, all_axes = make_figure(len(shown), 1.25 + ROW * end, title, subtitle)
    for axes, (panel, value_of) in zip(all_axes, shown, strict=True):
        axes.set_title(panel, loc="left", fontsize=10.5)
        axes.set(ylim=(end - 0.6, -0.7), yticks=[])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.axvline(1, color=TEXT, lw=1, ls="--", zorder=3)
        _bars(axes, rows, value_of, notes=axes is all_axes[0])
    _names(figure, all_axes[0], rows)
    save(figure, path)
    return True


def _rows(sections: dict[str, list[Bar]]) -> tuple[list[Row], float]:
    """The rows, and the height of them all."""
    rows, height = [], 0.0
    for name, bars in sections.items():
        wrapped = textwrap.wrap(name, NAME_WIDTH)
        rows.append(Row(height + (len(wrapped) - 1) / 2, "\n".join(wrapped)))
        height += len(wrapped)
        for bar in bars:
            rows.append(Row(height, bar.label, bar))
            height += 1
        height += 0.5
    return rows, height


def _bars(axes: Any, rows: Sequence[Row], value_of: Callable[[Bar], Any], *, notes: bool) -> None:
    """Bars with their multiples behind them."""
    values = [(row.height, row.bar, value_of(row.bar)) for row in rows if row.bar]
    largest = max([1.0, *(value for _, _, value in values if isinstance(value, float))])
    longest = max(len(bar.note) for _, bar, _ in values) if notes else 0
    axes.set_xlim(0, largest * (1.14 + 0.03 * longest))
    for height, bar, value in values:
        is_known = isinstance(value, float)
        if is_known:
            axes.barh(height, value, height=0.72, color=bar.color)
        text = f"{value:.2f}" + (bar.note if notes else "") if is_known else value or "not counted"
        axes.annotate(
            text,
            (value if is_known else 0, height),
            (4, -0.5),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=TEXT if is_known else FAINT,
            zorder=4,
            bbox=dict(facecolor="white", edgecolor="none", pad=0.4),
        )


def _names(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    """Contenders as the first panel's tick labels; sections' names from the left edge over both panels."""
    from matplotlib.transforms import blended_transform_factory

    bars = [row for row in rows if row.bar]
    axes.set_yticks([row.height for row in bars], [row.text for row in bars])
    axes.tick_params(axis="y", length=0, labelsize=9)
    place = blended_transform_factory(figure.transFigure, axes.transData)
    for row in rows:
        if row.bar is None:
            text = figure.text(
                MARGIN,
                row.height,
                row.text,
                transform=place,
                va="center",
                fontsize=9,
                fontweight="bold",
                color=TEXT,
                bbox=dict(facecolor="white", edgecolor="none", pad=1.5),
            )
            text.set_in_layout(False)  # or a long name would push the panels apart
