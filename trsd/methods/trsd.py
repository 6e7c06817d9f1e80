"""Truncated-Reasoning Self-Distillation (arXiv 2603.13274): the same answer, after less thinking.

The teacher, a frozen copy of the student, answered y after its whole reasoning r; the student sees only r[:c]:

    loss = mean_t D(p_T(y_t | x, r, y_<t), p_S(y_t | x, r[:c], closer, y_<t)),    t over the answer tokens     (1)

The first supervised position is the last closer token, which predicts y_1. Student and teacher rows belong together by
answer position; their absolute positions differ. A cut that keeps all of r keeps the trace's own close too.

Nothing in (1) holds the thinking itself in place, and a small student trained on it alone forgets how to think. So an
example may also learn the reasoning it is shown, by cross-entropy on the teacher's own tokens:

    loss + thinking_weight * mean_s CE(r_s | x, r_<s),    s over the reasoning tokens shown                    (2)

A forward pass computes those positions anyway, and for traces sampled at temperature 1 the term is an unbiased estimate
of KL(teacher || student) on the reasoning (plus the teacher's entropy): it asks for nothing new.

A trace may be cut at several places in one step. Its examples then share the trace's forward pass: the longest is run
whole and the others branch off it at their cuts. Loss and gradient are those of the separate examples.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from trsd.batching import Branch, Example
from trsd.cuts import CutPolicy, cut_generator, snap
from trsd.sentences import sentence_token_ends
from trsd.thinking import ThinkFormat
from trsd.traces import Trace


def full_example(trace: Trace, trace_index: int) -> Example:
    """What the teacher sees: the whole trace, its answer tokens as labels."""
    context = [*trace.prompt_ids, *trace.reasoning_ids, *trace.close_ids]
    return _answer_example(context, trace, trace_index)


def cut_example(trace: Trace, trace_index: int, cut: int, think: ThinkFormat) -> Example:
    """What the student sees: the first ``cut`` reasoning tokens, the closer, and the answer to learn."""
    if not 0 <= cut <= len(trace.reasoning_ids):
        raise ValueError(f"trace {trace.id}: cut {cut} is outside its {len(trace.reasoning_ids)} reasoning tokens")
    if cut == len(trace.reasoning_ids):
        return full_example(trace, trace_index)
    context = [*trace.prompt_ids, *trace.reasoning_ids[:cut], *think.closer_ids]
    return _answer_example(context, trace, trace_index)


def with_thinking(example: Example, trace: Trace, cut: int) -> Example:
    """``example`` that also learns the reasoning it is shown; the whole one with its close, unless that was forced."""
    shown = trace.reasoning_ids[:cut]
    if cut == len(trace.reasoning_ids) and trace.closed:
        shown = [*shown, *trace.close_ids]
    return replace(example, thinking_start=len(trace.prompt_ids) - 1, thinking_labels=shown)


def _answer_example(context: list[int], trace: Trace, trace_index: int) -> Example:
    # The last answer token is a label only: nothing is predicted from it.
    return Example(trace_index=trace_index, input_ids=[*context, *trace.answer_ids[:-1]], labels=list(trace.answer_ids))


def branched_examples(
    trace: Trace, trace_index: int, cuts: Sequence[int], think: ThinkFormat, *, max_tokens: int | None = None
) -> list[Example]:
    """The trace cut at each of ``cuts``: one example, whose sequence has the last cut and whose branches have the rest.

    Equal cuts become one sequence that counts as often. Where all do not fit ``max_tokens`` together, several examples.
    """
    found: list[Example] = []
    for cut, count in sorted(Counter(cuts).items(), reverse=True):
        example = replace(cut_example(trace, trace_index, cut, think), count=count)
        start = len(trace.prompt_ids) + cut
        branch = Branch(cut=start, input_ids=example.input_ids[start:], labels=example.labels, count=count)
        if found and (max_tokens is None or found[-1].num_tokens + len(branch.input_ids) <= max_tokens):
            found[-1] = replace(found[-1], branches=(branch, *found[-1].branches))
        else:
            found.append(with_thinking(example, trace, cut))
    return found


class TRSD:
    """Makes each step's examples; the cuts of a trace are drawn anew every epoch."""

    def __init__(
        self,
        traces: Sequence[Trace],
        think: ThinkFormat,
        policy: CutPolicy,
        *,
        seed: int,
        branches_per_trace: int = 1,
        max_tokens: int | None = None,
        snap_texts: Sequence[str] | None = None,
        keep_thinking: bool = False,
    ) -> None:
        """Take the options of a run.

        Args:
            traces: what the teacher thought and answered.
            think: how a cut trace is closed.
            policy: where it is cut.
            seed: of the cuts.
            branches_per_trace: at how many places each trace is cut in one step.
            max_tokens: most tokens of an example with its branches; what does not fit becomes an example of its own.
            snap_texts: ``token_texts`` of the tokenizer; given, cuts snap back to the end of a sentence.
            keep_thinking: examples also learn the reasoning they are shown, as it stands.
        """
        self.traces = traces
        self.think = think
        self.policy = policy
        self.seed = seed
        self.branches_per_trace = branches_per_trace
        self.max_tokens = max_tokens
        self.snap_texts = snap_texts
        self._sentence_ends: dict[int, list[int]] = {}
        self.keep_thinking = keep_thinking

    def cuts(self, epoch: int, trace_index: int) -> list[int]:
        """After how many reasoning tokens the trace is cut in ``epoch``, ``branches_per_trace`` draws."""
        trace = self.traces[trace_index]
        length = len(trace.reasoning_ids)
        draws = cut_generator(self.seed, epoch, trace.id)
        cuts = [self.policy(trace, draws) for _ in range(self.branches_per_trace)]
        if self.snap_texts is None or min(cuts) == length:
            return cuts
        if trace_index not in self._sentence_ends:
            self._sentence_ends[trace_index] = sentence_token_ends(trace.reasoning_ids, self.snap_texts)
        ends = self._sentence_ends[trace_index]
        return [cut if cut == length else snap(cut, ends) for cut in cuts]

    def teacher_example(self, trace_index: int) -> Example:
        """What the teacher sees of the trace: all of it."""
        return full_example(self.traces[trace_index], trace_index)

    def examples(self, members: Sequence[tuple[int, int]]) -> list[Example]:
        """The examples of (epoch, trace index) pairs."""
        found = []
        for epoch, index in members:
            found += branched_examples(
                self.traces[index], index, self.cuts(epoch, index), self.think, max_tokens=self.max_tokens
            )
        return found if self.keep_thinking else [replace(e, thinking_start=0, thinking_labels=[]) for e in found]
