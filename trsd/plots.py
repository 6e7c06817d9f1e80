"""Pictures: accuracy against thinking budget, and the terms of the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#8a8f98", "#0b6bcb", "#c2410c", "#15803d")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=150, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


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
        axes.axhline(result["unconstrained"]["accuracy"], color=color, lw=1, ls=":")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03))
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, loc="best", title="dotted: unconstrained", title_fontsize=8, alignment="left")
    _save(figure, path)


def plot_loss(steps: Sequence[int], terms: dict[str, Sequence[float]], path: Path) -> None:
    """The loss's terms against the optimizer step, one labelled line each, on a logarithmic axis."""
    figure, axes = _figure(7.0, 2.8)
    for (label, values), color in zip(terms.items(), COLORS[1:], strict=False):
        axes.plot(steps, values, color=color, lw=1.4, label=label)
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    if all(value > 0 for values in terms.values() for value in values):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)
