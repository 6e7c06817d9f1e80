"""Self-contained pages about evaluations: what a run's report and a comparison have in common.

Everything is in the one file: pictures as data, no script, no address. Texts of models and data are escaped.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from trsd.plots import plot_lengths

SHOWN = 6  # examples
STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1f2937;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .8rem;text-align:right}
th{border-bottom:1px solid #9ca3af;font-weight:600}td:first-child,th:first-child,.right,.wrong,.said th{text-align:left}
.wide{overflow-x:auto}.numbers td{white-space:nowrap}
img{max-width:100%}pre{background:#f3f4f6;padding:.8rem;overflow-x:auto;font-size:.82rem;white-space:pre-wrap}
.lead{color:#4b5563;overflow-wrap:anywhere}.right{color:#15803d}.wrong{color:#b91c1c}
.right::before{content:"✓ "}.wrong::before{content:"✗ "}
.cards{display:flex;gap:1rem;flex-wrap:wrap}
.card{border:1px solid #e5e7eb;border-radius:.5rem;padding:.6rem 1rem}.card b{display:block;font-size:1.5rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
.parts td:nth-child(3){text-align:left}.bar{height:.8rem;background:#0b6bcb;border-radius:2px}
details{margin:.6rem 0}summary{cursor:pointer}
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """The parts under their title, as one file that needs nothing else."""
    name = html.escape(title)
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


def headline(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The pairs that a reader of two evaluations asks for first."""
    pairs = {}
    if first["auc"] is not None and second["auc"] is not None:
        pairs["area under the curve"] = (first["auc"], second["auc"])
    pairs["unconstrained accuracy"] = (first["unconstrained"]["accuracy"], second["unconstrained"]["accuracy"])
    name = "mean_thinking_tokens"
    pairs["unconstrained thinking tokens"] = (first["unconstrained"][name], second["unconstrained"][name])
    return pairs


def cards(pairs: Mapping[str, tuple[float, float]]) -> str:
    """Two numbers to a card, the first with an arrow to the second."""
    shown = (
        f'<div class="card">{name}<b>{number(old)} → {number(new)}</b></div>' for name, (old, new) in pairs.items()
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def number(value: float) -> str:
    """A share with three digits, a count with one."""
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


def image(path: Path, alternative: str) -> str:
    """A picture, within the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{alternative}" src="data:image/png;base64,{data}">'


def thinking_lengths(results: Mapping[str, Mapping[str, Any]], picture: Path) -> list[str]:
    """Histograms of thinking, and their medians; nothing where an evaluation did not keep them."""
    found = {label: result["unconstrained"].get("thinking_lengths") for label, result in results.items()}
    if not all(found.values()):
        return []
    plot_lengths(found, picture)
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{min(counts)}</td><td>{median_low(counts)}</td><td>{max(counts)}</td></tr>"
        for label, counts in found.items()
    )
    return [
        "<h2>How long it thinks</h2>",
        image(picture, "histogram of unconstrained thinking lengths"),
        f'<table class="numbers"><tr><th>tokens</th><th>least</th><th>median</th><th>most</th></tr>{rows}</table>',
    ]


def side_by_side(results: Mapping[str, Mapping[str, Any]], *, second: str) -> list[str]:
    """Some questions as two evaluations answered them.

    First come those in which the second stops thinking earlier, then those in which it is right at more budgets.

    Args:
        results: the two evaluations by their labels; what both keep as an example is shown.
        second: the second one's name in a sentence.
    """
    ones, others = (result.get("examples", []) for result in results.values())
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    for other in others:
        waiting.setdefault(other["question"], []).append(other)
    pairs = [(one, waiting[one["question"]].pop(0)) for one in ones if waiting.get(one["question"])]
    if not pairs:
        return []
    order = sorted((_longer(*pair), -_gained(*pair), place) for place, pair in enumerate(pairs))
    earlier, more = sum(longer < 0 for longer, _, _ in order), sum(lost < 0 for _, lost, _ in order)
    told = (
        f"Of the first {len(pairs)} questions {second} stops thinking earlier in {earlier} and is right at more "
        f"budgets in {more}; those come first."
    )
    shown = (_example(dict(zip(results, pairs[place], strict=True))) for _, _, place in order[:SHOWN])
    return ["<h2>Side by side</h2>", f'<p class="lead">{told}</p>', *shown]


def _longer(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return other["thinking_tokens"] - one["thinking_tokens"]


def _gained(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """At how many more budgets the second is right, of those that both have."""
    shared = _shared_budgets(one["at_budgets"], other["at_budgets"])
    return sum(new["correct"] - old["correct"] for _, old, new in shared)


def _example(answered: Mapping[str, Mapping[str, Any]]) -> str:
    """One question, its answers at each budget that both have, and the thinking of both."""
    one, other = answered.values()
    shown = _shared_budgets(one["at_budgets"], other["at_budgets"])
    shown.append((f"free ({one['thinking_tokens']} → {other['thinking_tokens']})", one, other))
    rows = "".join(_answers(name, *entries) for name, *entries in shown)
    question, gold = html.escape(one["question"]), html.escape(str(one["gold"]))
    labels = {html.escape(label): result for label, result in answered.items()}
    thoughts = "".join(
        f"<div><b>{label}: {result['thinking_tokens']} tokens</b><pre>{html.escape(result['reasoning'])}</pre></div>"
        for label, result in labels.items()
    )
    head = "".join(f"<th>{label}</th>" for label in labels)
    return (
        f"<details open><summary>{question} <i>(answer {gold})</i></summary>"
        f'<table class="said"><tr><th>budget</th>{head}</tr>{rows}</table>'
        f"<details><summary>unconstrained thinking, {' and '.join(labels)}</summary>"
        f'<div class="pair">{thoughts}</div></details></details>'
    )


def _answers(name: str, *entries: Mapping[str, Any]) -> str:
    cells = (
        f'<td class="{"right" if entry["correct"] else "wrong"}">{html.escape(entry["answer"]) or "—"}</td>'
        for entry in entries
    )
    return f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>"


def _shared_budgets(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The budgets of the same name, with their lengths."""
    others = {row["budget"]: row for row in second}
    pairs = [(row, others[row["budget"]]) for row in first if row["budget"] in others]
    return [
        (f"{one['budget']} ({' → '.join(dict.fromkeys((str(one['tokens']), str(other['tokens']))))})", one, other)
        for one, other in pairs
    ]
