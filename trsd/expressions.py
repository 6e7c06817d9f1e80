r"""Finding the mathematics at the beginning of a line, or in it where it begins with words.

``$18 per day`` states 18, ``9 × 2 = 18 dollars`` 18, ``(3, 4) and no other`` the pair, ``3x + 2`` itself. What runs on
behind a number (``3x``, ``5!``, ``10:30``, ``3, 5 and 7``) belongs to it, so that no part of an expression is taken
for the whole. Of an answer that stands alone, what only changes its looks, or names its unit, is taken away.
"""

import re

from trsd.plain_math import as_latex

_DELIMITED = re.compile(
    # A dollar before a space, or a closing one before a digit, is money: "$18 and $3".
    r"\$\$((?:\\.|[^$\\])+)\$\$|\$(?=\S)((?:\\.|[^$\\])+)(?<=\S)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]"
)
_JOINED = re.compile(r"\s*(?:,\s*)?(?:(?:and|or)\s+|(?<=,)\s*)(?=\$\s?[-\d\\(\[A-Za-z]|\\\()")
_NESTED = r"\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\]|\{(?:\\.|[^{}\\])*\})*\})*\})*\}"
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan)|log|ln|sqrt|pi|exp|inf(?:inity)?"
_BEGINS = r"\s*(?:\\?\$)?(?:[-\d({\[\\.]|[A-Za-z](?![A-Za-z]|\s+[A-Za-z]{2}))"  # what a list goes on with
_EXPRESSION = re.compile(
    rf"""(?:\s*(?:
        \.?\d+(?:[.,]\d+)*                                    # 1,200.50
      | \\begin\{{(\w+)\*?\}}.*?\\end\{{\1\*?\}}              # a matrix
      | \\(?:left|right)\s*\.
      | \\[A-Za-z]+ | \\[^\w\s()\[\]] | {_NESTED}
      | [-+*/^=_<>|)\]%$€£¢°×÷·⋅±≤≥≠≈∞√αβπθ∪∩∈∅¼-¾⅐-⅞²³¹⁰⁴-⁹⁺⁻ⁿ₀-₉]
      | (?<![\d%]\s)[(\[] | \((?=[^()A-Za-z]*[a-z]\b[^()A-Za-z]*\))  # "3 (x + 2)", but "18 (9 + 9)" is explained
      | (?<=[\w)}}])! | (?<=\d)\s*:\s*(?=\d)
      | ,(?:\s*(?:and|or)\b)?(?={_BEGINS}) | (?<=[\w)\]}}%])\s*\b(?:and|or)\b(?={_BEGINS})
      | (?<![A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z]) | (?<=\d)[abcxyz]{{2,3}}(?![A-Za-z])
      | (?<=[\d)}}^_*+/=(|-])[A-Za-z](?![A-Za-z])            # "3x when", but not the article of "18 a day"
      | (?<![A-Za-z])[A-Za-z](?![A-Za-z'’&]|\s+[A-Za-z]{{2}})
    ))+""",
    re.VERBOSE,
)
_LOOSE_END = re.compile(r"[-\s,:+*/^=_<>(\[×÷·±]+$")
_LOOSE_BEGINNING = re.compile(r"^[,\s]*(?:(?:and|or)\b\s*)?")
_HOLDS_MATHEMATICS = re.compile(r"\d|\\[A-Za-z]|[αβπθ√∞∅¼-¾⅐-⅞²³¹⁰⁴-⁹₀-₉]")
_REASON = re.compile(r"\b(?:because|since)\b", re.IGNORECASE)
_UNIT_AND_OPERATOR = re.compile(r"\s*[A-Za-z][A-Za-z' ]{0,40}(?=[-+*/×÷=]\s*\$?[\d.(])")
_APPROXIMATELY = re.compile(r"≈|\\approx(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|(?<=[\d)])\s*[xX]\s*(?=[\d($])")
_NAME = re.compile(r"\s*[A-Za-z]\s*")
_PLAIN = re.compile(r"(?:\\?\$|[€£])?\s*(-?\s*[\d.,][\d.,/\s]*)(?:\$|[€£¢])?")
_TIDY = (
    (re.compile(r"(?<![.\\])(?<!\\left)(?<!\\right)\s*\.\s*$"), ""),  # a full stop, but neither "..." nor "\\right."
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|bf|displaystyle|textstyle)(?![A-Za-z])\s*|[€£¥¢]|\\(?:pounds|euro)\b"), ""),
    (re.compile(r"\^?°"), r"^\\circ "),
    (re.compile(r"(?<!\\)~"), " "),
)
_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}|\\[ ,;:]")
_UNIT = re.compile(r"(?<=\s)(?:an?\s+)?(?![abcxyz]+\b)[A-Za-z]{3,}(?:[ /][A-Za-z]+){0,3}\s*|\s*km/h\s*")
# Words that make another number of the one before them.
_SCALE = re.compile(
    r"\b(?:(?:hundred|thousand|(?:m|b|tr)illion)s?|dozens?|hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten"
    r"|hundred|thousand|million)ths?|squared|cubed|factorial|and|or|plus|minus|times|over|divided|mod|modulo|choose|percent"
    r"|to|sin|cos|tan|log|sqrt|exp)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?:\([A-Ja-j]\)|[A-J][.:)]?(?=\s))\s*\(?(?=[-\d\\$.])")


def stated_expression(line: str) -> str | None:
    """The mathematics that ``line``, which follows "answer is", states; None where it holds neither number nor LaTeX.

    It is what the line begins with, or the last of it where the line begins with words; of arithmetic, the right side.
    """
    line = _CHOICE.sub("", _REASON.split(line.lstrip(" :~≈"))[0], count=1)
    if delimited := _DELIMITED.match(line):
        return _list_from(line, delimited)
    first = _EXPRESSION.match(line)
    if first and _HOLDS_MATHEMATICS.search(first[0]):
        return _value(_whole_calculation(line, first))
    last = _last_piece(line)
    return last and _value(last)


def _list_from(line: str, item: re.Match[str]) -> str:
    """What stands in dollars at the beginning of ``line``, and what is joined to it: "$3$ or $5$"."""
    items = [_inside(item)]
    while (joined := _JOINED.match(line, item.end())) and (item := _DELIMITED.match(line, joined.end())):
        items.append(_inside(item))
    return ", ".join(items) if len(items) > 1 else _right_side(items[0])


def _inside(delimited: re.Match[str]) -> str:
    return next(filter(None, delimited.groups())).strip()


def _whole_calculation(line: str, first: re.Match[str]) -> str:
    """``first``, or with what it is calculated with where units part that: "5 eggs * 3 = 15 eggs"."""
    found, whole = first, first[0]
    if "=" in whole or not _is_arithmetic(whole):
        return whole
    while unit := _UNIT_AND_OPERATOR.match(line, found.end()):
        found = _EXPRESSION.match(line, unit.end())
        whole += found[0]
    return whole if "=" in whole[len(first[0]) :] else first[0]


def _last_piece(line: str) -> str | None:
    """The last expression among the words of ``line``."""
    last, place = None, 0
    while place < len(line):
        if line[place].isspace():
            place += 1
            continue
        found = _DELIMITED.match(line, place)
        piece = _inside(found) if found else None
        if not found and (found := _EXPRESSION.match(line, place)) and _HOLDS_MATHEMATICS.search(found[0]):
            piece = found[0]
        last = piece or last
        place = found.end() if found else place + 1
    return last


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
    text = next(filter(None, (part.strip() for part in _APPROXIMATELY.split(text))), text)
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
