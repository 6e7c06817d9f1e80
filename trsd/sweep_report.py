"""What a sweep over fractions shows: tables as json and markdown, and one picture (LSP, arXiv 2512.21002).

    accuracy against fraction with its knee     their Figure 3
    retention accuracy(f) / accuracy(1)         Tables 3 and 4
    tokens, step time, memory, operations       Figure 6
    left against right at each fraction         Figure 4, Tables 7 to 11
    relative loss gap (L_a - L_b) / L_b         averaged over steps, and at the last step

The losses compared are the training losses, each over the tokens its own run kept, as in the paper: a run on other
tokens has another loss to reach, so a gap says less than the accuracies beside it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trsd.files import write_json, write_text
from trsd.plots import plot_sweep
from trsd.recipe import Recipe

Point = dict[str, Any]


def curve_of(points: Sequence[Point], side: str) -> list[Point]:
    """The points of one side by rising fraction, the whole sequence, which all sides share, at the end."""
    return sorted((p for p in points if p["side"] == side or p["fraction"] == 1.0), key=lambda p: p["fraction"])


def knee(fractions: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Where the curve stops to rise steeply (Kneedle, Satopaa et al. 2011), None where it has no knee.

    Kneedle's knees are the peaks of the normalised curve over its chord. A curve that rises late has false ones on or
    below the chord, so the highest peak is taken, and only above.
    """
    if len(fractions) < 3 or min(accuracy) == max(accuracy):
        return None
    try:
        from kneed import KneeLocator
    except ImportError:
        print("warning: the knee of the curve needs kneed: pip install 'trsd[analysis]'", file=sys.stderr)
        return None
    found = KneeLocator(fractions, accuracy, curve="concave", direction="increasing", online=True)
    over_chord = dict(zip(found.x.tolist(), found.y_difference.tolist(), strict=True))
    best = max(found.all_knees, key=over_chord.get, default=None)
    return float(best) if best is not None and over_chord[best] > 0 else None


def loss_gap(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """(L_a - L_b) / L_b, its mean over the steps that both runs have and its value at the last of them."""
    gaps = [(one - other) / other for one, other in zip(losses, reference, strict=False) if other]
    return {"mean": sum(gaps) / len(gaps), "last": gaps[-1]} if gaps else {}


def summarise(points: Sequence[Point], before: dict[str, Any]) -> dict[str, Any]:
    """The figures of a sweep, ready for json; losses are left to the runs' own metrics.

    Args:
        points: one for each setting, as ``sweep.point`` makes them.
        before: the unconstrained evaluation of the untrained student.
    """
    whole = next((point for point in points if point["fraction"] == 1.0), None)
    rows = []
    for point in points:
        row = {name: value for name, value in point.items() if name != "losses"}
        if whole is not None:
            row["retention"] = point["accuracy"] / whole["accuracy"] if whole["accuracy"] else None
            row["loss_gap_to_whole"] = loss_gap(point["losses"], whole["losses"])
        rows.append(row)
    curves = {}
    for side in dict.fromkeys(point["side"] for point in points if point["fraction"] < 1.0 or len(points) == 1):
        curve = curve_of(points, side)
        kept = [p["accuracy"] / whole["accuracy"] for p in curve[:-1]] if whole and whole["accuracy"] else []
        curves[side] = {
            "fractions": [p["fraction"] for p in curve],
            "knee": knee([p["fraction"] for p in curve], [p["accuracy"] for p in curve]),
            "retention": {"mean": sum(kept) / len(kept), "min": min(kept), "max": max(kept)} if kept else None,
        }
    by_setting = {(point["side"], point["fraction"]): point for point in points}
    versus = []
    for (side, share), point in by_setting.items():
        left = by_setting.get(("left", share))
        if side == "left" or left is None:
            continue
        versus.append(
            {
                "fraction": share,
                "side": side,
                "accuracy_left": left["accuracy"],
                f"accuracy_{side}": point["accuracy"],
                "loss_gap": loss_gap(left["losses"], point["losses"]),
            }
        )
    return {
        "before": {"accuracy": before["accuracy"], "termination_rate": before["termination_rate"]},
        "points": rows,
        "curves": curves,
        "sides": versus,
    }


def markdown(summary: dict[str, Any], recipe: Recipe) -> str:
    """The figures of a sweep as tables."""
    lines = [
        f"# {recipe.method.upper()}: {recipe.model_name_or_path}, from {recipe.teacher_model_name_or_path or 'text'}",
        "",
        f"Before training: accuracy {summary['before']['accuracy']:.3f}. Intervals are 95 %, over questions.",
        "",
        "| kept | accuracy | retention | stated anywhere | ends by itself | loss against whole: mean, last |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["points"]:
        retention = "" if row.get("retention") is None else f"{row['retention']:.1%}"
        lines.append(
            f"| {_name(row)} | {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {retention} | "
            f"{row['accuracy_of_whole_text']:.3f} | {row['termination_rate']:.0%} | "
            f"{_gap(row.get('loss_gap_to_whole'))} |"
        )
    for side, curve in summary["curves"].items():
        said = [] if curve["knee"] is None else [f"knee at {curve['knee']:g}"]
        said += [f"retention below the whole {_spread(curve['retention'])}"] if curve["retention"] else []
        lines += ["", f"Curve of the {side}: " + "; ".join(said) + "."] if said else []
    lines += ["", "| kept | tokens a step | TFLOP a step | step, s | peak memory, GiB |", "|---|---|---|---|---|"]
    for row in summary["points"]:
        lines.append(
            f"| {_name(row)} | {row['tokens_per_step']:,.0f} | {row['teraflops_per_step']:.4g} | "
            f"{row['step_seconds']:.3g} | {row['peak_memory_gib']:.2f} |"
        )
    if summary["sides"]:
        lines += ["", "| fraction | left | other side | loss of left against it: mean, last |", "|---|---|---|---|"]
        for row in summary["sides"]:
            other = f"{row['side']} {row['accuracy_' + row['side']]:.3f}"
            lines.append(f"| {row['fraction']:g} | {row['accuracy_left']:.3f} | {other} | {_gap(row['loss_gap'])} |")
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    return "whole" if row["fraction"] == 1.0 else f"{row['side']} {row['fraction']:g}"


def _gap(gap: dict[str, float] | None) -> str:
    return f"{gap['mean']:+.1%}, {gap['last']:+.1%}" if gap else ""


def _spread(values: dict[str, float]) -> str:
    return f"mean {values['mean']:.1%}, least {values['min']:.1%}, most {values['max']:.1%}"


def write_sweep(output_dir: Path, recipe: Recipe, points: Sequence[Point], before: dict[str, Any]) -> dict[str, Any]:
    """Write sweep.json, sweep.md and sweep.png into ``output_dir``; returns the figures."""
    summary = summarise(points, before)
    write_json(output_dir / "sweep.json", summary)
    text = markdown(summary, recipe)
    write_text(output_dir / "sweep.md", text)
    plot_sweep(points, summary, output_dir / "sweep.png")
    print(f"\n{text}")
    return summary
