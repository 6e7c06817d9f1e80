"""The measures of many traces as one json-ready summary, and the summary as a Markdown table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trsd.selection import MAX_RANK, RankSurprisal, dataset_ratio
from trsd.trace_measures import Measures

SECTIONS = {"prompt": "prompt_tokens", "cot": "cot_tokens", "answer": "answer_tokens"}
NUM_BINS = 20


def summarize(measures: Sequence[Measures]) -> dict[str, Any]:
    """Sections, first derivation, reflections, coverage and length histograms of at least one trace."""
    found = [m for m in measures if m.derivation_tokens is not None]
    correct = [m for m in measures if m.correct]
    return {
        "num_traces": len(measures),
        "num_correct": len(correct),
        "num_wrong": sum(m.correct is False for m in measures),
        "num_unknown_answer": sum(m.answer is None for m in measures),
        "sections": {
            name: {"mean_share": float(np.mean([getattr(m, column) / m.total_tokens for m in measures]))}
            | _lengths([getattr(m, column) for m in measures])
            for name, column in SECTIONS.items()
        }
        | {"full": _lengths([m.total_tokens for m in measures])},
        "first_derivation": {
            "num_found": len(found),
            "num_not_found": sum(m.answer is not None for m in measures) - len(found),
            "num_found_correct": sum(m.derivation_tokens is not None for m in correct),
            "tokens": quartiles([m.derivation_tokens for m in found]),
            "in_cot": quartiles([m.derivation_in_cot for m in found]),
            "in_full": quartiles([m.derivation_in_full for m in found]),
        },
        "reflections": _reflections(measures, found),
        "coverage": {
            "prompt": _mean([m.prompt_coverage for m in measures]),
            "answer": _mean([m.answer_coverage for m in measures]),
        },
        "histograms": {
            name: histogram([getattr(m, column) for m in measures])
            for name, column in (SECTIONS | {"full": "total_tokens"}).items()
        },
    }


def _lengths(values: Sequence[int]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "min": int(min(values)),
        "max": int(max(values)),
    }


def quartiles(values: Sequence[float]) -> dict[str, float] | None:
    """First quartile, median and third quartile; None of nothing."""
    if not values:
        return None
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    return {"first_quartile": float(first), "median": float(median), "third_quartile": float(third)}


def histogram(values: Sequence[float]) -> dict[str, list[float]]:
    """Counts in ``NUM_BINS`` bins of equal width, and their edges."""
    counts, edges = np.histogram(values, bins=NUM_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _reflections(measures: Sequence[Measures], found: Sequence[Measures]) -> dict[str, Any]:
    """Cues a trace, in the whole reasoning and, where a derivation was found, before it."""
    total, whole, before = Counter(), Counter(), Counter()
    for m in measures:
        total.update(m.reflections)
    for m in found:
        whole.update(m.reflections)
        before.update(m.reflections_before)
    counts = [sum(m.reflections.values()) for m in measures]
    return {
        "total": total.total(),
        "mean_per_trace": float(np.mean(counts)),
        "median_per_trace": float(np.median(counts)),
        "share_of_traces_with_any": float(np.mean([count > 0 for count in counts])),
        "with_derivation": {
            "total": whole.total(),
            "before": before.total(),
            "mean_before_per_trace": before.total() / len(found) if found else None,
            "share_before": before.total() / whole.total() if whole else None,
        },
        "by_cue": dict(total.most_common()),
        "by_cue_before": dict(before.most_common()),
    }


def summarize_ratios(ratios: Sequence[RankSurprisal], *, student: str, num_too_long: int) -> dict[str, Any]:
    """The Rank-Surprisal Ratio of a data set, and how it spreads over traces."""
    return {
        "student": student,
        "max_rank": MAX_RANK,
        "num_traces": len(ratios),
        "num_too_long": num_too_long,
        "ratio": dataset_ratio(ratios),
        "mean_rank": _mean([one.mean_rank for one in ratios]),
        "mean_nll": _mean([one.mean_nll for one in ratios]),
        "per_trace": quartiles([one.ratio for one in ratios if one.ratio is not None]),
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown tables."""
    lines = [
        f"# {summary['data']}",
        "",
        f"{summary['num_traces']} traces, tokens of {summary['tokenizer']}. Dropped: {summary['dropped_text']}. "
        f"Traces without a known answer: {summary['num_unknown_answer']}.",
        "",
        "| section | mean share | mean | median | min | max |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary["sections"].items():
        share = f"{row['mean_share']:.1%}" if "mean_share" in row else ""
        lines.append(f"| {name} | {share} | {row['mean']:.1f} | {row['median']:g} | {row['min']} | {row['max']} |")
    derivation = summary["first_derivation"]
    lines += ["", "| first derivation | first quartile | median | third quartile |", "|---|---|---|---|"]
    for key, name in (("in_cot", "in the CoT"), ("in_full", "in the full sequence")):
        if row := derivation[key]:
            lines.append(
                f"| {name} | {row['first_quartile']:.1%} | {row['median']:.1%} | {row['third_quartile']:.1%} |"
            )
    lines += ["", "| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in _figures(summary))]
    return "\n".join(lines) + "\n"


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what is one number."""
    derivation, reflections = summary["first_derivation"], summary["reflections"]
    near = reflections["with_derivation"]
    figures = [
        (
            "first derivation found",
            f"{derivation['num_found']} of {derivation['num_found'] + derivation['num_not_found']}",
        ),
        ("reflection cues a trace, mean", f"{reflections['mean_per_trace']:.3g}"),
        ("reflection cues a trace, median", f"{reflections['median_per_trace']:g}"),
        ("traces with a cue", f"{reflections['share_of_traces_with_any']:.1%}"),
        ("cues before the first derivation, mean", _text(near["mean_before_per_trace"], ".3g")),
        ("cues before the first derivation, share", _text(near["share_before"], ".1%")),
        ("coverage of the prompt", _text(summary["coverage"]["prompt"], ".1%")),
        ("coverage of the answer", _text(summary["coverage"]["answer"], ".1%")),
    ]
    if summary["num_correct"] + summary["num_wrong"]:
        figures.insert(1, ("found in correct traces", f"{derivation['num_found_correct']} of {summary['num_correct']}"))
    if ratio := summary.get("rank_surprisal"):
        figures += [
            (f"Rank-Surprisal Ratio under {ratio['student']} (lower is better)", _text(ratio["ratio"], ".4g")),
            ("mean rank / mean NLL", f"{_text(ratio['mean_rank'], '.4g')} / {_text(ratio['mean_nll'], '.4g')}"),
        ]
        if ratio["num_too_long"]:
            figures.append(("traces longer than the student's context", f"{ratio['num_too_long']}"))
    if judge := summary.get("judge"):
        figures += [
            ("judge's replies that name a sentence or none", f"{judge['num_readable']} of {judge['num_asked']}"),
            ("finder and judge agree on the sentence", f"{judge['num_same']} of {judge['num_readable']}"),
            ("within one sentence", f"{judge['num_within_one']} of {judge['num_readable']}"),
        ]
        if row := judge["in_cot"]:
            figures.append(("judge's median position in the CoT", f"{row['median']:.1%}"))
    return figures


def _text(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
