r"""Where a chain of thought first derives its final answer: the earliest place it is computed, not merely quoted.

"Distilling the Essence" (arXiv 2512.21002) finds this place near the middle of the thought; this is a deterministic
finder of it. Every occurrence of the answer is tried from the left, and the first that counts is the derivation:

1. **Occurrence.** A numeric answer is compared by value with whole numbers of the text: 1,200 = 1200, $24 = 24.0 = 24%,
   7/8 = \frac{7}{8} = 0.875, signs included; a part of a longer number never matches, a fraction a/b only in lowest
   terms and for an answer that is no integer (else it is a division). Any other answer is compared as written, up to
   whitespace and LaTeX spacing. It must be complete: not an operand that goes on ("= 24 + 3", "24x", "24% of"), not an
   element of a list, no ordinal.
2. **Computed.** It stands right of an equality sign or arrow (=, ≈, ≡, →, \Rightarrow, ...), or of "is", "gives" and
   the like, and left of that, in the same clause or on the line before, is an operation on numbers without unknowns:
   "48/2 = 24", "<<48/2=24>>24", "half of 48 is 24". This always counts.
3. **Boxed.** It stands in \boxed{}. This always counts.
4. **Stated.** It stands right of an equality whose left side is no operation ("x = 24", "m + n = 24"), or first after
   concluding words ("answer is", "total is", "gives", "equals", "which makes", "so ... has"). This counts unless the
   question quotes the answer too, or the clause is a hypothesis, a guess, a denial or a question ("let x = 24",
   "maybe the answer is 24", "is it 24?"). An equation with unknowns on its left ("2x + 3 = 24") states nothing.

Limits: an intermediate result that equals the answer by chance is taken for it; numbers in words ("twelve"), million
and thousand, other forms of one expression (\sqrt2 for \sqrt{2}) and an answer left of its equality are not seen; an
answer that the question quotes is found only where it is computed or boxed, not where an equation is solved for it.
Unit letters ("5 m * 3") look like unknowns.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from math import gcd

from trsd.grading import extract_answer
from trsd.traces import Trace

_SPACE = r"[ \u00a0\u202f]"
_DIGITS = rf"(?:\d{{1,3}}(?:(?:,|\{{,\}}|\\,|\\!|{_SPACE})\d{{3}})+(?!\d)|\d+)"
_LITERAL = re.compile(
    rf"\\[dt]?frac\s*\{{\s*(?P<top>\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}}"
    rf"|(?<![\w.])(?P<number>{_DIGITS}(?:\.\d+)?|\.\d+)(?:\s*/\s*(?P<divisor>\d+)(?![\d.]))?"
)
_MINUS = re.compile(r"[-−]\s*(?:\\?[$€£])?\Z")
_OPERAND_BEFORE_MINUS = re.compile(r"[\w)\]}%$!]\s*\Z")
_ANNOTATED = re.compile(r"\s*>>")
# What belongs to a result: the number that an annotation repeats, the percent sign, the end of its box.
_CLOSED = re.compile(rf"(?:\s*>>\s*\\?[$€£]?\s*-?(?:{_DIGITS}(?:\.\d+)?|\.\d+)?)?(?:\s?\\?%)?(?:[$\s]*\}})?")

_OPERATOR = r"(?:[-+−*/×÷·•^]|\\(?:times|cdot|div|pm)\b|[xX](?=\s*\W*\d))"
_GOES_ON = re.compile(
    rf"""
    [a-zA-Z](?![a-zA-Z])                                # 24x
    | (?:st|nd|rd|th)\b                                 # 24th
    | [_^(]|!\s*[-+*/=] | :\d | [–-]\d                  # 24^2, 24(3), 24! =, 24:30, 24-30
    | \s*\\(?:sqrt|pi|binom|left|theta|alpha|beta|[dt]?frac)(?![a-z])
    | \s*(?:\\?%|percent)\s*of\s+\W{{0,2}}\d
    | (?:[\s$%)\]}}°]|\\[%,;:!)\] ]|\\text\s*\{{[^{{}}\n]*\}})*(?:[a-zA-Z]{{2,}}\s+){{0,3}}{_OPERATOR}\s*
      [$\\({{\[]*(?:\d|[a-zA-Z](?![a-zA-Z])|(?<=\\)[a-zA-Z]{{2,}})  # 24 + 3, 24 apples + 3 apples, 24 \cdot x
    | (?:[\s$%)\]}}]|\\[%,;:!)\] ])*(?:times|plus|minus|divided\s+by|multiplied\s+by)\s+\W{{0,3}}\d
    | ,\s*-?\d+\s*(?:,|and\b|or\b)                      # 24, 25, 26
    """,
    re.VERBOSE,
)
_OPENED = re.compile(r"[(\[{][^)\]}]*\Z")
_CASE = re.compile(r"[\s$)*]*:")  # "n = 24: ...", one of the cases tried
_AROUND = " $&\\(){}-\n"
_LISTED = re.compile(r"\s*,\s*\S")

_BEFORE_RESULT = r"""(?:[\s$€£¥&{(\[~*]|\\[,;:!$\s]|\\(?:left|text|textbf|mathbf|boxed|quad|displaystyle)\b
    |<<[^<>\n]*>>|about\b|approximately\b|roughly\b)*\Z"""
_EQUALITY = re.compile(
    r"(?P<sign>=>|-+>|(?<![<>!:=])={1,2}|[≈≅≡→⇒⟹]|\\(?:approx|equiv|simeq|to|implies|[lL]?ong[rR]ightarrow|[rR]ightarrow)"
    rf"(?![a-z])){_BEFORE_RESULT}",
    re.VERBOSE,
)
_BOXED = re.compile(r"\\boxed\s*\{(?:[\s$]|\\\$|\\text\s*\{)*\Z")
_LEFT_EDGE = re.compile(
    r"[\n;?!]|\.\s|,\s|:\s|=|[≈≡→⇒⟹]|\\(?:approx|equiv|implies|Rightarrow)\b|<<"
    r"|\b(?:so|then|that|gives?|giving|gets?|obtain|have|means|find)\b"
)
_SENTENCE_EDGE = re.compile(r"[\n?!]|\.(?!\d)")

_WORD_OPERATION = re.compile(
    r"\b(?:half|twice|double|triple|quarter|third|times|divided\s+by|plus|minus|added\s+to|choose|mod|sum|product)\b"
    r"|%\s+of\b|\\(?:[dt]?frac|sqrt|binom|sum|prod|log|lfloor|lceil|pmod|bmod)(?![a-z])|\b[a-z]{2,}\(|\d!"
    r"|√|\d\s+of\b"
)
_OPERATION = re.compile(
    r"[\d)\]}%$a-z]\s*(?:[+−*/×÷·•^]|\\(?:times|cdot|div)\b)\s*[\d($\\.{\[a-zA-Z]"
    r"|[\d)\]}%$]\s*(?:[a-z]{2,}\s+){0,3}[-–]\s*[\d($\\.{\[]|\s[-–]\s"
    r"|[\d)\]}%]\s*[xX]\s*[\d($\\.]"
)
_NOT_UNKNOWN = re.compile(
    r"\\(?:text|mathrm|mathbf)\s*\{[^{}]*\}|\\[a-zA-Z]+|_\{[^{}]*\}|_\w|['’]s\b|\b[aAI]\s(?=[a-zA-Z]{2}|[\d$€£])"
    r"|(?<=[\d)\]}%$\s])[xX](?=\s*[\d($\\.])|(?<=\d)\s+[mgLlhsk]\b(?!\s*[=^(])|(?<=[a-zL])/[hsL]\b|\b[A-Za-z]\([^()]*\)"
)
_UNKNOWN = re.compile(  # a letter beside an operator, a digit or a bracket
    r"(?:[\d)(+−*/×÷·•^=]|-\s)\s*(?<![A-Za-z])[A-Za-z](?![A-Za-z]|-[A-Za-z]{2})"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z])\s*(?:[+−*/×÷·•^()]|-\s?\d|-\s)"
)

_GAP = r"[^\d=+×÷^/.?!\n<>]"
_SAYS = (
    r"\b(?:gives?|giving|gave|equals?|equal\s+to|yields?|yielding|makes?|making|leaves?|leaving|left\s+with"
    r"|results?\s+in|comes?\s+(?:out\s+)?to|amounts?\s+to|adds?\s+up\s+to|sums?\s+to|totals?|totaling"
    r"|(?:we|I|you|they|to)\s+(?:get|obtain|have|find)|rounds?\s+(?:up\s+|down\s+)?to)\b"
)
_CONCLUDES = re.compile(
    rf"\banswer\b[^\d.?!\n]{{0,30}}?(?:\b(?:is|be|was)\b|:){_GAP}{{0,20}}\Z"
    rf"|{_SAYS}{_GAP}{{0,25}}\Z"
    r"|\b(?:total|sum|result|difference|product|remainder|quotient|average|value|number|amount|cost|price)\b"
    rf"[^\d.?!\n]{{0,40}}?\b(?:is|are|was|be)\b{_GAP}{{0,20}}\Z"
    r"|\b(?:so|thus|therefore|hence|altogether|in\s+total|overall|consequently)\b"
    rf"{_GAP}{{0,60}}?\b(?:has|have|had|is|are|was|were|needs?|gets?|earns?|costs?|be|left|takes?|spen[dt]s?)\b"
    rf"{_GAP}{{0,25}}\Z",
    re.IGNORECASE,
)
_IS = re.compile(
    rf"(?:\b(?:is|are|was|were|makes?|gives?|equals?|leaves?|yields?|equal\s+to|comes?\s+to|totals?)\b){_GAP}{{0,15}}\Z",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(
    r"\b(?:if|let|suppose|assum\w*|when|whether|try|say|maybe|perhaps|guess|probably|might|could|where|given|since)\b"
    r"|\bfor\s+\S{1,8}\s*\Z",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:if|suppose|assum\w*|whether|maybe|perhaps|guess\w*|probably|might|could|suspect|recall|expect|hope|not"
    r"|isn['’]t|wrong|unless|since)\b",
    re.IGNORECASE,
)
_CONSEQUENCE = re.compile(r"\b(?:then|so|thus|therefore|hence|gives?|get)\b|[→⇒⟹]|=>|\\(?:implies|Rightarrow)", re.I)
_LONGEST_NUMBER = 100  # characters; thinking that runs in circles writes longer ones, which int() refuses
_WINDOW = 240  # characters looked at on either side


def find_first_derivation(reasoning: str, answer: str, *, question: str = "") -> int | None:
    r"""The character offset just behind the first derivation of ``answer`` in ``reasoning``; None without one.

    Args:
        reasoning: the chain of thought.
        answer: the final answer alone: a number, or an expression such as ``3\sqrt{2}``.
        question: what was asked; an answer it quotes counts only where it is computed or boxed.
    """
    answer = _bare(answer)
    if not answer:
        return None
    value = _value(answer)
    pattern = None if value is not None else _expression(answer)
    quoted = next(_occurrences(question, value, pattern), None) is not None
    for start, end in _occurrences(reasoning, value, pattern):
        if _goes_on(reasoning, start, end):
            continue
        if _counts(reasoning, start, end, quoted=quoted, symbolic=value is None):
            return _CLOSED.match(reasoning, end).end()
    return None


def first_derivation_tokens(trace: Trace, texts: Sequence[str]) -> int | None:
    """How many reasoning tokens of ``trace`` it takes until the answer is derived; None when it never is, or unknown.

    Args:
        trace: its answer is ``gold``, or else what its answer text states.
        texts: ``token_texts`` of its tokenizer.

    Returns:
        The count of tokens up to and including the derivation, 1 to ``len(trace.reasoning_ids)``.
    """
    answer = final_answer(trace)
    if answer is None:
        return None
    pieces = [texts[i] for i in trace.reasoning_ids]
    offset = find_first_derivation("".join(pieces), answer, question=trace.question)
    return None if offset is None else bisect_left(list(accumulate(map(len, pieces))), offset) + 1


def final_answer(trace: Trace) -> str | None:
    """The reference answer of ``trace``, or else the one its answer text states."""
    return extract_answer(trace.answer) if trace.gold is None else extract_answer(trace.gold, whole_text=True)


def _bare(answer: str) -> str:
    r"""The answer without dollars, "x =", degrees and units."""
    text = answer.strip().strip("$").strip().rstrip(".").replace("\\$", "").replace("\\%", "%")
    text = re.sub(r"^\s*[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\s*(?:\^\s*\{?\\circ\}?|°)\s*$", "", text).strip()
    return re.sub(r"^([-−]?[$€£]?[\d,]*\.?\d+)\s+[a-zA-Z]{2,}.*$", r"\1", text)


def _value(answer: str) -> Fraction | None:
    """A numeric answer's value, a percent as its number; None for an expression."""
    sign, text = (-1, answer[1:]) if answer[:1] in ("-", "−") else (1, answer)
    text = text.strip().strip("$€£").rstrip("%").strip()
    match = _LITERAL.fullmatch(text)
    found = None if match is None else _literal_value(match)
    return None if found is None else sign * found


def _literal_value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _LONGEST_NUMBER:
        return None
    if match["top"]:
        return Fraction(int(match["top"]), int(match["bottom"])) if int(match["bottom"]) else None
    number = Fraction(re.sub(rf",|\{{,\}}|\\,|\\!|{_SPACE}", "", match["number"]))
    if match["divisor"] is None:
        return number
    return number / int(match["divisor"]) if int(match["divisor"]) else None


def _expression(answer: str) -> re.Pattern[str]:
    """``answer`` as written, up to whitespace, LaTeX spacing and the size of its brackets."""
    answer = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]", "", answer)
    tokens = re.findall(r"\\[a-zA-Z]+|\d+|[a-zA-Z]+|\S", answer)
    filler = r"(?:\s|\\[,;:! ]|\\(?:left|right)(?![a-zA-Z])|\\(?:text|mathrm)\s*\{)*"
    parts = [r"\\[dt]?frac" if token in ("\\frac", "\\dfrac", "\\tfrac") else re.escape(token) for token in tokens]
    before = r"(?<![\w\\.])" if tokens[0][0].isalnum() else ""
    return re.compile(before + filler.join(parts) + (r"(?![\w])" if tokens[-1][-1].isalnum() else ""))


def _occurrences(text: str, value: Fraction | None, pattern: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """(start, end) of every occurrence, sign included."""
    if pattern is not None:
        yield from (match.span() for match in pattern.finditer(text))
        return
    for match in _LITERAL.finditer(text):
        found = _literal_value(match)
        if found is None or found != abs(value) or not _is_number(match, value):
            continue
        start, before = match.start(), text[max(0, match.start() - 20) : match.start()]
        minus = _MINUS.search(before)
        negative = bool(minus) and not _OPERAND_BEFORE_MINUS.search(before[: minus.start()])
        if negative == (value < 0):
            yield start - (len(before) - minus.start() if negative else 0), match.end()


def _is_number(match: re.Match[str], value: Fraction) -> bool:
    """Whether the literal stands for a number and not for a division."""
    top, bottom = (match["top"], match["bottom"]) if match["top"] else (match["number"], match["divisor"])
    if bottom is None:
        return True
    return value.denominator != 1 and top.isdigit() and gcd(int(top), int(bottom)) == 1


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether what stands at ``start`` to ``end`` is only a part of something: an operand, an element, an ordinal."""
    if _ANNOTATED.match(text, end):
        return False
    if _GOES_ON.match(text, end):
        return True
    return bool(_OPENED.search(text[max(0, start - 3) : start]) and _LISTED.match(text, end))


def _counts(text: str, start: int, end: int, *, quoted: bool, symbolic: bool) -> bool:
    """Whether the complete occurrence is a derivation."""
    before = text[max(0, start - _WINDOW) : start]
    if _BOXED.search(before):
        return True
    sentence = _tail(before, _SENTENCE_EDGE)
    if equality := _EQUALITY.search(before):
        left = _left_side(before[: equality.start("sign")])
        operation = _is_operation(left)
        if operation and (symbolic or not _has_unknown(left)):
            return True
        if (
            quoted
            or _CASE.match(text, end)
            or left.strip(_AROUND) == text[start:end].strip(_AROUND)
            or (_is_equation(left) and not symbolic)
        ):
            return False
        return not _supposed(sentence[: sentence.rfind(equality["sign"])])
    verb = _IS.search(sentence)
    if verb and _is_operation(clause := _subject(sentence[: verb.start()])) and not _has_unknown(clause):
        return not _asked(text, end)
    concluded = _CONCLUDES.search(sentence)
    return bool(concluded) and not quoted and not _HEDGE.search(sentence) and not _asked(text, end)


def _tail(text: str, edge: re.Pattern[str]) -> str:
    """What follows the last ``edge`` in ``text``."""
    last = 0
    for match in edge.finditer(text):
        last = match.end()
    return text[last:]


def _left_side(before: str) -> str:
    """The left side of an equality: back to the clause's begin, on the line before where its own is empty."""
    side = _tail(before, _LEFT_EDGE)
    if not side.strip(" &\\$"):
        side = _tail(before.rstrip(" &\\$\n="), _LEFT_EDGE)
    return side


def _subject(before: str) -> str:
    """What "is" a number: the clause before it, and for "which", "that" and "this" the clause they refer to."""
    referred = re.sub(r"[,;:.(\s]*\b(?:which|that|this|it)\s*\Z", "", before, flags=re.IGNORECASE)
    return _left_side(referred)


def _is_operation(left: str) -> bool:
    return any(c.isdigit() for c in left) and bool(_OPERATION.search(left) or _WORD_OPERATION.search(left))


def _has_unknown(left: str) -> bool:
    return bool(_UNKNOWN.search(_NOT_UNKNOWN.sub(" ", left)))


def _is_equation(left: str) -> bool:
    """Numbers and unknowns together, such as 2x + 3: an equation to solve, not a result."""
    bare = _NOT_UNKNOWN.sub(" ", left)
    return bool(_UNKNOWN.search(bare)) and any(c.isdigit() for c in bare)


def _supposed(sentence: str) -> bool:
    """Whether what the sentence goes on to equate is a hypothesis, and no consequence of one."""
    found = list(_HYPOTHESIS.finditer(sentence))
    return bool(found) and not _CONSEQUENCE.search(sentence, found[-1].end())


def _asked(text: str, end: int) -> bool:
    """Whether the sentence ends in a question mark."""
    edge = _SENTENCE_EDGE.search(text, end, end + _WINDOW)
    return edge is not None and edge.group() == "?"
