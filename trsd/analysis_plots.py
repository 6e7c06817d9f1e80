"""One picture of a set of traces: sections, where answers are first derived, lengths, and reflection cues."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trsd.plots import COLORS, _save
from trsd.trace_measures import Measures

GREY, BLUE, ORANGE, GREEN = COLORS
SECTION_COLORS = {"prompt": GREY, "cot": BLUE, "answer": ORANGE}
NAMES = {"prompt": "prompt", "cot": "CoT", "answer": "answer"}
MOST_CUES = 8
TOO_NARROW = 0.07  # of the bar: the share's text would not fit


def plot_analysis(summary: Mapping[str, Any], measures: Sequence[Measures], path: Path) -> None:
    """Four panels of ``summary`` and the traces it is of."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11.0, 7.0), dpi=150, layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
    _sections(axes[0, 0], summary["sections"])
    _derivation(axes[0, 1], summary["first_derivation"], measures)
    _lengths(axes[1, 0], measures)
    _reflections(axes[1, 1], summary["reflections"])
    name = Path(summary["data"]).name
    figure.suptitle(f"{name}: {summary['num_traces']:,} traces", x=0.01, ha="left", fontsize=13, fontweight="bold")
    _save(figure, path)


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5)


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _sections(axes: Any, sections: Mapping[str, Any]) -> None:
    """Mean shares as one bar, mean and median lengths below their names."""
    left = 0.0
    for name, color in SECTION_COLORS.items():
        share = sections[name]["mean_share"]
        axes.barh(0, share, left=left, color=color, height=0.5)
        narrow = share < TOO_NARROW
        axes.text(
            min(max(left + share / 2, 0.02), 0.98),
            0.32 if narrow else 0,
            f"{share:.0%}" if share >= 0.01 else f"{share:.1%}",
            ha="center",
            va="bottom" if narrow else "center",
            color=color if narrow else "white",
            fontsize=11,
            fontweight="bold",
        )
        left += share
    for place, (name, color) in enumerate(SECTION_COLORS.items()):
        row = sections[name]
        x = (0.02, 0.36, 0.70)[place]
        axes.text(x, -0.62, NAMES[name], color=color, fontsize=10, fontweight="bold", va="center")
        said = f"mean {row['mean']:,.0f}\nmedian {row['median']:,.0f}\n{row['min']:,} to {row['max']:,}"
        axes.text(x, -0.78, said, fontsize=9, va="top", color="#374151")
    axes.set(xlim=(0, 1), ylim=(-1.45, 0.7), yticks=[], xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    _title(axes, "Tokens by section, mean share of a trace")


def _derivation(axes: Any, derivation: Mapping[str, Any], measures: Sequence[Measures]) -> None:
    """Histogram of the position in the CoT, with its median; the full sequence as an outline."""
    of = derivation["num_found"] + derivation["num_not_found"]
    _title(axes, f"First derivation of the answer (found in {derivation['num_found']:,} of {of:,})")
    axes.set(xlabel="position", xlim=(0, 1), ylabel="traces")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if not derivation["num_found"]:
        axes.text(0.5, 0.5, "none found", ha="center", va="center", transform=axes.transAxes, color=GREY)
        return
    bins = np.linspace(0, 1, 26)
    for key, label, style in (
        ("in_cot", "in the CoT", dict(color=BLUE, alpha=0.85)),
        ("in_full", "in the full sequence", dict(color=ORANGE, histtype="step", lw=1.6)),
    ):
        values = [getattr(m, f"derivation_{key}") for m in measures if m.derivation_tokens is not None]
        median = derivation[key]["median"]
        axes.hist(values, bins=bins, label=f"{label}, median {median:.0%}", **style)
        axes.axvline(median, ymax=0.8, color=style["color"], lw=1.2, ls="--")  # up to the legend
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(_thousands)
    low, high = axes.get_ylim()
    axes.set_ylim(low, 1.25 * high)  # room for the legend
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _lengths(axes: Any, measures: Sequence[Measures]) -> None:
    """Distribution of each section's length, on one logarithmic axis."""
    smallest = min(min(m.prompt_tokens, m.cot_tokens, m.answer_tokens) for m in measures)
    largest = max(m.total_tokens for m in measures)
    bins = np.geomspace(0.8 * smallest, 1.1 * largest, 40)
    for name, color in SECTION_COLORS.items():
        values = [getattr(m, f"{name}_tokens") for m in measures]
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins=bins, weights=weights, color=color, alpha=0.25)
        axes.hist(values, bins=bins, weights=weights, color=color, histtype="step", lw=1.5, label=NAMES[name])
    axes.set_xscale("log")
    axes.set(xlabel="tokens", ylabel="share of traces", xlim=(bins[0], bins[-1]))
    axes.xaxis.set_major_formatter(_thousands)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    _title(axes, "Lengths")


def _reflections(axes: Any, reflections: Mapping[str, Any]) -> None:
    """The most frequent cues, and how much of each stands before the first derivation."""
    _title(axes, f"Self-reflection cues, {reflections['mean_per_trace']:.3g} a trace")
    cues = list(reflections["by_cue"].items())[:MOST_CUES]
    if not cues:
        axes.text(0.5, 0.5, "no cues", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set(xticks=[], yticks=[])
        return
    before = [reflections["by_cue_before"].get(cue, 0) for cue, _ in cues]
    rest = [count - early for (_, count), early in zip(cues, before, strict=True)]
    places = range(len(cues))
    axes.barh(places, before, color=BLUE, height=0.65, label="before the first derivation")
    axes.barh(places, rest, left=before, color="#c7cbd1", height=0.65, label="after it, or none found")
    for place, (_, count) in enumerate(cues):
        axes.text(count, place, f" {count:,}", va="center", fontsize=9, color="#374151")
    axes.set_yticks(list(places), [cue for cue, _ in cues])
    axes.xaxis.set_major_formatter(_thousands)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="occurrences", xlim=(0, 1.12 * cues[0][1]), ylim=(max(len(cues), 4) - 0.4, -0.6))
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
