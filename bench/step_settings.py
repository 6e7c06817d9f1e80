"""What the training-step benchmark runs: traces cut at several places, and sequences of real lengths.

Traces are synthetic, of random token ids; their examples are made by ``trsd.methods.trsd``, as in training.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.attention import even_cuts
from bench.sequence_lengths import LONG, SHORT
from trsd.batching import Example
from trsd.methods.trsd import branched_examples, cut_example
from trsd.thinking import ThinkFormat
from trsd.traces import Trace

BUNDLED = "bundled:reasoner"
# Who recomputes activations for want of memory has none to spare for the default of 2.5 GiB of logits.
CHECKPOINTED_CHUNK_BYTES = 2**29
CHECKPOINTED = ", activations recomputed, loss in chunks of 512 MiB"
CLOSER_IDS = (3, 4, 5, 6)
THINK = ThinkFormat(
    open_tag="<think>", close_tag="</think>", closer="", closer_ids=CLOSER_IDS, natural_close_ids=CLOSER_IDS
)
LEARNT = 32  # tokens of each real sequence, however it is run


class Cuts(NamedTuple):
    """Traces that are cut at several places in one step."""

    model: str
    reasoning_length: int
    num_cuts: int
    answer_length: int
    prompt_length: int = 64
    num_traces: int = 1
    checkpointing: bool = False
    max_tokens: int | None = None
    """Most tokens of a row; None: all of the separate sequences in one."""

    @property
    def name(self) -> str:
        return (
            f"{self.model}, {self.num_traces} x {self.reasoning_length} reasoning tokens, {self.num_cuts} even cuts, "
            f"answers of {self.answer_length}" + (CHECKPOINTED if self.checkpointing else "")
        )

    def traces(self, vocab_size: int) -> list[Trace]:
        draws = random.Random(0)

        def ids(count: int) -> list[int]:
            return [draws.randrange(vocab_size) for _ in range(count)]

        lengths = (self.prompt_length, self.reasoning_length, self.answer_length)
        return [random_trace(index, *map(ids, lengths)) for index in range(self.num_traces)]

    def examples(self, vocab_size: int, *, branches: bool) -> list[Example]:
        """The trainer's examples of the answers alone: a trace's cuts in one, or one each."""
        found, cuts = [], even_cuts(self.reasoning_length, self.num_cuts)
        for index, trace in enumerate(self.traces(vocab_size)):
            if branches:
                found += branched_examples(trace, index, cuts, THINK)
            else:
                found += [cut_example(trace, index, cut, THINK) for cut in cuts]
        return [replace(example, thinking_start=0, thinking_labels=[]) for example in found]


def random_trace(index: int, prompt_ids: list[int], reasoning_ids: list[int], answer_ids: list[int]) -> Trace:
    """A trace of these tokens without any text."""
    return Trace(
        id=f"trace-{index}",
        question="",
        gold=None,
        prompt_ids=prompt_ids,
        reasoning_ids=reasoning_ids,
        close_ids=list(CLOSER_IDS),
        answer_ids=answer_ids,
        reasoning="",
        answer="",
        closed=True,
        correct=None,
        tokenizer="",
    )


class Sequences(NamedTuple):
    """Sequences of real lengths to run packed and padded."""

    model: str
    counts: dict[str, int]
    """How many of each set."""
    longest: int
    max_tokens: int
    """Most tokens of a packed row."""
    rounds: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        counts = " and ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.model}, {counts} of at most {self.longest} tokens" + (CHECKPOINTED if self.checkpointing else "")


def real_examples(token_counts: Sequence[int], vocab_size: int) -> list[Example]:
    """Random sequences of these lengths that learn their last tokens."""
    draws = random.Random(0)
    found = []
    for index, count in enumerate(token_counts):
        ids = [draws.randrange(vocab_size) for _ in range(count)]
        found.append(Example(trace_index=index, input_ids=ids[:-1], labels=ids[-min(LEARNT, count - 1) :]))
    return found


GPU_CUTS = (
    Cuts("Qwen3-4B", 8192, 8, 256, checkpointing=True),
    Cuts("Qwen3-4B", 2048, 4, 256),
    Cuts("Qwen3-1.7B", 8192, 8, 256, checkpointing=True),
    Cuts("Qwen3-1.7B", 2048, 4, 256),
)
CPU_CUTS = (Cuts(BUNDLED, 240, 8, 20, prompt_length=48, num_traces=4, max_tokens=4096),)
GPU_SEQUENCES = Sequences("Qwen3-1.7B", {LONG: 4, SHORT: 60}, 8192, 16384, rounds=1, checkpointing=True)
CPU_SEQUENCES = Sequences(BUNDLED, {SHORT: 32}, 512, 4096, rounds=3)
