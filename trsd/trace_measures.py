"""What a set of traces is made of, trace by trace: lengths, first derivation, reflections and coverage.

The analysis of "Distilling the Essence" (arXiv 2512.21002): sections as in its Table 2, the position of the first
derivation of the final answer (``derivations.py``) and the reflection cues before it (``reflections.py``).

Sections are tokens: the prompt with its think opener, the CoT (reasoning and close), the answer with its EOS. With P
prompt, R reasoning and N tokens in all, a derivation after d reasoning tokens stands at d / R of the CoT and at
(P + d) / N of the full sequence.

Coverage is a proxy for how much of a text the CoT takes up: the share of the text's distinct content words and numbers
that also occur in the CoT. Words are runs of at least three letters, in lower case, function words left out; numbers
compare without thousands separators. Synonyms and inflections are not seen.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from trsd.derivations import final_answer, first_derivation_tokens
from trsd.reflections import reflection_cues
from trsd.traces import Trace

_ITEM = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[^\W\d_]{3,}")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    about after again all also although and any are been before being between both but can could did does doing done
    down during each either every few for from further had has have having her here hers him his how however into its
    itself just less many may more most much must nor not now off once one only other our out over own per same she
    should some such than that the their them then there these they this those through too under until upon very was
    were what when where whether which while who whom whose why will with within without would you your
    """,
    )
)


class Measures(NamedTuple):
    """One trace, measured; the columns of traces.jsonl."""

    id: str
    prompt_tokens: int
    reasoning_tokens: int
    cot_tokens: int
    """Reasoning and close."""
    answer_tokens: int
    total_tokens: int
    answer: str | None
    """What was looked for: the reference answer, or else the one that is stated; None when neither is known."""
    correct: bool | None
    derivation_tokens: int | None
    """Reasoning tokens up to and including the first derivation; None when none is found."""
    derivation_in_cot: float | None
    derivation_in_full: float | None
    reflections: dict[str, int]
    """By cue, in the whole reasoning."""
    reflections_before: dict[str, int] | None
    """By cue, before the first derivation; None without one."""
    prompt_coverage: float | None
    answer_coverage: float | None

    def as_row(self) -> dict[str, Any]:
        """A json-ready row."""
        return self._asdict()


def measure_trace(trace: Trace, texts: Sequence[str]) -> Measures:
    """Everything above of one trace; ``texts`` are the ``token_texts`` of its tokenizer."""
    pieces = [texts[i] for i in trace.reasoning_ids]
    found = first_derivation_tokens(trace, texts)
    num_prompt, num_reasoning = len(trace.prompt_ids), len(trace.reasoning_ids)
    return Measures(
        id=trace.id,
        prompt_tokens=num_prompt,
        reasoning_tokens=num_reasoning,
        cot_tokens=num_reasoning + len(trace.close_ids),
        answer_tokens=len(trace.answer_ids),
        total_tokens=trace.num_tokens,
        answer=final_answer(trace),
        correct=trace.correct,
        derivation_tokens=found,
        derivation_in_cot=None if found is None else found / num_reasoning,
        derivation_in_full=None if found is None else (num_prompt + found) / trace.num_tokens,
        reflections=dict(reflection_cues("".join(pieces))),
        reflections_before=None if found is None else dict(reflection_cues("".join(pieces[:found]))),
        prompt_coverage=coverage(trace.question, trace.reasoning),
        answer_coverage=coverage(trace.answer, trace.reasoning),
    )


def content_items(text: str) -> set[str]:
    """The distinct content words and numbers of ``text``."""
    items = (item.lower() for item in _ITEM.findall(text))
    return {item.replace(",", "") for item in items if item not in _FUNCTION_WORDS}


def coverage(text: str, reasoning: str) -> float | None:
    """Share of the content words and numbers of ``text`` that occur in ``reasoning``; None when it has none."""
    wanted = content_items(text)
    return len(wanted & content_items(reasoning)) / len(wanted) if wanted else None
