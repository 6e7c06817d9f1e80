"""Pictures of peak memory and time against the fraction kept, and against the number of branches."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bench.lines import InTurnLine, TrainingLine
from bench.page_figure import (
    FAINT,
    OTHERS,
    OURS,
    SECONDS_FROM,
    TEXT,
    Picture,
    make_figure,
    measured_on,
    save,
    slug,
    style,
    with_arrows,
)
from bench.page_groups import branch_settings, fraction_settings, in_order, is_ours, ran_out_of_memory
from bench.record import GIB
from bench.results_files import Suite

MIB = 2**20
COMPILED = ", compiled"
HOW = "medians, bands between the quartiles"
Points = Sequence[tuple[float, InTurnLine]]


class Curves(NamedTuple):
    """Memory and time of several contenders against something."""

    title: str
    subtitle: str
    xlabel: str
    points: dict[str, Points]
    """Of each contender, in order; lines that ran out of memory among them."""
    styles: dict[str, dict[str, Any]]

    @property
    def lines(self) -> list[tuple[float, InTurnLine]]:
        """(place, line) of every contender."""
        return [point for points in self.points.values() for point in points]

    @property
    def places(self) -> list[float]:
        """Where something was measured."""
        return sorted({x for x, line in self.lines if line.outcome == "ok" and (line.milliseconds or line.peak_bytes)})


def against_fraction(suite: Suite, folder: Path) -> list[Picture]:
    """A picture a setting of training lines, such as a pair of models."""
    styles = _styles(line.contender for line in suite.lines if isinstance(line, TrainingLine))
    pictures = []
    for setting, lines in fraction_settings(suite.lines).items():
        points = {
            name: [(line.fraction, line) for line in lines if line.contender == name]
            for name in in_order(line.contender for line in lines)
        }
        xlabel = "fraction of each sequence that is kept"
        curves = Curves(with_arrows(setting), measured_on(suite, HOW), xlabel, points, styles)
        path = folder / f"fractions-{slug(setting)}.png"
        if _draw(curves, path):
            pictures.append(Picture(path, f"{setting}: peak memory and step time against the fraction kept"))
    return pictures


def against_branches(suite: Suite, folder: Path) -> list[Picture]:
    """A picture a setting that was measured at several numbers of branches."""
    pictures = []
    for setting, groups in branch_settings(suite).items():
        points: dict[str, list[tuple[float, InTurnLine]]] = {}
        for group in groups:
            for line in (*group.shared, *group.separate):
                points.setdefault(line.contender, []).append((group.num_branches, line))
        separate = {line.contender for group in groups for line in group.separate}
        styles = _styles(points, warm=separate)
        xlabel = "K, cuts of a sequence"
        curves = Curves(with_arrows(setting), measured_on(suite, HOW), xlabel, points, styles)
        path = folder / f"branches-by-k-{slug(suite.name)}-{slug(setting)}.png"
        if _draw(curves, path):
            pictures.append(Picture(path, f"{setting}: peak memory and time against the number of branches"))
    return pictures


def _styles(contenders: Iterable[str], warm: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """A colour and a marker each: warm ones for who is named, or for others than ours.

    Who is compiled looks like who is not, with a dashed line and hollow markers.
    """
    found: dict[str, dict[str, Any]] = {}
    places = {OURS: 0, OTHERS: 0}
    for name in in_order(contenders):
        plain = name.removesuffix(COMPILED)
        if plain != name and plain in found:
            found[name] = found[plain] | {"ls": "--", "mfc": "white"}
            continue
        is_warm = not is_ours(name) if warm is None else name in warm
        palette = OTHERS if is_warm else OURS
        found[name] = style(palette, places[palette])
        places[palette] += 1
    return found


def _draw(curves: Curves, path: Path) -> bool:
    """Memory beside time; False and no picture where nothing was measured at two places."""
    if len(curves.places) < 2:
        return False
    figure, (memory, time) = make_figure(2, 4.4, curves.title, curves.subtitle)
    _memory_panel(memory, curves)
    _time_panel(time, curves)
    for axes in (memory, time):
        _mark_out_of_memory(axes, curves)
        axes.set_xlabel(curves.xlabel, fontsize=9.5)
        axes.set_xlim(0, 1.05 * max(x for x, _ in curves.lines))
        if all(float(x).is_integer() for x in curves.places):
            axes.set_xticks(curves.places, [f"{x:.0f}" for x in curves.places])
    _legend(figure, _handles(curves))
    save(figure, path)
    return True


def _legend(figure: Any, handles: list[Any]) -> None:
    """Below the panels, in as many columns as fit the figure."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, columnspacing=1.6
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _handles(curves: Curves) -> list[Any]:
    """The legend's entries: who has a curve or a cross, and what a cross means."""
    from matplotlib.lines import Line2D

    found = [
        Line2D([], [], lw=1.8, ms=6, label=name, **curves.styles[name])
        for name, points in curves.points.items()
        if any(line.outcome == "ok" or ran_out_of_memory(line) for _, line in points)
    ]
    if any(ran_out_of_memory(line) for _, line in curves.lines):
        found.append(Line2D([], [], lw=0, ms=7, mew=2, marker="x", color=TEXT, label="out of memory"))
    return found


def _memory_panel(axes: Any, curves: Curves) -> None:
    """Peaks, in GiB where one is as large."""
    peaks = [line.peak_bytes for _, line in curves.lines if line.peak_bytes]
    unit, name = (GIB, "GiB") if max(peaks, default=GIB) >= GIB else (MIB, "MiB")
    for contender, points in curves.points.items():
        known = [(x, line.peak_bytes / unit) for x, line in points if line.peak_bytes]
        axes.plot([x for x, _ in known], [peak for _, peak in known], ms=5, lw=1.8, **curves.styles[contender])
    _label(axes, "Peak memory", name, known=bool(peaks))


def _time_panel(axes: Any, curves: Curves) -> None:
    """Medians, and bands between the quartiles of neighbouring places."""
    known = [line.milliseconds for _, line in curves.lines if line.milliseconds]
    unit, name = (1000, "seconds") if max(known, default=0) >= SECONDS_FROM else (1, "milliseconds")
    for contender, points in curves.points.items():
        look = curves.styles[contender]
        timed = [(x, line) for x, line in points if line.milliseconds]
        axes.plot([x for x, _ in timed], [line.milliseconds / unit for _, line in timed], ms=5, lw=1.8, **look)
        for (x, line), (next_x, following) in pairwise(timed):
            if line.quartiles and following.quartiles:
                low, high = ([each.quartiles[end] / unit for each in (line, following)] for end in (0, 1))
                axes.fill_between([x, next_x], low, high, color=look["color"], alpha=0.22, lw=0)
    _label(axes, "Time", name, known=bool(known))


def _label(axes: Any, title: str, unit: str, *, known: bool) -> None:
    """An axis from 0 with room on top, or a word where there is nothing to show."""
    axes.set_title(title, loc="left", fontsize=10.5)
    if known:
        axes.set_ylabel(unit, fontsize=9.5)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axes.text(0.5, 0.5, "not known", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_yticks([])


def _mark_out_of_memory(axes: Any, curves: Curves) -> None:
    """Crosses at the top, a row a contender."""
    row = 0
    for contender, points in curves.points.items():
        if failed := [x for x, line in points if ran_out_of_memory(line)]:
            axes.plot(
                failed,
                [0.98 - 0.05 * row] * len(failed),
                "x",
                color=curves.styles[contender]["color"],
                ms=7,
                mew=2,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            row += 1
