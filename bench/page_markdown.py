"""Markdown tables."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    """A line a row; the first columns are text, the others figures."""
    rule = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    return [f"| {' | '.join(map(cell, row))} |" for row in (header, rule, *rows)]


def cell(text: str) -> str:
    """One line of text that Markdown shows as it is, in a table or outside."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
