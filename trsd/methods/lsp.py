"""Distilling the Essence (LSP, arXiv 2512.21002): learn from a part of each sequence, on the sections that matter.

A trace is one sequence s = prompt | CoT | answer, of which a truncation keeps a part, by default the leading fraction
f. A larger teacher and the student both run the kept tokens and nothing else:

    loss = mean_t [(1 - alpha) CE(s_t) + alpha T^2 KL(p_T(. | kept before t), p_S(. | kept before t))]         (1)

over the kept tokens t of the chosen sections, normalised by the whole step's count of them. The authors' soft term
leaves out the teacher's entropy: another value, the same gradient. The CoT is the reasoning with what closes it; the
prompt ends with the think opener. A close that was forced is not learnt. Sections and truncation combine: what a
section lost to the cut it does not learn.

Where two kept runs meet, the token behind the gap is no continuation of the one before it and is not learnt. Positions
behind the last one that learns are not run: nothing sees them. With alpha = 0 on CoT and answer this is plain
supervised fine-tuning, and there is no teacher.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from trsd.batching import Example
from trsd.errors import InputError
from trsd.traces import Trace
from trsd.truncation import Spans, Truncation

SECTIONS = ("p", "cot", "a")
CHOICES = ("a", "p+a", "cot", "cot+a", "p+cot", "p+cot+a")
NO_LABEL = "no token to learn is left by the cut"


def section_lengths(trace: Trace) -> tuple[int, int, int]:
    """Tokens of prompt, CoT and answer, one after the other the whole sequence."""
    return len(trace.prompt_ids), len(trace.reasoning_ids) + len(trace.close_ids), len(trace.answer_ids)


def kept_example(trace: Trace, trace_index: int, spans: Spans, sections: Iterable[str]) -> Example | None:
    """The kept tokens as one sequence that learns the chosen sections' tokens; None where none is left to learn.

    Args:
        trace: what is cut.
        trace_index: of the trace, for its teacher targets.
        spans: what is kept, in tokens of the whole sequence.
        sections: of "p", "cot" and "a".
    """
    ids = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids, *trace.answer_ids]
    lengths = dict(zip(SECTIONS, section_lengths(trace), strict=True))
    learnt = [name in sections for name, length in lengths.items() for _ in range(length)]
    if not trace.closed:
        close = len(trace.prompt_ids) + len(trace.reasoning_ids)
        learnt[close : close + len(trace.close_ids)] = [False] * len(trace.close_ids)
    kept: list[int] = []
    rows: list[int] = []
    for start, end in spans:
        # The token at start is predicted by nothing that stands right before it.
        rows.extend(len(kept) + place - start - 1 for place in range(start + 1, end) if learnt[place])
        kept.extend(ids[start:end])
    if not rows:
        return None
    return Example(
        trace_index=trace_index, input_ids=kept[: rows[-1] + 1], rows=rows, labels=[kept[row + 1] for row in rows]
    )


def lost_sections(trace: Trace, spans: Spans, sections: Iterable[str]) -> list[str]:
    """Chosen sections of which the cut left nothing."""
    found, start = [], 0
    for name, length in zip(SECTIONS, section_lengths(trace), strict=True):
        kept = sum(max(0, min(end, start + length) - max(begin, start)) for begin, end in spans)
        if name in sections and not kept:
            found.append(name)
        start += length
    return found


def learnable(
    traces: Sequence[Trace], truncation: Truncation, sections: Sequence[str]
) -> tuple[list[Trace], Counter[str], Counter[str]]:
    """(traces with something left to learn, dropped by reason, how many traces lost each chosen section to the cut)."""
    kept, dropped, lost = [], Counter(), Counter()
    for trace in traces:
        spans = truncation(trace)
        lost.update(lost_sections(trace, spans, sections))
        if kept_example(trace, 0, spans, sections) is None:
            dropped[NO_LABEL] += 1
        else:
            kept.append(trace)
    return kept, dropped, lost


class LSP:
    """Makes each step's examples, the same in every epoch."""

    def __init__(self, traces: Sequence[Trace], truncation: Truncation, sections: Sequence[str]) -> None:
        """Take the options of a run; ``traces`` are those that ``learnable`` kept."""
        self.traces = traces
        self.spans = [truncation(trace) for trace in traces]
        self.sections = sections

    def example(self, trace_index: int) -> Example:
        """The trace as student and teacher see it."""
        trace = self.traces[trace_index]
        found = kept_example(trace, trace_index, self.spans[trace_index], self.sections)
        if found is None:
            raise InputError(f"trace {trace.id}: {NO_LABEL}")
        return found

    teacher_example = example

    def examples(self, members: Sequence[tuple[int, int]]) -> list[Example]:
        """The examples of (epoch, trace index) pairs."""
        return [self.example(index) for _, index in members]
