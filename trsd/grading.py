"""Finding the final answer in a text and comparing it with the reference.

Forms, in this order: the last ``\\boxed{}``, the text behind the last ``####``, behind the last "answer is" or
"Answer:" (``expressions.py``), and the last number. Numbers compare as exact fractions, choices by their letter
(``choices.py``), words without their case (``word_answers.py``), other mathematics through math-verify, in a process of
its own and within limits (``math_checker.py``), with signs such as √ and ½ written as LaTeX (``plain_math.py``).
"""

import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Literal

from trsd.choices import leading_choice, named_choice, reference_choice
from trsd.errors import InputError
from trsd.expressions import PRODUCT, stated_expression, tidied, without_unit
from trsd.math_checker import shared_checker
from trsd.word_answers import as_words, begins_with

Form = Literal["boxed", "hashes", "stated", "number"]

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)"  # commas only where they part thousands: "3, 5" and "3,5" are lists
_NUMBER = re.compile(rf"(?:(?<![\d)\w])-)?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:\s*/\s*{_WHOLE})?")
_PLAIN_NUMBER = re.compile(rf"-?(?:{_WHOLE}(?:\.\d*)?|\.\d+)(?:/{_WHOLE})?")
_MIXED = re.compile(rf"(-?)\s*({_WHOLE})\s+(\d+)\s*/\s*(\d+)")
_MIXED_PLAIN = re.compile(r"(?<![\d.,_^])(\d+) +(\d+)/(\d+)(?![\d/])")
_LOOSE_SPACE = re.compile(r"(?<![,\d]) | (?!\d)|(?<!,) (?=\d{3}(?!\d))")  # "1 200" and "1 / 2", but "3 5" is two
# Markdown around words; in "2**3", "a^*b^*" and "3 * 4 * 5" the stars mean something.
_EMPHASIS = re.compile(r"(?<![\w*^\\)])(\*{1,3})(?=[^\s*])([^\n]{0,300}?[^\s*])\1(?![\w*])")
# "The answer is correct" judges an answer and states none.
_SAID = re.compile(
    r"answer\s*(?:is\s*:|is(?!\s*:)|:|(?=\n\s*(?:\$\$|\\\[)))(?!\s*(?:in)?correct\b|\s*(?:right|wrong|not)\b)\s*",
    re.IGNORECASE,
)
_DISPLAYED = re.compile(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", re.DOTALL)  # on lines of its own
_NEGATIVE_DASH = re.compile(r"(?<![\w)]) ?\N{EN DASH}(?=\s?[\d$])")
_CENTS = re.compile(r"(?<![\d.,/])(\d[\d,]*) dollars? (?:and )?(\d\d?) cents?\b")
_LAYOUT = (
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<!\\)(?:\\(?:left|right)(?![A-Za-z])|\\[,;: ]|\$)"), " "),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])"), ""),  # "3 1/2" is not "31/2", nor "\pi r" "\pir"
)
# "52_8" and "(1A)_{16}"; an index to a letter alone is no base.
_BASED = re.compile(r"\(?([\dA-Z]*\d[\dA-Z]*)\)?_(?:(\d)|\{(\d+)\})")
_DOLLAR = re.compile(r"(?<!\\)\$")
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
    form, answer = _find(text)
    if form is not None and form != "number":
        return answer
    if whole_text:
        return text.strip() or None
    return answer if last_number else None


def answer_form(text: str) -> Form | None:
    """The form in which ``extract_answer`` finds the answer of ``text``: "boxed", "hashes" (``####``), "stated"
    ("answer is", "Answer:", "option B"), "number" (only a last number), or None without any."""
    return _find(text)[0]


def has_format(text: str) -> bool:
    """Whether ``text`` states its answer in a form that was asked for: neither no answer nor only a last number."""
    return answer_form(text) not in ("number", None)


def _find(text: str, *, whole_text: bool = False) -> tuple[Form | None, str | None]:
    """The form in which ``text`` states its answer, and the answer; ``whole_text`` leaves out the last resorts."""
    text = _NEGATIVE_DASH.sub("-", text.replace("\N{MINUS SIGN}", "-"))
    text = _CENTS.sub(lambda sum_: f"{sum_[1]}.{sum_[2]:>02} dollars", text)
    boxed = last_boxed(text)
    if boxed:
        return "boxed", boxed
    text = _without_emphasis(text)
    if "####" in text:
        line, _, below = text.rsplit("####", 1)[1].strip().partition("\n")
        line = line[:MAX_ANSWER_LENGTH]
        said = next(_said(line), None)
        # Words with text below them are a Markdown heading, unless they alone say what the answer is.
        alone = said and stated_expression(said) and next(_said(below), None) is None
        if whole_text or not below.strip() or alone or as_fraction(line) is not None:
            line = said or line.strip()
            stated = None if as_words(line) else stated_expression(line)
            return ("hashes", stated or line) if line else (None, None)
    for rest in _said(text):
        if stated := stated_expression(rest) or leading_choice(rest):
            return "stated", stated
    if whole_text:
        return None, None
    if numbers := _NUMBER.findall(text):
        return "number", numbers[-1]
    stated = named_choice(text) or reference_choice(text) or next(filter(as_words, _said(text)), None)
    return ("stated", stated) if stated else (None, None)


def _without_emphasis(text: str) -> str:
    """``text`` less the stars and backticks that Markdown puts around words."""
    text = text.replace("`", "")
    for _ in range(3):  # bold in italics in bold
        text = _EMPHASIS.sub(r"\2", text)
    return text


def _said(text: str) -> Iterator[str]:
    """What follows each "answer is" on its line, the last one first."""
    end = len(text)
    for said in reversed(list(_SAID.finditer(text))):
        rest = text[said.end() : min(end, said.end() + MAX_ANSWER_LENGTH)]
        displayed = _DISPLAYED.match(rest)
        yield " ".join(displayed[0].split()) if displayed else rest.split("\n")[0].strip()
        end = said.start()


def _choice(text: str, *, last_resort: bool) -> str | None:
    """The letter that ``text`` chooses, found in the forms of ``extract_answer``, "option B", or as its last line."""
    boxed = last_boxed(text)
    if boxed:
        return leading_choice(boxed)
    if "####" in text and (choice := leading_choice(text.rsplit("####", 1)[1].strip().split("\n")[0])):
        return choice
    stated = next(filter(None, map(leading_choice, _said(text))), None) or named_choice(text)
    if stated or not last_resort:
        return stated
    return leading_choice(text.strip().rpartition("\n")[2].strip())


def _says(text: str, words: str, *, last_resort: bool) -> bool:
    """Whether ``text`` states these ``words``: boxed, behind ``####`` or the last "answer is", or as its last line."""
    if boxed := last_boxed(text):
        return as_words(boxed) == words
    text = _without_emphasis(text)
    if "####" in text:
        return begins_with(text.rsplit("####", 1)[1].strip(), words)
    for rest in islice(_said(text), 1):
        return begins_with(rest, words)
    return last_resort and as_words(text.strip().rpartition("\n")[2]) == words


def as_fraction(text: str) -> Fraction | None:
    """A plain number ("1,200", "$3.50", "7/8", "1 1/2", "12%" as 12) as an exact fraction; None for anything else."""
    cleaned = text.replace("\\$", "$").replace("\\%", "%").strip().strip("$%").rstrip(".,")
    cleaned = cleaned.replace("\\,", "").replace("\\!", "").replace("{,}", ",")
    if len(cleaned) > 60:
        return None
    if (mixed := _MIXED.fullmatch(cleaned)) and int(mixed[3]) < int(mixed[4]):
        value = int(mixed[2].replace(",", "")) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if mixed[1] else value
    cleaned = _LOOSE_SPACE.sub("", cleaned)
    if not _PLAIN_NUMBER.fullmatch(cleaned):
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
    last_resort = like is None or extract_answer(like, last_number=False) is None
    reference = extract_answer(gold, whole_text=True)
    if reference is None:
        return False
    wanted = reference_choice(reference)
    if wanted and (chosen := _choice(text, last_resort=last_resort)):
        return chosen == wanted
    if (words := as_words(reference)) and _says(text, words, last_resort=last_resort):
        return True
    answer = extract_answer(text, last_number=last_resort)
    if answer is None:
        return False
    exclaimed = answer.endswith("!") and answer_form(text) == "stated"  # a factorial, or a glad sentence's end
    return _equal(answer, reference) or (exclaimed and _equal(answer[:-1], reference))


def _equal(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, the same expression, or equal ones."""
    if answer == reference:
        return True
    if max(len(answer), len(reference)) > MAX_ANSWER_LENGTH:
        return False
    answer, reference = tidied(answer), tidied(reference)
    left, right = as_fraction(answer), as_fraction(reference)
    if left is None and right is not None:
        left = as_fraction(without_unit(answer))
    if left is not None and right is not None:
        return left == right or _share(answer, left) == _share(reference, right)
    if right is not None and PRODUCT.fullmatch(answer):
        return False
    left, right = _spelling(answer), _spelling(reference)
    if left == right != "":
        return True
    bases = _in_base(left), _in_base(right)
    return bases[0] == bases[1] if all(bases) else _verify(answer, reference)


def _share(text: str, value: Fraction) -> Fraction:
    """The ``value`` of the number ``text``, or a hundredth of it where that is a percentage."""
    return value / 100 if "%" in text else value


def _in_base(spelling: str) -> tuple[str, int] | None:
    """Digits and base of a number that names its base, of which math-verify compares the digits alone."""
    found = _BASED.fullmatch(spelling.replace("{,}", "").replace(",", ""))
    return (found[1].lstrip("0"), int(found[2] or found[3])) if found else None


def _spelling(text: str) -> str:
    """``text`` without what LaTeX only lays out: one spelling for what most answers write in several."""
    for pattern, instead in _LAYOUT:
        text = pattern.sub(instead, text)
    return text.strip()


def check_grader(golds: Iterable[str | None]) -> None:
    """Raise, before any work is done, when references need math-verify and it is not installed."""
    if _has_math_verify():
        return
    for gold in golds:
        if gold is not None and as_fraction(gold) is None and reference_choice(gold) is None:
            raise InputError(f"comparing answers with {gold!r} needs math-verify: pip install 'trsd[eval]'")


def num_undecided() -> int:
    """Answers that counted as wrong in this process because comparing them passed a limit of ``math_checker.py``."""
    return shared_checker().num_undecided


def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _verify(answer: str, reference: str) -> bool:
    """math-verify's judgement of two expressions; without it (numeric references only) an expression counts wrong."""
    if not _has_math_verify():
        warnings.warn(
            "math-verify is not installed, so answers that are no plain number count as wrong: "
            "pip install 'trsd[eval]'",
            stacklevel=2,
        )
        return False
    return bool(shared_checker().equal(_one_expression(answer), _one_expression(reference)))


def _one_expression(text: str) -> str:
    """``text`` as the inside of one pair of dollars: on one line, without dollars, and "1 1/2" as LaTeX has it."""
    return " ".join(_MIXED_PLAIN.sub(r"\1\\frac{\2}{\3}", _DOLLAR.sub("", text)).split())
