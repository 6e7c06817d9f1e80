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

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)"  # commas only where they part thousands: "3, 5" and "3,5" are lists
_NUMBER = re.compile(rf"(?:(?<![\d)\w])-)?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:\s*/\s*{_WHOLE})?")
_PLAIN_NUMBER = re.compile(rf"-?(?:{_WHOLE}(?:\.\d*)?|\.\d+)(?:/{_WHOLE})?")
_LATEX = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
# "The answer is correct" judges an answer and states none.
_SAID = re.compile(r"answer\s*(?:is|:)(?!\s*(?:in)?correct\b|\s*(?:right|wrong|not)\b)\s*", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")

MAX_ANSWER_LENGTH = 1000
"""Characters of a final answer. Thinking that runs in circles writes lines of any length, and parsing takes seconds."""


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last closed ``\boxed{...}``, braces balanced; None without a closed one."""
    opened: list[tuple[int, bool]] = []
    found = None
    for brace in _BRACES.finditer(text):
        if brace[0] in ("\\{", "\\}"):  # braces that are printed do not group
            continue
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            begin, boxed = opened.pop()
            if boxed and (found is None or begin > found[0]):
                found = begin, text[begin : brace.start()].strip()
    return found and found[1]


def extract_answer(text: str, *, whole_text: bool = False, last_number: bool = True) -> str | None:
    """The final answer a text states, or None.

    Args:
        text: a model's answer, or a data set's answer column.
        whole_text: a text in no known form is itself the answer (for reference columns such as ``{1, 2}``).
        last_number: the last number of a text in no known form is taken for its answer.
    """
    boxed = last_boxed(text)
    if boxed:
        return boxed
    if "####" in text:
        line, _, below = text.rsplit("####", 1)[1].strip().partition("\n")
        # Words with text below them are a Markdown heading.
        if whole_text or not below.strip() or as_fraction(line) is not None:
            return line.strip() or None
    end = len(text)
    for said in reversed(list(_SAID.finditer(text))):
        stated = _stated(text[said.end() : min(end, said.end() + MAX_ANSWER_LENGTH)].split("\n")[0].strip())
        if stated:
            return stated
        end = said.start()
    if whole_text:
        return text.strip() or None
    numbers = _NUMBER.findall(text) if last_number else []
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
    cleaned = text.strip().strip("$%").replace("\\$", "").replace("\\%", "").rstrip(".,")
    cleaned = re.sub(r"(?<!,) ", "", cleaned)
    if not cleaned or len(cleaned) > 60 or not _PLAIN_NUMBER.fullmatch(cleaned):
        return None
    numerator, _, denominator = cleaned.replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)


def grade(text: str, gold: str, *, like: str | None = None) -> bool:
    """Whether the final answer stated in ``text`` equals the reference ``gold``.

    ``like``: an answer to the same question; where it states its own in a known form, the last number of ``text`` will
    not do for one.
    """
    last_number = like is None or extract_answer(like, last_number=False) is None
    answer, reference = extract_answer(text, last_number=last_number), extract_answer(gold, whole_text=True)
    if answer is None or reference is None:
        return False
    if answer == reference:
        return True
    left, right = as_fraction(answer), as_fraction(reference)
    if left is not None and right is not None:
        return left == right
    return len(answer) <= MAX_ANSWER_LENGTH and _verify(answer, reference)


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
