"""Self-reflection cues in a chain of thought, those of "Distilling the Essence" (arXiv 2512.21002).

Whole words in any case, in their inflections (rechecks, rechecked, rechecking; rethought; reassessment), with any
hyphen or none where the cue has one, and any whitespace between words. ``wait`` is taken as it is: who is waiting or
waited belongs to a story. No text counts twice: "double-check again" is one double-check.
"""

import re
from collections import Counter

_HYPHEN = r"[-\u2010\u2011]"
_VERB = r"(?:s|ed|ing)?"
_CUES = {
    "recheck": rf"re{_HYPHEN}?check{_VERB}",
    "rethink": r"rethink(?:s|ing)?|rethought",
    "reassess": r"reassess(?:es|ed|ing|ments?)?",
    "reevaluate": r"reevaluat(?:e|es|ed|ing)",
    "re-evaluate": rf"re{_HYPHEN}evaluat(?:e|es|ed|ing)",
    "reevaluation": rf"re{_HYPHEN}?evaluations?",
    "re-examine": rf"re{_HYPHEN}examin(?:e|es|ed|ing|ations?)",
    "reexamine": r"reexamin(?:e|es|ed|ing|ations?)",
    "reconsider": rf"reconsider(?:{_VERB}|ations?)",
    "reanalyze": rf"re{_HYPHEN}?analy(?:[sz](?:e|es|ed|ing)|sis)",
    "double-check": rf"double(?:{_HYPHEN}|\s+)check{_VERB}",
    "check again": rf"check{_VERB}\s+again",
    "think again": r"think(?:s|ing)?\s+again",
    "verify again": r"verif(?:y|ies|ied|ying)\s+again",
    "go over the steps": r"go(?:es|ing)?\s+over\s+the\s+steps",
    "wait": r"wait",
}
CUES = tuple(_CUES)
_GROUPS = "|".join(f"(?P<cue{index}>{pattern})" for index, pattern in enumerate(_CUES.values()))
_ANY = re.compile(rf"(?<!\w)(?<!\w-)(?:{_GROUPS})(?!\w)", re.IGNORECASE)


def reflection_cues(text: str) -> Counter[str]:
    """How often each cue of ``CUES`` stands in ``text``; cues that do not are left out."""
    return Counter(CUES[int(match.lastgroup.removeprefix("cue"))] for match in _ANY.finditer(text))


def count_reflections(text: str) -> int:
    """How many self-reflection cues stand in ``text``."""
    return reflection_cues(text).total()
