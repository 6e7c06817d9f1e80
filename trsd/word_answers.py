"""Answers that are words: True, no, Paris. They compare without their case.

Words are of three letters and more, or "no": ``xy`` and ``AB`` are mathematics.
"""

import re

from trsd.choices import without_style

MAX_LENGTH = 100  # characters of an answer
_WORDS = re.compile(r"(?:[^\W\d_]{3,}|no)(?:[ '-][^\W\d_]+){0,4}", re.IGNORECASE)
_END = re.compile(r"\s*(?:$|[.,;:!?)]|\n|(?:because|since|as)\b)")


def as_words(answer: str) -> str | None:
    """``answer`` in one spelling where it is nothing but a few words; None for anything else."""
    plain = without_style(answer).rstrip(".") if len(answer) <= MAX_LENGTH else ""
    return plain.casefold() if _WORDS.fullmatch(plain) else None


def begins_with(stated: str, words: str) -> bool:
    """Whether what follows "answer is" is these ``words`` (of ``as_words``), whatever reason comes after them."""
    plain = without_style(stated[: 2 * MAX_LENGTH]).casefold()
    return plain.startswith(words) and _END.match(plain, len(words)) is not None
