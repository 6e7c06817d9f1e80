"""Forward and backward of the distillation loss: ours, the bare matrix products, plain torch and the peers.

``pytest bench/ --benchmark-only`` runs it on a GPU where there is one, else at a small size on one CPU thread. Every
line is measured in turn with the bare products. A contender that is not installed or needs a GPU is listed as that, as
is one that runs out of memory or computes something else, and one that fails spoils no other line. TRSD_BENCH_SECONDS
ends a run early: the lines that the targets need come first, those that compile for long last.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from bench import contenders as c
from bench.correctness import TOLERANCE, worst_error
from bench.lines import LossLine
from bench.measure import Run, compare
from bench.record import Results
from bench.shapes import CE, CE_JSD, CE_KL, CPU_SHAPES, GPU_SHAPES, JSD, KL, SMALL_CPU_SHAPE, Loss, Shape, draw

SUITE = ("linear_distill", "fused_linear_distillation, forward and backward")
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="a promise for a CPU; the targets judge a GPU")
unused_is_fine = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")

# Losses of one term are those of the peers that have no other.
GROUPS: dict[tuple[Loss, bool], tuple[c.Contender, ...]] = {
    (CE_KL, True): (c.TOKENS, c.VOCAB, c.BARE_GEMMS, c.EAGER, c.COMPILED, c.LIGER_CHUNKED),
    (KL, True): (c.TOKENS, c.TRL, c.LIGER_FUSED, c.LIGER_FUSED_FP32, c.SMALL_VOCAB, c.FLA, c.FLA_ROUNDED),
    (CE, True): (
        *(c.TOKENS, c.VOCAB, c.BARE_GEMMS, c.EAGER, c.COMPILED),
        *(c.LIGER_CE, c.LIGER_CE_FP32, c.CCE, c.QUACK),
    ),
    (CE_KL, False): (c.TOKENS, c.VOCAB, c.BARE_GEMMS, c.EAGER, c.VECTORS),
    (CE_JSD, True): (c.TOKENS, c.VOCAB, c.EAGER, c.COMPILED, c.LIGER_CHUNKED),
    (KL, False): (c.TOKENS, c.TRL, c.FLA, c.VECTORS),
    (JSD, True): (c.TOKENS, c.TRL, c.LIGER_FUSED, c.LIGER_FUSED_FP32),
}
# On a CPU the first loss says enough of these, and 256 MiB are more than ours takes there by default.
NOT_AGAIN_ON_A_CPU = (c.VOCAB, c.COMPILED, c.SMALL_VOCAB)


class Case(NamedTuple):
    """One line to measure."""

    shape: Shape
    loss: Loss
    head_is_trained: bool
    contender: c.Contender

    def line(self, **measured: object) -> LossLine:
        head = "trained" if self.head_is_trained else "frozen"
        dtype = str(DTYPE).removeprefix("torch.")
        shape = self.shape
        return LossLine(
            group=f"{shape.num_tokens} tokens, {shape.vocab_size} vocabulary, {shape.student_hidden_size} <- "
            f"{shape.teacher_hidden_size}, {dtype}, {self.loss.name}, {head} head",
            contender=self.contender.name,
            **shape._asdict(),
            dtype=dtype,
            loss=self.loss.name,
            head=head,
            flops=shape.flops(self.loss, head_is_trained=self.head_is_trained),
            moved_bytes=shape.least_bytes(self.loss, DTYPE, head_is_trained=self.head_is_trained),
            **measured,
        )

    def __str__(self) -> str:
        line = self.line()
        return f"{line.num_tokens}x{line.vocab_size}-{line.loss}-{line.head}-{line.contender}"


class Target(NamedTuple):
    """Our time or memory is at most ``limit`` times the best of others', or of the bare products' (no others)."""

    num_tokens: int
    loss: Loss
    quantity: str
    limit: float
    others: tuple[c.Contender, ...] = ()
    ours: c.Contender = c.TOKENS

    def __str__(self) -> str:
        others = self.others[0].name if self.others else "bare GEMMs"
        return f"{self.num_tokens} {self.loss.name}: {self.quantity} of {self.ours.name} <= {self.limit:.2f} x {others}"

    def needs(self, case: Case) -> bool:
        """Whether the case's line is one of those compared."""
        setting = (case.shape.num_tokens, case.loss, case.head_is_trained)
        return setting == (self.num_tokens, self.loss, True) and case.contender in (self.ours, *self.others)

    def lines(self, results: Results) -> tuple[LossLine | None, list[LossLine]]:
        """(our line, the others' lines), as far as they were measured."""
        ours, *others = (
            results.find(num_tokens=self.num_tokens, loss=self.loss.name, head="trained", contender=contender.name)
            for contender in (self.ours, *self.others)
        )
        return ours, [line for line in others if line]

    def reached(self, ours: LossLine, others: list[LossLine]) -> float:
        """Measured, as a multiple. Times are compared by their ratios to the bare products run in turn with each."""
        if self.quantity == "memory":
            return ours.peak_bytes / min(line.peak_bytes for line in others)
        return ours.time_ratio / min([line.time_ratio for line in others], default=1.0)


LIGER = (c.LIGER_FUSED, c.LIGER_FUSED_FP32)
GPU_TARGETS = [Target(512, CE_KL, "time", 1.5)] + [
    target
    for num_tokens in (4096, 8192)
    for target in (
        Target(num_tokens, CE_KL, "time", 1.15),
        Target(num_tokens, KL, "time", 1 / 1.5, (c.TRL,)),
        Target(num_tokens, KL, "time", 1 / 3, LIGER),
        Target(num_tokens, KL, "memory", 1.0, (c.TRL,)),
        Target(num_tokens, KL, "memory", 1.0, LIGER),
        Target(num_tokens, KL, "memory", 1.0, (c.TRL,), c.SMALL_VOCAB),
        Target(num_tokens, KL, "memory", 1.0, LIGER, c.SMALL_VOCAB),
    )
]
CPU_TARGETS = [Target(512, CE_KL, quantity, limit, (c.EAGER,)) for quantity, limit in (("time", 1.0), ("memory", 0.25))]


def targets() -> list[Target]:
    """What is asked of ours on this device."""
    return GPU_TARGETS if ON_GPU else CPU_TARGETS


def _shapes(loss: Loss, head_is_trained: bool, contender: c.Contender) -> tuple[Shape, ...]:
    """Where the contender is measured.

    On a CPU, once: the first loss at the first shape and the others at a smaller one. A compiled JSD is measured at the
    first shape alone.
    """
    if ON_GPU:
        return GPU_SHAPES[:1] if contender.compiles and loss is CE_JSD else GPU_SHAPES
    if (loss, head_is_trained) == (CE_KL, True):
        return CPU_SHAPES[:1]
    return () if contender in NOT_AGAIN_ON_A_CPU else (SMALL_CPU_SHAPE,)


def all_cases() -> list[Case]:
    """A group after the other, but what the targets need before everything else."""
    cases = [
        Case(shape, *group, contender)
        for group, members in GROUPS.items()
        for shape in (GPU_SHAPES if ON_GPU else (CPU_SHAPES[0], SMALL_CPU_SHAPE))
        for contender in members
        if shape in _shapes(*group, contender)
    ]
    return sorted(cases, key=lambda case: not any(target.needs(case) for target in targets()))


@unused_is_fine
@pytest.mark.parametrize("case", [case for case in all_cases() if not case.contender.compiles], ids=str)
def test_forward_and_backward(case, benchmark, results, record):
    measure_line(case, benchmark, results, record)


def measure_line(case: Case, benchmark: Callable, results: Results, record: Callable[..., None]) -> None:
    """Add the case's line to the results, whatever becomes of it."""
    benchmark.group = f"{case.shape.num_tokens} tokens, {case.loss.name}, trained head: {case.head_is_trained}"

    def measure() -> list[dict[str, object]]:
        how = dict(device=DEVICE, dtype=DTYPE, head_is_trained=case.head_is_trained)
        error = None if case.contender is c.BARE_GEMMS else worst_error(case.contender, case.loss, **how)
        fields = compare(benchmark, case.contender, draw(case.shape, **how), case.loss)
        ours = results.find(group=case.line().group, contender=c.TOKENS.name)
        if ours and fields["loss_value"] is not None:
            assert fields["loss_value"] == pytest.approx(ours.loss_value, rel=TOLERANCE[DTYPE]), (
                "another loss than ours"
            )
        return [fields | dict(error=error)]

    record([case.line], measure, install=case.contender.install)


@unused_is_fine
@pytest.mark.parametrize("target", targets(), ids=str)
def test_target(target, benchmark, results):
    ours, others = target.lines(results)
    if ours is None:
        pytest.fail(f"{target}: ours was not measured")
    if target.others and not others:
        pytest.skip(f"{target}: {target.others[0].name} was not measured")
    reached = target.reached(ours, others)
    assert reached <= target.limit, f"{target}: reached {reached:.2f}\n{results.table()}"


@needs_no_gpu
def test_on_a_cpu_ours_is_no_slower_than_eager_and_takes_a_quarter_of_its_memory_at_another_shape(benchmark):
    shape = CPU_SHAPES[1]
    inputs = draw(shape, device=DEVICE, dtype=DTYPE)
    ours, eager = Run(c.TOKENS, inputs, CE_KL), Run(c.EAGER, inputs, CE_KL)
    assert ours.peak_bytes() <= eager.peak_bytes() / 4
    benchmark.group = f"{shape.num_tokens} tokens, ours in turn with eager"
    benchmark.pedantic(ours.once, setup=eager.once, rounds=5, warmup_rounds=1)
    assert statistics.median(ours.seconds) <= statistics.median(eager.seconds)


@unused_is_fine
@pytest.mark.parametrize("case", [case for case in all_cases() if case.contender.compiles], ids=str)
def test_compiled_forward_and_backward(case, benchmark, results, record):
    measure_line(case, benchmark, results, record)
