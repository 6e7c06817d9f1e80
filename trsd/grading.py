"""Finding the final answer in a text and comparing it with the reference.

Forms, in this order: the last ``\\boxed{}``, the text behind the last ``####``, behind the last "answer is" or
"Answer:", and the last number. Numbers compare as exact fractions, other mathematics through math-verify.
"""

import importlib.util
import re
import warnings
from collections.abc import Iterable
from fractions import Fraction

from trsd.errors import InputError

_NUMBER = re.compile(r"(?:(?<![\d)\w])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d[\d,]*)?")
_LATEX = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_SAID = re.compile(r"answer\s*(?:is|:)\s*", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last ``\boxed{...}``, braces balanced; None without a closed one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index].strip()
    return None


def extract_answer(text: str, *, whole_text: bool = False) -> str | None:
    """The final answer a text states, or None.

    Args:
        text: a model's answer, or a data set's answer column.
        whole_text: a text in no known form is itself the answer (for reference columns such as ``{1, 2}``).
    """
    boxed = last_boxed(text)
    if boxed:
        return boxed
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0].strip() or None
    for said in reversed(list(_SAID.finditer(text))):
        stated = _stated(text[said.end() :].strip().split("\n")[0])
        if stated:
            return stated
    if whole_text:
        return text.strip() or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _stated(rest: str) -> str | None:
    """The answer at the beginning of what follows "answer is": mathematics in dollars, an expression, or a number."""
    latex = _LATEX.match(rest)
    if latex:
        return (latex[1] or latex[2]).strip() or None
    number = _NUMBER.search(rest)
    if number is None and "\\" not in rest:
        return None
    if "\\" in rest or re.match(r"\s*[-+*^=]", rest[number.end() :]):
        return rest.rstrip(". ")
    return number.group()


def as_fraction(text: str) -> Fraction | None:
    """A plain number ("1,200", "$3.50", "7/8", "12%" as 12) as an exact fraction; None for anything else."""
    cleaned = (
        text.strip().strip("$%").replace("\\$", "").replace("\\%", "").replace(",", "").replace(" ", "").rstrip(".")
    )
    if not cleaned or len(cleaned) > 60 or not re.fullmatch(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?", cleaned):
        return None
    numerator, _, denominator = cleaned.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)


def grade(text: str, gold: str) -> bool:
    """Whether the final answer stated in ``text`` equals the reference ``gold``."""
    answer, reference = extract_answer(text), extract_answer(gold, whole_text=True)
    if answer is None or reference is None:
        return False
    if answer == reference:
        return True
    left, right = as_fraction(answer), as_fraction(reference)
    if left is not None and right is not None:
        return left == right
    return _verify(answer, reference)


def check_grader(golds: Iterable[str | None]) -> None:
    """Raise, before any work is done, when references need math-verify and it is not installed."""
    if importlib.util.find_spec("math_verify"):
        return
    for gold in golds:
        if gold is not None and as_fraction(gold) is None:
            raise InputError(f"comparing answers with {gold!r} needs math-verify: pip install 'trsd[eval]'")


def _verify(answer: str, reference: str) -> bool:
    """math-verify's judgement of two expressions; without it (numeric references only) an expression counts wrong."""
    try:
        from math_verify import parse, verify
    except ImportError:
        warnings.warn(
            "math-verify is not installed, so answers that are no plain number count as wrong: "
            "pip install 'trsd[eval]'",
            stacklevel=2,
        )
        return False
    return bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))
