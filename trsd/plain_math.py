"""Mathematics typed without LaTeX, as LaTeX: ``3√2``, ``x²``, ``½``, ``π/4``, ``A ∪ B``.

For comparing answers: math-verify reads LaTeX alone, and of other signs takes what it knows (of ``3√2`` the 3).
"""

import re
import unicodedata

_SIGNS = {
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "π": r"\pi ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "√": r"\sqrt ",
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RUNS = ((re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), "^", _RAISED), (re.compile("[₀₁₂₃₄₅₆₇₈₉]+"), "_", _LOWERED))
_ROOT = re.compile(r"(?:√|(?<![A-Za-z\\])sqrt) ?(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])))")
_FRACTION = re.compile(r"(?:(?<=\d) ?)?[¼-¾⅐-⅞]")  # one sign for a half, a third ...
_NAMED = re.compile(r"(?<![A-Za-z\\{])(pi|infinity|inf)(?![A-Za-z}])")
_NAMES = {"pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty "}


def as_latex(text: str) -> str:
    r"""``text`` with each sign of plain mathematics as LaTeX has it; ``3½`` is ``3 1/2``."""
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    if not text.isascii():
        text = _FRACTION.sub(_written_out, text)
        for run, sign, table in _RUNS:
            text = run.sub(lambda found, sign=sign, table=table: f"{sign}{{{found[0].translate(table)}}}", text)
        for sign, latex in _SIGNS.items():
            text = text.replace(sign, latex)
    return _NAMED.sub(lambda found: _NAMES[found[1]], text)


def _written_out(found: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", found[0][-1]).partition("\N{FRACTION SLASH}")
    before = found.string[: found.start()]
    if before[-1:].isdigit():
        return f" {over}/{under}"
    fraction = rf"\frac{{{over}}}{{{under}}}"
    return f"{{{fraction}}}" if before.endswith("^") else fraction
