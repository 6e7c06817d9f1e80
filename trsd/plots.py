"""Pictures: accuracy against thinking budget, and the terms of the loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_INSIDE = 12  # characters of a label
COLORS = ("#8a8f98", "#0b6bcb", "#c2410c", "#15803d")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=150, layout="constrained")
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path)
    plt.close(figure)


def plot_curves(results: dict[str, dict[str, Any]], path: Path, *, title: str | None = None) -> None:
    """Accuracy against budget, one curve with its 95 % band per labelled evaluation result."""
    figure, axes = _figure(7.0, 4.2)
    for (label, result), color in zip(results.items(), COLORS * (1 + len(results) // len(COLORS)), strict=False):
        rows = result["budgets"]
        tokens = [row["tokens"] for row in rows]
        axes.fill_between(tokens, [r["low"] for r in rows], [r["high"] for r in rows], color=color, alpha=0.15, lw=0)
        area = "" if result["auc"] is None else f"  (area {result['auc']:.2f})"
        axes.plot(tokens, [row["accuracy"] for row in rows], "o-", color=color, ms=5, lw=2, label=label + area)
        if "unconstrained" in result:
            axes.axhline(result["unconstrained"]["accuracy"], color=color, lw=1, ls=":")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03))
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    style = dict(frameon=False, title="dotted: unconstrained", title_fontsize=8, alignment="left")
    if max(map(len, results)) > MOST_INSIDE:
        figure.legend(loc="outside upper left", **style)  # inside it would hide a curve
    else:
        axes.legend(loc="best", **style)
    _save(figure, path)


def plot_lengths(lengths: dict[str, Sequence[int]], path: Path) -> None:
    """How long thinking is, a histogram for each labelled list of token counts, over the same bins; dotted: medians."""
    import numpy as np

    figure, axes = _figure(7.0, 2.8)
    bins = np.histogram_bin_edges([count for counts in lengths.values() for count in counts], bins=30)
    for (label, counts), color in zip(lengths.items(), COLORS, strict=False):
        axes.hist(counts, bins=bins, color=color, alpha=0.45, label=label)
        axes.axvline(float(np.median(counts)), color=color, lw=1, ls=":")
    axes.set(xlabel="unconstrained thinking (tokens)", ylabel="answers")
    axes.legend(frameon=False, loc="best", title="dotted: median", title_fontsize=8, alignment="left")
    _save(figure, path)


def plot_loss(
    steps: Sequence[int],
    terms: dict[str, Sequence[float]],
    path: Path,
    *,
    validation: Mapping[int, float] | None = None,
) -> None:
    """The loss's terms against the optimizer step, one labelled line each, on a logarithmic axis.

    ``validation``: the loss of traces held out, by step.
    """
    validation = validation or {}
    figure, axes = _figure(7.0, 2.8)
    for (label, values), color in zip(terms.items(), COLORS[1:], strict=False):
        axes.plot(steps, values, color=color, lw=1.4, label=label)
    if validation:
        label = "traces held out: loss"
        axes.plot(list(validation), list(validation.values()), "o-", color=COLORS[0], ms=4, lw=1.4, label=label)
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    if all(value > 0 for values in (*terms.values(), validation.values()) for value in values):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_sweep(points: Sequence[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Accuracy against the fraction kept, what it costs relative to the whole, and the loss of every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, cost, loss) = plt.subplots(1, 3, figsize=(13.0, 4.0), dpi=150, layout="constrained")
    for axes in (curve, cost, loss):
        _plain(axes)
    _plot_fractions(curve, points, summary)
    first = next(iter(summary["curves"]))
    shown = sorted((p for p in points if p["side"] == first or p["fraction"] == 1.0), key=lambda p: p["fraction"])
    names = {
        "tokens_per_step": "tokens",
        "teraflops_per_step": "operations",
        "step_seconds": "step time",
        "peak_memory_gib": "peak memory",
    }
    for (name, label), color in zip(names.items(), COLORS, strict=True):
        values = [p[name] / shown[-1][name] for p in shown]
        cost.plot([p["fraction"] for p in shown], values, "o-", color=color, ms=4, lw=1.6, label=label)
    largest = "the whole" if shown[-1]["fraction"] == 1.0 else f"{shown[-1]['fraction']:g}"
    cost.set(xlabel="fraction of each sequence kept", ylabel=f"relative to {largest}", ylim=(0, None))
    cost.legend(frameon=False, fontsize=8)
    shades = plt.get_cmap("viridis")
    for p in shown:
        smooth = _moving_mean(p["losses"], max(1, len(p["losses"]) // 20))
        loss.plot(
            range(1, len(smooth) + 1), smooth, lw=1.2, color=shades(0.9 * p["fraction"]), label=f"{p['fraction']:g}"
        )
    loss.set(xlabel="optimizer step", ylabel="training loss (nats per learnt token)", yscale="log")
    for which in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    loss.legend(frameon=False, fontsize=7, title="kept", title_fontsize=7, ncols=2)
    _save(figure, path)


def _plot_fractions(axes: Any, points: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """One accuracy curve with its band per side, the knee, and the student before training."""
    for (side, curve), color in zip(summary["curves"].items(), (COLORS[1], COLORS[2], COLORS[3]), strict=False):
        rows = sorted((p for p in points if p["side"] == side or p["fraction"] == 1.0), key=lambda p: p["fraction"])
        shares = [p["fraction"] for p in rows]
        axes.fill_between(shares, [p["low"] for p in rows], [p["high"] for p in rows], color=color, alpha=0.15, lw=0)
        label = side if curve["knee"] is None else f"{side}, knee at {curve['knee']:g}"
        axes.plot(shares, [p["accuracy"] for p in rows], "o-", color=color, ms=5, lw=2, label=label)
        if curve["knee"] is not None:
            axes.axvline(curve["knee"], color=color, lw=1, ls="--")
    axes.axhline(summary["before"]["accuracy"], color=COLORS[0], lw=1, ls=":", label="before training")
    axes.set(xlabel="fraction of each sequence kept", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the ``width - 1`` before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
