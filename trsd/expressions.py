r"""Finding the mathematics at the beginning of a line, or in it where it begins with words.

``$18 per day`` states 18, ``9 × 2 = 18 dollars`` 18, ``(3, 4) and no other`` the pair, ``3x + 2`` itself. What runs on
behind a number (``3x``, ``5!``, ``10:30``, ``3, 5 and 7``) belongs to it, so that no part of an expression is taken
for the whole. Of an answer that stands alone, what only changes its looks, or names its unit, is taken away.
"""

import re
from collections.abc import Iterator

from trsd.plain_math import as_latex

_DELIMITED = re.compile(
    # A dollar before a space, or a closing one before a digit, is money: "$18 and $3".
    r"\$\$((?:\\.|[^$\\])+)\$\$|\$(?=\S)((?:\\.|[^$\\])+)(?<=\S)\$(?!\d)|\$\s+([^\s\d$](?:\\.|[^$\\])*)\$(?!\d)"
    r"|\\\((.+?)\\\)|\\\[(.+?)\\\]"
)
_JOINED = re.compile(r"\s*(?:,\s*)?(?:(?:and|or)\s+|(?<=,)\s*)(?=\$\s?[-\d\\(\[A-Za-z]|\\\()")
_NESTED = r"\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\])*\})*\})*\})*\}"
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan)|log|ln|sqrt|exp"
_SYMBOLS = r"(?:[kcm]m|ft|in|kg|mg|lbs?|oz|hrs?|min|sec|ms|mph|ml|am|pm|st|nd|rd|th)(?![a-z])"  # no product of letters
# What a list goes on with.
_BEGINS = rf"\s*(?:\\?\$)?(?:[-\d({{\[\\.]|(?:{_FUNCTIONS})(?![A-Za-z])|[A-Za-z](?![A-Za-z]|\s+[A-Za-z]{{2}}))"
_EXPRESSION = re.compile(
    rf"""(?:\s*(?:
        \.?\d+(?:[.,]\d+)*                                    # 1,200.50
      | \\begin\{{(\w+)\*?\}}.*?\\end\{{\1\*?\}}              # a matrix
      | \\(?:left|right)\s*\.
      | \\[A-Za-z]+ | \\[^\w\s()\[\]] | {_NESTED}
      | [-+*/^=_<>|)\]%$€£¢°≈]
      | (?<![\d%]\s)[(\[] | \((?=[^()A-Za-z=]*[a-z]\b[^()A-Za-z=]*\))  # "3 (x + 2)", but "18 (9 + 9)" is explained
      | (?<=[\w)}}])! | (?<=\d)\s*:\s*(?=\d)
      | ,(?:\s*(?:and|or)\b)?(?={_BEGINS}) | (?<=[\w)\]}}%])\s*\b(?:and|or)\b(?={_BEGINS})
      | (?<![A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z]) | (?<=\d)(?!{_SYMBOLS})[a-z]{{2,3}}(?![A-Za-z])
      | (?<=[\d)}}^_*+/=(|-])[A-Za-z](?![A-Za-z])            # "3x when", but not the article of "18 a day"
      | (?<![A-Za-z])[A-Za-z](?![A-Za-z'’&]|\s+[A-Za-z]{{2}})
    ))+""",
    re.VERBOSE,
)
_LOOSE_END = re.compile(r"(?:[-\s,:+*/^=_<>(\[|]|\\(?:times|cdot|pm)\b)+$")
_LOOSE_BEGINNING = re.compile(r"^[,\s>=|\]]*(?:(?:and|or)\b\s*)?")
_HOLDS_MATHEMATICS = re.compile(r"\d|\\[A-Za-z]|(?<![A-Za-z])[A-Za-z]\s*[-+*/^=]\s*[A-Za-z](?![A-Za-z])")
_REASON = re.compile(r"\b(?:because|since)\b", re.IGNORECASE)
_REASON_FIRST = re.compile(r"^(?:because|since)\b[^,]*,\s*", re.IGNORECASE)
_NEGATIVE = re.compile(r"\bnegative\s+(?=[\d$(\\])", re.IGNORECASE)
_MULTIPLE = re.compile(r"\s+(?:hundred|thousand|million|billion|trillion)\b")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_OPERATOR = r"(?:[-+*/]|\\times\b|\\cdot\b|[xX](?=\s))"
_UNIT_AND_OPERATOR = re.compile(rf"\s*/?[A-Za-z][A-Za-z'/ ]{{0,40}}(?=(?:{_OPERATOR}|=)\s*\$?[\d.(])")
_CALCULATED = re.compile(rf"[\d)%]\s*(?:[A-Za-z][A-Za-z'/ ]{{0,40}})?{_OPERATOR}")
_APPROXIMATELY = re.compile(r"≈|\\approx(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|(?<=[\d)])\s*[xX]\s*(?=[\d($])")
_MARKUP = re.compile(r"<<[^<>]*>>|</?[A-Za-z]\w*>|<\|[^<>]*\|>")  # GSM8K's "<<9*2=18>>", tags, special tokens
_FILLERS = re.compile(
    r"(?:(?:simply|exactly|therefore|thus|hence|clearly|only|also|just|indeed|about|approximately|roughly|given by"
    r"|equal to|that|it is|we have|we get|there are|there is)\b[\s:,]*|the\s+[a-z]+\s+(?=[-$\\(\[{\d]))+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\s.]*[A-Za-z]")
_BEHIND = re.compile(rf"\s*(?:{_OPERATOR}|=)\s*\$?[\d.,]*\d(?:\s*(?:{_OPERATOR}|=)\s*\$?[\d.,]*\d)*%?")
_NAME = re.compile(r"\s*[A-Za-z]\s*")
_PLAIN = re.compile(r"(?:\\?\$|[€£])?\s*(-?\s*[\d.,][\d.,/\s]*)(?:\$|[€£¢])?")
_TIDY = (
    (re.compile(r"(?<![.\\])(?<!\\left)(?<!\\right)\s*\.\s*$"), ""),  # a full stop, but neither "..." nor "\\right."
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|bf|displaystyle|textstyle)(?![A-Za-z])\s*|[€£¥¢]|\\(?:pounds|euro)\b"), ""),
    (re.compile(r"\^?°"), r"^\\circ "),
    (re.compile(r"^\\(?:text\w*|mathrm|mathbf)\s*\{\s*\([A-J]\)[~\s]*\}(?:\\ |[~\s])*(?=\S)"), ""),  # AMC's "(B) 12"
    (re.compile(r"(?<!\\)~"), " "),
)
_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}|\\[ ,;:]")
_UNIT = re.compile(
    r"(?<=\s)(?:an?\s+)?(?=[A-Za-z]*[aeiouAEIOU]|[A-Z]{3}\b|mph\b)(?![abcxyz]+\b)[A-Za-z]{3,}(?:[ /][A-Za-z]+){0,3}\s*"
    r"|\s*(?:\^\{?\\circ\}?\s*[CF]?|(?:[kcm]?m|ft|in|yd|mi|[km]?g|m?[lL]|s|h)(?:\^\{?[23]\}?)?"
    r"(?:/(?:[a-z]{3,}|s|h|m|kg|L)(?:\^\{?[23]\}?)?)?)\s*"
)
PRODUCT = re.compile(rf"-?[\d.,]+(?!{_SYMBOLS})[a-z]{{2,3}}")
"""Several letters behind a number: 3rs is no number of something called rs."""
# Words that make another number of the one before them.
_SCALE = re.compile(
    r"\b(?:(?:hundred|thousand|(?:m|b|tr)illion)s?|dozens?|hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten"
    r"|hundred|thousand|million)ths?|squared|cubed|factorial|and|or|plus|minus|times|over|divided|mod|modulo|choose|percent"
    r"|to|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|sqrt|exp|det|gcd|lcm|more|less|fewer|than|below|above|under|root|base"
    r"|pairs?|lakhs?|crores?|score|negative|one|two|three|four|five|six|seven|eight|nine|ten|\w+teen|\w+ty)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?(?:\([A-Ja-j]\)|[A-J][.:),]?(?=\s))\s*\(?(?=[-\d\\$.])")


def stated_expression(line: str) -> str | None:
    """The mathematics that ``line``, which follows "answer is", states; None where it holds neither number nor LaTeX.

    It is what the line begins with, words such as "simply" and "the interval" aside; where it begins with others, what
    is calculated in it, or else the first of it. Of arithmetic it is the right side.
    """
    line = _NEGATIVE.sub("-", as_latex(_MARKUP.sub("", line)).lstrip(" :~≈"))
    line = _REASON.split(_REASON_FIRST.sub("", line))[0]
    line = _FILLERS.sub("", _CHOICE.sub("", line, count=1), count=1)
    if delimited := _DELIMITED.match(line):
        return _list_from(line, delimited)
    first = _EXPRESSION.match(line)
    if first and _HOLDS_MATHEMATICS.search(first[0]):
        multiple = _MULTIPLE.match(line, first.end())
        return _value(_before_words(line, _whole_calculation(line, first))) + (multiple[0] if multiple else "")
    pieces = list(_pieces(line))
    calculated = [piece for piece in pieces if "=" in piece and _CALCULATED.search(piece.split("=")[0])]
    return _value([*calculated[-1:], *pieces][0]) if pieces else None


def _list_from(line: str, item: re.Match[str]) -> str:
    """What stands in dollars at the beginning of ``line``, and what is joined to it: "$3$ or $5$"."""
    items = [_inside(item)]
    while (joined := _JOINED.match(line, item.end())) and (item := _DELIMITED.match(line, joined.end())):
        items.append(_inside(item))
        end = item.end()
    if len(items) == 2 and "," in line[:end] and _WORD.match(line, end):  # "$5$, $x$ being positive"
        items.pop()
    return ", ".join(items) if len(items) > 1 else _right_side(items[0])


def _inside(delimited: re.Match[str]) -> str:
    return next(filter(None, delimited.groups())).strip(" ,")


def _whole_calculation(line: str, first: re.Match[str]) -> str:
    """``first``, or with what it is calculated with where units part that: "5 eggs * 3 = 15 eggs"."""
    found, whole = first, first[0]
    if "=" in whole or not _is_arithmetic(whole):
        return whole
    while (unit := _UNIT_AND_OPERATOR.match(line, found.end())) and (next_one := _BEHIND.match(line, unit.end())):
        found = next_one
        whole = line[first.start() : found.end()]
    calculated = "=" in whole and _CALCULATED.search(whole.split("=")[0])  # "75 minutes = 1.25 hours" is not
    return re.sub(r"/?[A-Za-z][A-Za-z'/ ]*(?=[-+*/=\\]|$)", " ", whole) if calculated else first[0]


def _before_words(line: str, whole: str) -> str:
    """``whole``, at the beginning of ``line``, or what is before its comma where words follow: "18, 9 from each"."""
    first, comma, _ = whole.partition(", ")
    alone = comma and whole.count(",") == 1 and not set("([{") & {*first} and line.startswith(whole)
    return first if alone and _WORD.match(line, len(whole)) else whole


def _pieces(line: str) -> Iterator[str]:
    """The expressions among the words of ``line``, ordinals apart."""
    place = 0
    while place < len(line):
        if line[place].isspace():
            place += 1
            continue
        found = _DELIMITED.match(line, place)
        if found:
            yield _inside(found)
        elif (found := _EXPRESSION.match(line, place)) and _ORDINAL.match(line, found.end()):
            pass
        elif found and _HOLDS_MATHEMATICS.search(found[0]):
            yield _whole_calculation(line, found)
        place = found.end() if found else place + 1


def _value(text: str) -> str:
    """What the expression ``text`` comes to: of arithmetic the right side, without what hangs on its ends."""
    text = _right_side(_LOOSE_BEGINNING.sub("", _LOOSE_END.sub("", text)).strip())
    if ")" in text and "(" not in text and "[" not in text:
        text = text.rstrip(") ")
    elif text.startswith("(") and ")" not in text and "]" not in text:
        text = text.lstrip("( ")
    plain = _PLAIN.fullmatch(text)
    return plain[1].strip() if plain else text


def _is_arithmetic(text: str) -> bool:
    """Whether ``text`` has no letters in it but those of commands and of units."""
    return not re.search(r"[A-Za-z]", _COMMAND.sub("", text))


def _right_side(text: str) -> str:
    """``text`` before an "approximately" and, of arithmetic and of "x = 5", the right side of the last "="."""
    parts = [part.strip() for part in _APPROXIMATELY.split(text) if part.strip()]
    text = next((part for part in parts if not _NAME.fullmatch(part)), text)
    *left, right = _EQUALS.split(text)
    calculated = left and _is_arithmetic("".join(left))
    named = len(left) == 1 and _NAME.fullmatch(left[0]) and _PLAIN.fullmatch(right.strip())
    return right.strip() if right.strip() and (calculated or named) else text


def tidied(text: str) -> str:
    """``text`` as LaTeX without what changes its looks alone: a full stop, bold letters, signs of currencies."""
    text = as_latex(text)
    for pattern, instead in _TIDY:
        text = pattern.sub(instead, text)
    return text.strip()


def without_unit(text: str) -> str:
    """The number of ``text`` where only words that name what is counted follow: "18 eggs a day", not "18 million"."""
    plain = _TEXT.sub(lambda words: words[1] or " ", text).strip()
    number = _PLAIN.match(plain)
    unit = plain[number.end() :] if number else ""
    return number[1].strip() if number and _UNIT.fullmatch(plain, number.end()) and not _SCALE.search(unit) else text
