"""comparison.html: two evaluations as a page, with both curves and questions side by side."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trsd.page import cards, headline, image, side_by_side, thinking_lengths, write_page
from trsd.plots import plot_curves

SIDES = {"A": "first", "B": "second"}
KEPT_BY_EVALUATE = ("auc", "budgets", "unconstrained")
LEGEND_ROOM = 48  # characters
SHOWN_OF_BUDGETS = ("accuracy", "high", "low", "tokens")


def write_comparison(
    folder: Path,
    comparison: Mapping[str, Any],
    notes: Sequence[str],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> Path:
    """Write ``folder``/comparison.html and the pictures in it, curve.png and lengths.png; returns its path.

    Args:
        folder: exists.
        comparison: what ``compare.compare`` returns.
        notes: what a reader of it must know.
        first, second: the two evaluation.json. Of those that hold per-question results alone, the page has the table.
    """
    both = {"A": first, "B": second}
    told = "".join(f"<br>{letter}: {html.escape(_name(comparison[of]))}" for letter, of in SIDES.items())
    parts = [f'<p class="lead">{html.escape(notes[0])}.{told}</p>']
    # Curves and lengths are of all questions of an evaluation: shown where those are the ones compared.
    whole = all(_is_whole(result) for result in both.values()) and not any(comparison["num_left_out"])
    if whole:
        parts.append(cards(headline(first, second)))
    if whole and all(result["budgets"] for result in both.values()):
        named = {f"{letter}: {_shortened(comparison[of]['model'])}": both[letter] for letter, of in SIDES.items()}
        plot_curves(named, folder / "curve.png")
        parts += ["<h2>Accuracy against thinking budget</h2>", image(folder / "curve.png", "accuracy against budget")]
    parts += ["<h2>Is the difference real?</h2>", _table(comparison["rows"])]
    parts += [f'<p class="lead">{html.escape(note)}</p>' for note in notes[1:]]
    if whole:
        parts += thinking_lengths(both, folder / "lengths.png")
    parts += side_by_side(both, second="B")
    path = folder / "comparison.html"
    write_page(path, "A and B, question by question", parts)
    return path


def _name(side: Mapping[str, Any]) -> str:
    return side["model"] if side["model"] == side["file"] else f"{side['model']} ({side['file']})"


def _shortened(name: str) -> str:
    """The end of a path, which is what tells two of them apart, no longer than a legend has room for."""
    return name if len(name) <= LEGEND_ROOM else f"…{name[1 - LEGEND_ROOM :]}"


def _is_whole(result: Mapping[str, Any]) -> bool:
    """Whether ``trsd.evaluate`` wrote it, and not another program that keeps per-question results."""
    return (
        all(name in result for name in KEPT_BY_EVALUATE)
        and all(name in result["unconstrained"] for name in ("accuracy", "mean_thinking_tokens"))
        and all(name in row for row in result["budgets"] for name in SHOWN_OF_BUDGETS)
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("budget", "tokens", "A", "B", "B − A", "95 % interval", "p", "differing", "mean tokens of A, B")
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for row in rows:
        cells = (
            html.escape(row["setting"]),
            "/".join(f"{count}" for count in dict.fromkeys(row["tokens"]) if count is not None),
            *(f"{accuracy:.3f}" for accuracy in row["accuracy"]),
            f"{row['difference']:+.3f}",
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['p_value']:.2g}",
            f"{row['num_differing']}",
            ", ".join("-" if mean is None else f"{mean:,.0f}" for mean in row["mean_tokens"]),
        )
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return f'<div class="wide"><table class="numbers">{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
