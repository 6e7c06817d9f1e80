r"""Multiple choice: the letter that an answer chooses, in the ways it is written.

``B``, ``(B)``, ``B.``, ``\text{B}``, ``\textbf{(B)}\ 12``, ``(b) 12``, ``B: 12``, ``option B``. A capital letter can
also be a variable, so what reads as mathematics (``B + 1``, ``A(x)``, ``A, B``, ``(A)^2``) chooses nothing, and a lone
small letter is a reference's variable, never its choice.
"""

import re

_STYLE = re.compile(r"\\(?:text(?:bf|rm|it|sf|tt)?|mathrm|mathbf|mathsf|boldsymbol)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[ ,;:!]|\\quad|\\left|\\right|[~$*\s]|\\\(|\\\)")
_REFERENCE = re.compile(r"\(([A-Ja-j])\)\.?|([A-J])[).:]?")
_LIST = r"(?!\s*(?:,|;|/|&|\band\b|\bor\b)\s*\(?[A-J]\b\)?)"  # "A, B" and "A or B" are several
_CALCULATION = r"(?!\s*[+*/^=_<>|!\\(]|-|\s+-\s)"  # "(B) -12" is a choice with its text, "(B) - 12" a difference
_IN_BRACKETS = re.compile(rf"\(([A-Ja-j])\){_CALCULATION}{_LIST}")
_BARE = re.compile(
    rf"([A-J]){_LIST}(?:\s*[.!?,;:)]?\s*$|[.:)](?=\s|[A-Za-z])|[,;]\s+(?=[a-z]{{2}})|\s+(?=because\b|since\b|as\b|\([^)]*[a-z]{{3}}))"
)
_ALONE = re.compile(r"([a-j])[.:)]?\s*$")
_NAMED = re.compile(
    r"\b(?:option|choice)\s*:?\s*\**\(?([A-J])\b\)?(?!\s*(?:\w+\s+)?(?:is|are|was)(?:n't|\s+(?:not|wrong|incorrect)))",
    re.IGNORECASE,
)


def without_style(text: str) -> str:
    """``text`` without what LaTeX and Markdown put around letters."""
    for _ in range(3):  # styles nest, but not deeply
        text = _STYLE.sub(r"\1 ", text)
    return _SPACE.sub(" ", text).strip()


def reference_choice(reference: str) -> str | None:
    """The capital letter of a reference that is a choice; None for any other reference."""
    found = _REFERENCE.fullmatch(without_style(reference)) if len(reference) <= 30 else None
    return (found[1] or found[2]).upper() if found else None


def leading_choice(answer: str) -> str | None:
    """The choice that ``answer``, which is nothing but an answer, begins with; None when it is none or several."""
    answer = without_style(answer[:200])
    found = _IN_BRACKETS.match(answer) or _BARE.match(answer) or _ALONE.match(answer)
    return found[1].upper() if found else None


def named_choice(text: str) -> str | None:
    """The choice of the last "option B" or "choice (B)" in ``text`` that is not said to be wrong."""
    named = [found[1] for found in _NAMED.finditer(text) if found[1].isupper() or "(" in found[0]]
    return named[-1].upper() if named else None
