"""``python -m trsd.report RUN_DIR`` writes RUN_DIR/report.html: one self-contained page about a run.

Curve before and after, the numbers under it, the loss, answers side by side, recipe and versions. Also the printed
summary.
"""

import base64
import html
import json
import sys
from pathlib import Path
from statistics import median_low
from typing import Any

import yaml

from trsd.checkpoint_folders import best_checkpoint
from trsd.metrics import read_metrics
from trsd.plots import plot_curves, plot_lengths, plot_loss
from trsd.run import ENVIRONMENT_FILE, RECIPE_FILE

LOSS_TERMS = {
    "divergence": "{learnt}: divergence from the teacher",
    "cross_entropy": "{learnt}: cross-entropy",
    "thinking_cross_entropy": "reasoning shown: cross-entropy",
}
SHOWN = 6  # examples
LEARNT = {"trsd": "answers", "palign": "prefix and completion"}
STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1f2937;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .8rem;text-align:right}
th{border-bottom:1px solid #9ca3af;font-weight:600}td:first-child,th:first-child,.right,.wrong,.said th{text-align:left}
.wide{overflow-x:auto}.numbers td{white-space:nowrap}
img{max-width:100%}pre{background:#f3f4f6;padding:.8rem;overflow-x:auto;font-size:.82rem;white-space:pre-wrap}
.lead{color:#4b5563}.right{color:#15803d}.wrong{color:#b91c1c}.cards{display:flex;gap:1rem;flex-wrap:wrap}
.card{border:1px solid #e5e7eb;border-radius:.5rem;padding:.6rem 1rem}.card b{display:block;font-size:1.5rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
.parts td:nth-child(3){text-align:left}.bar{height:.8rem;background:#0b6bcb;border-radius:2px}
details{margin:.6rem 0}summary{cursor:pointer}
"""


def headline(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The pairs (before, after) a reader asks for first."""
    pairs = {}
    if before["auc"] is not None:
        pairs["area under the curve"] = (before["auc"], after["auc"])
    pairs["unconstrained accuracy"] = (before["unconstrained"]["accuracy"], after["unconstrained"]["accuracy"])
    name = "mean_thinking_tokens"
    pairs["unconstrained thinking tokens"] = (before["unconstrained"][name], after["unconstrained"][name])
    return pairs


def summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Before and after as a text table."""
    lines = ["\nbudget      tokens    before     after"] if before["budgets"] else [""]
    for old, new in zip(before["budgets"], after["budgets"], strict=True):
        lines.append(f"{old['budget']:<10} {old['tokens']:>7}  {old['accuracy']:>8.3f}  {new['accuracy']:>8.3f}")
    lines += [f"{name}: {_number(old)} -> {_number(new)}" for name, (old, new) in headline(before, after).items()]
    return "\n".join(lines)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir``/report.html (and curve.png, loss.png) from what the run left; returns its path."""
    before, after = (_read(run_dir / "eval" / f"{name}.json") for name in ("before", "after"))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    recipe_text = (run_dir / RECIPE_FILE).read_text(encoding="utf-8")
    parts = [f"<h1>{html.escape(run_dir.name)}</h1>", f'<p class="lead">{_lead(metrics, run_dir)}</p>']
    if before and after:
        cards = "".join(
            f'<div class="card">{name}<b>{_number(old)} → {_number(new)}</b></div>'
            for name, (old, new) in headline(before, after).items()
        )
        parts.append(f'<div class="cards">{cards}</div>')
        parts.append(f"<h2>Accuracy {'against thinking budget' if before['budgets'] else 'before and after'}</h2>")
        if before["budgets"]:
            plot_curves({"before": before, "after": after}, run_dir / "curve.png")
            parts.append(_image(run_dir / "curve.png", "accuracy against budget"))
        parts += [_curve_table(before, after), *_lengths(before, after, run_dir)]
    if metrics:
        tokens = LEARNT.get(yaml.safe_load(recipe_text).get("method", "trsd"), "learnt tokens")
        terms = {label.format(learnt=tokens): [row[name] for row in metrics] for name, label in LOSS_TERMS.items()}
        learnt = {label: values for label, values in terms.items() if any(values)}
        held_out = {row["step"]: row["validation_loss"] for row in metrics if "validation_loss" in row}
        plot_loss([row["step"] for row in metrics], learnt, run_dir / "loss.png", validation=held_out)
        parts += ["<h2>Loss</h2>", _image(run_dir / "loss.png", "training loss")]
        if best := best_checkpoint(run_dir):
            parts.append(f"<p>Least validation loss: {best['validation_loss']:.4f}, {best['checkpoint']}.</p>")
    if before and after:
        parts += [
            "<h2>Side by side</h2>",
            *_side_by_side(before["examples"], after["examples"]),
        ]
    parts += _memory(run_dir)
    parts += ["<h2>Traces left out</h2>", f"<p>{_drops(run_dir)}</p>"]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(recipe_text)}</pre>"]
    parts += ["<h2>Versions</h2>", f"<pre>{html.escape(_text(run_dir / ENVIRONMENT_FILE))}</pre>"]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(run_dir.name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "unknown"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _number(value: float) -> str:
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


def _lead(metrics: list[dict[str, float]], run_dir: Path) -> str:
    totals = _read(run_dir / "totals.json")
    text = f"{len(metrics)} optimizer steps"
    if metrics:
        text += f", {sum(row['tokens'] for row in metrics):,.0f} tokens without padding"
    if totals:
        text += f"; whole run {totals['seconds']:.0f} s, peak memory {totals['peak_memory_gib']:.2f} GiB"
    return text + "."


def _image(path: Path, alternative: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{alternative}" src="data:image/png;base64,{data}">'


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
        f"<p class='lead'>{before['num_questions']} questions; intervals are 95 %, bootstrapped over questions.</p>"
    )


def _lengths(before: dict[str, Any], after: dict[str, Any], run_dir: Path) -> list[str]:
    """Histograms of thinking, and their medians; nothing of evaluations that did not keep them."""
    found = {when: r["unconstrained"].get("thinking_lengths") for when, r in (("before", before), ("after", after))}
    if not all(found.values()):
        return []
    plot_lengths(found, run_dir / "lengths.png")
    rows = "".join(
        f"<tr><td>{when}</td><td>{min(counts)}</td><td>{median_low(counts)}</td><td>{max(counts)}</td></tr>"
        for when, counts in found.items()
    )
    return [
        "<h2>How long it thinks</h2>",
        _image(run_dir / "lengths.png", "histogram of unconstrained thinking lengths"),
        f'<table class="numbers"><tr><th>tokens</th><th>least</th><th>median</th><th>most</th></tr>{rows}</table>',
    ]


def _memory(run_dir: Path) -> list[str]:
    """What a step's memory is made of, largest first, with bars; nothing of runs that did not count it."""
    totals = _read(run_dir / "totals.json") or {}
    found = sorted(totals.get("memory_parts_gib", {}).items(), key=lambda part: -part[1])
    if not found:
        return []
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td>{1024 * size:,.1f}</td><td><div class="bar" '
        f'style="width:{max(1, round(10 * 16 * size / found[0][1]))}px"></div></td></tr>'
        for name, size in found
    )
    peak = totals.get("peak_gpu_memory_gib", totals["peak_memory_gib"])
    where = "on the GPU" if "peak_gpu_memory_gib" in totals else "of the whole process, libraries and evaluation too"
    head = "<tr><th>of a training step</th><th>MiB</th><th></th></tr>"
    told = f"Counted for a step of traces as long as this run's; {peak:.2f} GiB were measured {where}."
    return [
        "<h2>Memory by part</h2>",
        f'<div class="wide"><table class="parts">{head}{rows}</table></div><p class="lead">{told}</p>',
    ]


def _side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Some of the examples, those first in which the trained model stops earlier."""
    pairs = sorted(zip(before, after, strict=True), key=lambda p: p[1]["thinking_tokens"] - p[0]["thinking_tokens"])
    earlier = sum(new["thinking_tokens"] < old["thinking_tokens"] for old, new in pairs)
    told = (
        f"In {earlier} of the first {len(pairs)} questions the trained model stops thinking earlier; those come first."
    )
    return [f'<p class="lead">{told}</p>', *(_example(*pair) for pair in pairs[:SHOWN])]


def _example(before: dict[str, Any], after: dict[str, Any]) -> str:
    def answer(entry: dict[str, Any]) -> str:
        kind = "right" if entry["correct"] else "wrong"
        return f'<td class="{kind}">{html.escape(entry["answer"]) or "—"}</td>'

    rows = "".join(
        f"<tr><td>{old['budget']} ({old['tokens']})</td>{answer(old)}{answer(new)}</tr>"
        for old, new in zip(before["at_budgets"], after["at_budgets"], strict=True)
    )
    lengths = f"free ({before['thinking_tokens']} → {after['thinking_tokens']})"
    free = f"<tr><td>{lengths}</td>{answer(before)}{answer(after)}</tr>"
    question, gold = html.escape(before["question"]), html.escape(before["gold"])
    thoughts = "".join(
        f"<div><b>{when}: {result['thinking_tokens']} tokens</b><pre>{html.escape(result['reasoning'])}</pre></div>"
        for when, result in (("before", before), ("after", after))
    )
    return (
        f"<details open><summary>{question} <i>(answer {gold})</i></summary>"
        f'<table class="said"><tr><th>budget</th><th>before</th><th>after</th></tr>{rows}{free}</table>'
        "<details><summary>unconstrained thinking, before and after</summary>"
        f'<div class="pair">{thoughts}</div></details></details>'
    )


def main(argv: list[str] | None = None) -> None:
    """Write the report of the run folder named on the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m trsd.report RUN_DIR", file=sys.stderr)
        raise SystemExit(0 if arguments in (["-h"], ["--help"]) else 2)
    run_dir = Path(arguments[0])
    if not (run_dir / RECIPE_FILE).exists():
        print(f"error: {run_dir} is no run folder (it has no {RECIPE_FILE})", file=sys.stderr)
        raise SystemExit(2)
    print(write_report(run_dir))


if __name__ == "__main__":
    main()
