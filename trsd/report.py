"""``python -m trsd.report RUN_DIR`` writes RUN_DIR/report.html: one self-contained page about a run.

Curve before and after, the numbers under it, the loss, answers side by side, recipe and versions. Also the printed
summary.
"""

import html
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from trsd.checkpoint_folders import best_checkpoint
from trsd.metrics import read_metrics
from trsd.page import cards, headline, image, number, side_by_side, thinking_lengths, write_page
from trsd.plots import plot_curves, plot_loss
from trsd.run import ENVIRONMENT_FILE, RECIPE_FILE
from trsd.terminal import at_a_terminal
from trsd.totals import TOTALS, totals_line, training_peak_gib

LOSS_TERMS = {
    "divergence": "{learnt}: divergence from the teacher",
    "cross_entropy": "{learnt}: cross-entropy",
    "thinking_cross_entropy": "reasoning shown: cross-entropy",
}
LEARNT = {"trsd": "answers", "palign": "prefix and completion"}


def summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Before and after as a text table."""
    lines = ["\nbudget      tokens    before     after"] if before["budgets"] else [""]
    for old, new in zip(before["budgets"], after["budgets"], strict=True):
        lines.append(f"{old['budget']:<10} {old['tokens']:>7}  {old['accuracy']:>8.3f}  {new['accuracy']:>8.3f}")
    lines += [f"{name}: {number(old)} -> {number(new)}" for name, (old, new) in headline(before, after).items()]
    return "\n".join(lines)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir``/report.html (and curve.png, loss.png) from what the run left; returns its path."""
    before, after = (_read(run_dir / "eval" / f"{name}.json") for name in ("before", "after"))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    recipe_text = (run_dir / RECIPE_FILE).read_text(encoding="utf-8")
    parts = [f'<p class="lead">{_lead(metrics, run_dir)}</p>']
    both = {"before": before, "after": after}
    if before and after:
        parts.append(cards(headline(before, after)))
        parts.append(f"<h2>Accuracy {'against thinking budget' if before['budgets'] else 'before and after'}</h2>")
        if before["budgets"]:
            plot_curves(both, run_dir / "curve.png")
            parts.append(image(run_dir / "curve.png", "accuracy against budget"))
        parts += [_curve_table(before, after), *thinking_lengths(both, run_dir / "lengths.png")]
    if metrics:
        tokens = LEARNT.get(yaml.safe_load(recipe_text).get("method", "trsd"), "learnt tokens")
        terms = {label.format(learnt=tokens): [row[name] for row in metrics] for name, label in LOSS_TERMS.items()}
        learnt = {label: values for label, values in terms.items() if any(values)}
        held_out = {row["step"]: row["validation_loss"] for row in metrics if "validation_loss" in row}
        plot_loss([row["step"] for row in metrics], learnt, run_dir / "loss.png", validation=held_out)
        parts += ["<h2>Loss</h2>", image(run_dir / "loss.png", "training loss")]
        if best := best_checkpoint(run_dir):
            parts.append(f"<p>Least validation loss: {best['validation_loss']:.4f}, {best['checkpoint']}.</p>")
    if before and after:
        parts += side_by_side(both, second="the trained model")
    parts += _memory(run_dir)
    parts += ["<h2>Traces left out</h2>", f"<p>{_drops(run_dir)}</p>"]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(recipe_text)}</pre>"]
    parts += ["<h2>Versions</h2>", f"<pre>{html.escape(_text(run_dir / ENVIRONMENT_FILE))}</pre>"]
    path = run_dir / "report.html"
    write_page(path, run_dir.resolve().name, parts)
    return path


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "unknown"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _lead(metrics: list[dict[str, float]], run_dir: Path) -> str:
    totals = _read(run_dir / TOTALS)
    text = f"{len(metrics)} optimizer step{'' if len(metrics) == 1 else 's'}"
    if metrics:
        text += f", {sum(row['tokens'] for row in metrics):,.0f} tokens without padding"
    if totals:
        text += f"; the whole run took {totals_line(totals)}"
    return text + "."


def _drops(run_dir: Path) -> str:
    given, dropped = (_read(run_dir / "traces" / f"{name}.json") or {} for name in ("given.dropped", "dropped"))
    dropped = {**given, **dropped}
    return html.escape(", ".join(f"{count} × {reason}" for reason, count in dropped.items()) or "None.")


def _curve_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    def cells(row: dict[str, float]) -> str:
        return (
            f"<td>{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]</td><td>{row['no_answer_rate']:.0%}</td>"
            f"<td>{row['termination_rate']:.0%}</td>"
        )

    head = "".join(
        f"<th>{when}: accuracy</th><th>no answer</th><th>ends by itself</th>" for when in ("before", "after")
    )
    rows = "".join(
        f"<tr><td>{old['budget']}</td><td>{old['tokens']}</td>{cells(old)}{cells(new)}</tr>"
        for old, new in zip(before["budgets"], after["budgets"], strict=True)
    )
    free = cells(before["unconstrained"]) + cells(after["unconstrained"])
    lengths = " → ".join(f"{result['unconstrained']['mean_thinking_tokens']:.1f}" for result in (before, after))
    return (
        f'<div class="wide"><table class="numbers"><tr><th>budget</th><th>tokens</th>{head}</tr>{rows}'
        f"<tr><td>free</td><td>{lengths}</td>{free}</tr></table></div>"
        f"<p class='lead'>{before['num_questions']} questions; intervals are 95 %, over questions.</p>"
    )


def _memory(run_dir: Path) -> list[str]:
    """What a step's memory is made of, largest first, with bars; nothing of runs that did not count it."""
    totals = _read(run_dir / TOTALS) or {}
    found = sorted(totals.get("memory_parts_gib", {}).items(), key=lambda part: -part[1])
    if not found:
        return []
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td>{1024 * size:,.1f}</td><td><div class="bar" '
        f'style="width:{max(1, round(10 * 16 * size / found[0][1]))}px"></div></td></tr>'
        for name, size in found
    )
    peak, where = training_peak_gib(totals)
    head = "<tr><th>of a training step</th><th>MiB</th><th></th></tr>"
    told = f"Counted for a step of traces as long as this run's; {peak:.2f} GiB were measured {where}."
    return [
        "<h2>Memory by part</h2>",
        f'<div class="wide"><table class="parts">{head}{rows}</table></div><p class="lead">{told}</p>',
    ]


@at_a_terminal()
def main(argv: list[str] | None = None) -> None:
    """Write the report of the run folder named on the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = arguments in (["-h"], ["--help"])
        print("usage: python -m trsd.report RUN_DIR", file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    run_dir = Path(arguments[0])
    if not (run_dir / RECIPE_FILE).exists():
        print(f"error: {run_dir} is no run folder (it has no {RECIPE_FILE})", file=sys.stderr)
        raise SystemExit(2)
    print(write_report(run_dir))


if __name__ == "__main__":
    main()
