"""An evaluation's result (``evaluation.py``) as text."""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The result as a text table, with pass@k where there are several samples.

    "No format" is the share of answers in no known form, of which a last number is taken where there is one.
    """
    free = result["unconstrained"]
    passes = [f"pass@{k}" for k in free["pass_at"] if k != "1"]
    head = "budget      tokens  accuracy  [95 % interval]  forced close  no format  terminated"
    lines = ["  ".join([head, *(f"{name:>7}" for name in passes)])]
    for row in result["budgets"]:
        lines.append(_table_row(row["budget"], f"{row['tokens']}", row))
    lines.append(_table_row("free", f"{free['mean_thinking_tokens']:.0f}", free))
    if free["unclosed_rate"]:
        lines.append(
            f"free thinking that never closed: {free['unclosed_rate']:.1%}, counted wrong above; "
            f"accuracy of the whole text {free['accuracy_of_whole_text']:.3f}"
        )
    if direct := result.get("direct"):
        lines.append("cut thinking as a draft, answered in the non-thinking mode:")
        lines += [_table_row(row["budget"], f"{row['tokens']}", row) for row in direct["budgets"]]
    if early := result.get("early_exit"):
        lines.append(_table_row(f"exit {early['confidence']:g}", f"{early['mean_thinking_tokens']:.0f}", early))
        lines.append(f"(exit: and {early['mean_tried_tokens']:.0f} tokens a question for trial answers thrown away)")
    area = "" if result["auc"] is None else f"area under the curve {result['auc']:.3f}, "
    lines.append(f"{area}{result['num_questions']} questions")
    return "\n".join(lines)


def _table_row(name: str, tokens: str, row: dict[str, Any]) -> str:
    cells = (
        f"{name:<10} {tokens:>7}  {row['accuracy']:>8.3f}  [{row['low']:.3f}, {row['high']:.3f}]   "
        f"{row['forced_close_rate']:>11.0%}  {row['format_failure_rate']:>9.0%}  {row['termination_rate']:>10.0%}"
    )
    return "  ".join([cells, *(f"{value:>7.3f}" for k, value in row["pass_at"].items() if k != "1")])
