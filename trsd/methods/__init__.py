"""What each published method does with a trace: which tokens student and teacher run, and which are learnt."""

from collections.abc import Sequence
from typing import Protocol

from trsd.batching import Example
from trsd.traces import Trace


class Method(Protocol):
    """What the loop and the teachers ask of a method."""

    traces: Sequence[Trace]

    def teacher_example(self, trace_index: int) -> Example:
        """What the teacher runs of the trace; its rows are the target rows of the student's labels, in their order."""
        ...

    def examples(self, members: Sequence[tuple[int, int]]) -> list[Example]:
        """What the student learns from (epoch, trace index) pairs."""
        ...


class TeacherExamples(Sequence[Example]):
    """What the teacher runs of every trace, made when it is asked for: a corpus of them would fill the memory."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __len__(self) -> int:
        return len(self.method.traces)

    def __getitem__(self, trace_index: int) -> Example:
        if not 0 <= trace_index < len(self):
            raise IndexError(trace_index)
        return self.method.teacher_example(trace_index)
