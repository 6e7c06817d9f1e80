"""Sentences of a text, and after how many of a trace's tokens they end; nothing is lost.

A sentence ends, the whitespace behind it included,

    at a line break (a run of them counts once),
    after . ! ? or an ellipsis, with closing quotes, brackets or markup behind it, before whitespace or the text's end,
    after the full-width stops, which no space follows.

It does not end inside 3.14, nor after an abbreviation ("e.g.", "Dr.") or the number of a list item ("2.", "b.") that
opens it. Whitespace at the beginning of a text belongs to its first sentence.

P-ALIGN (arXiv 2601.10064) splits at ". " and puts the dot back, so its prefixes are not quite what the teacher wrote;
here the pieces always join to the original, as text and as tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_OPENING = "\"'([{*_“‘"
_CLOSING = "\"'`)]}*_$’”»」』）】》"
_WORD = re.compile(rf"([^\s。！？]*(?:[。！？]+[{re.escape(_CLOSING)}]*)?)(\s*)")
_LIST_NUMBER = re.compile(r"(?:\d{1,3}|[A-Za-z])\.")
_ABBREVIATION = re.compile(r"(?:e\.g|i\.e|cf|vs|resp|approx|w\.r\.t|s\.t|eqs?|fig|dr|mrs?|ms|prof)\.", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, none of them empty, which join to ``text``."""
    found: list[str] = []
    start = 0  # of the sentence
    opens = True  # no word of the sentence was seen yet
    for match in _WORD.finditer(text):
        word, space = match.groups()
        if match.end() == len(text) or (word and _ends_sentence(word, space, opens)):
            if start < match.end():
                found.append(text[start : match.end()])
            start, opens = match.end(), True
        elif word:
            opens = False
    return found


def _ends_sentence(word: str, space: str, opens: bool) -> bool:
    """Whether a sentence ends with ``word`` and the ``space`` behind it; ``opens``: it begins with the word too."""
    bare = word.lstrip(_OPENING).rstrip(_CLOSING)
    if "\n" in space or "\r" in space or bare.endswith(("。", "！", "？")):
        return True
    if not space or not bare.endswith((".", "!", "?", "…")):
        return False
    return not (_ABBREVIATION.fullmatch(bare) or (opens and _LIST_NUMBER.fullmatch(bare)))


def sentence_token_ends(trace_reasoning_ids: Sequence[int], texts: Sequence[str]) -> list[int]:
    """After how many tokens each sentence ends: ascending, each once, the last one all of the tokens.

    A sentence takes the tokens that hold its words; tokens of whitespace behind them count towards the next one, since
    closers bring their own line break. A stop that several tokens spell, a byte each, is not seen.

    Args:
        trace_reasoning_ids: tokens of the reasoning.
        texts: the ``token_texts`` of the tokenizer.
    """
    ends = list(accumulate(len(texts[i]) for i in trace_reasoning_ids))
    found: list[int] = []
    position = 0
    for sentence in split_sentences("".join(texts[i] for i in trace_reasoning_ids)):
        found.append(bisect_left(ends, position + len(sentence.rstrip())) + 1)
        position += len(sentence)
    return sorted({*found[:-1], len(ends)} - {0})
