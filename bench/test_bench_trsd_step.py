"""The student's training step: cuts of one trace as branches against separate sequences, packing against padding.

On a GPU with random weights of Qwen3's 1.7B and 4B shapes in bf16, on a CPU with the bundled reasoner in fp32. What is
compared runs in turn, on the same answers, and must come to the same loss. The memory of a step is what it takes beyond
weights, gradients and inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from bench.lines import FillLine, StepLine
from bench.measure import NotMeasured, Rounds, forget
from bench.record import Results
from bench.sequence_lengths import MIXED, SETS, sample, token_lengths
from bench.step_settings import CPU_CUTS, CPU_SEQUENCES, GPU_CUTS, GPU_SEQUENCES, Cuts, real_examples
from bench.student_step import (
    PaddedPass,
    RandomTeacher,
    Step,
    build_model,
    in_turn,
    largest_rows_that_fit,
    packed_passes,
    set_checkpointing,
)
from trsd.batching import Example
from trsd.models import quieten_transformers
from trsd_kernels import fill_rate, pack_sequences

SUITE = ("trsd_step", "the student's training step: body, distillation loss, backward")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROW_LENGTH = 16384
FILL_TARGET = 0.98
OURS, SEPARATE = "branches", "separate sequences"
PACKED, PADDED, ALONE = "packed rows", "padded batches of 8", "one by one"

CUTS, SEQUENCES = (GPU_CUTS, GPU_SEQUENCES) if ON_GPU else (CPU_CUTS, CPU_SEQUENCES)

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a target for a GPU, and there is no CUDA device")
needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="a promise for a CPU; the targets judge a GPU")
unused_is_fine = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def name_of(target: "Target") -> str:
    return target.name


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, one_thread: None) -> Iterator[PreTrainedModel]:
    """Each model once; the one before is freed first."""
    forget()
    quieten_transformers()
    built = build_model(request.param, DEVICE)
    yield built
    del built


@pytest.fixture(scope="session")
def lengths(one_thread: None) -> dict[str, list[int]] | NotMeasured:
    """Token counts of the real sets, or why there are none."""
    try:
        return token_lengths()
    except (NotMeasured, ImportError) as error:
        return NotMeasured(str(error))


def lines_of(group: str, contenders: Sequence[str]) -> list[Callable[..., StepLine]]:
    return [partial(StepLine, group=group, contender=contender) for contender in contenders]


@unused_is_fine
@pytest.mark.parametrize(
    "model,cuts", [pytest.param(cuts.model, cuts, id=cuts.name) for cuts in CUTS], indirect=["model"]
)
def test_branches_and_separate_sequences(model, cuts, benchmark, record):
    benchmark.group = cuts.name

    def measure() -> list[dict[str, object]]:
        set_checkpointing(model, cuts.checkpointing)
        vocab_size = model.config.vocab_size
        teacher = RandomTeacher(model, [cuts.answer_length] * cuts.num_traces)

        def make(examples: Sequence[Example], max_tokens: int) -> Step:
            return Step(model, teacher, packed_passes(examples, max_tokens, model))

        separate = cuts.examples(vocab_size, branches=False)
        limit = cuts.max_tokens or sum(example.num_tokens for example in separate)
        beside, beside_peak, beside_limit = largest_rows_that_fit(separate, limit, make)
        forget()
        ours, peak, our_limit = largest_rows_that_fit(cuts.examples(vocab_size, branches=True), limit, make)
        rounds = 3 if ON_GPU else 5
        measured = in_turn(benchmark, [ours, beside], [peak, beside_peak], rounds)
        for fields, tokens in zip(measured, (our_limit, beside_limit), strict=True):
            fields["max_tokens"] = tokens
        return measured

    record(lines_of(cuts.name, (OURS, SEPARATE)), measure)


@unused_is_fine
@pytest.mark.parametrize("model", [pytest.param(SEQUENCES.model, id=SEQUENCES.name)], indirect=True)
def test_packed_and_padded(model, lengths, benchmark, record):
    benchmark.group = SEQUENCES.name

    def measure() -> list[dict[str, object]]:
        if isinstance(lengths, NotMeasured):
            raise lengths
        set_checkpointing(model, SEQUENCES.checkpointing)
        examples = real_examples(sample(lengths, SEQUENCES.counts, longest=SEQUENCES.longest), model.config.vocab_size)
        teacher = RandomTeacher(model, [len(example.labels) for example in examples])
        passes = [packed_passes(examples, SEQUENCES.max_tokens, model)]
        for size in (8, 1):
            batches = [examples[begin : begin + size] for begin in range(0, len(examples), size)]
            passes.append([PaddedPass(batch, DEVICE) for batch in batches])
        steps = [Step(model, teacher, each) for each in passes]
        measured = in_turn(benchmark, steps, [step.peak_bytes() for step in steps], SEQUENCES.rounds)
        measured[0]["max_tokens"] = SEQUENCES.max_tokens
        return measured

    record(lines_of(SEQUENCES.name, (PACKED, PADDED, ALONE)), measure)


@unused_is_fine
@pytest.mark.parametrize("name", [*SETS, MIXED])
def test_fill_rate(name, lengths, benchmark, results, record):
    benchmark.group = f"packing into rows of {ROW_LENGTH} tokens"

    def measure() -> list[dict[str, object]]:
        if isinstance(lengths, NotMeasured):
            raise lengths
        given = [length for each in (SETS if name == MIXED else [name]) for length in lengths[each]]
        kept = [length for length in given if length <= ROW_LENGTH]
        rows = pack_sequences(kept, ROW_LENGTH)
        packing = Rounds(lambda: pack_sequences(kept, ROW_LENGTH), on_gpu=False)
        benchmark.pedantic(packing.once, rounds=5)
        return [
            dict(
                num_sequences=len(kept),
                num_dropped=len(given) - len(kept),
                num_tokens=sum(kept),
                rows=len(rows),
                fill_rate=fill_rate(kept, len(rows), ROW_LENGTH),
                milliseconds=packing.milliseconds,
            )
        ]

    line = partial(FillLine, group=benchmark.group, contender=name)
    record([line], measure)
    if name == MIXED:
        assert results.find(contender=MIXED).fill_rate >= FILL_TARGET


class Target(NamedTuple):
    """Branches against separate sequences: so many times as fast, or in so much less activation memory."""

    cuts: Cuts
    quantity: str
    limit: float

    @property
    def name(self) -> str:
        return f"{self.cuts.name}: {self.quantity} of separate sequences >= {self.limit} x branches"


def assert_target(target: Target, results: Results) -> None:
    line = results.find(group=target.cuts.name, contender=SEPARATE)
    if line is None:
        pytest.fail(f"{target.name}: not measured")
    reached = line.time_ratio if target.quantity == "time" else line.memory_ratio
    assert reached >= target.limit, f"{target.name}: reached {reached:.2f}\n{results.table()}"


GPU_TARGETS = [
    target
    for cuts in GPU_CUTS
    for target in (
        (Target(cuts, "time", 3.0), Target(cuts, "memory", 2.5))
        if cuts.reasoning_length == 8192
        else (Target(cuts, "time", 1.6),)
    )
]


@needs_gpu
@unused_is_fine
@pytest.mark.parametrize("target", GPU_TARGETS, ids=name_of)
def test_target(target, benchmark, results):
    assert_target(target, results)


@needs_no_gpu
@unused_is_fine
@pytest.mark.parametrize("target", [Target(cuts, "time", 2.5) for cuts in CPU_CUTS], ids=name_of)
def test_on_a_cpu_branches_are_faster_too(target, benchmark, results):
    assert_target(target, results)
