"""What the suites record: a kind of line each, with the table it shows itself in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from bench.record import GIB, shown


def error_cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


@dataclass(frozen=True, kw_only=True)
class InTurnLine(ABC):
    """One contender of one setting, measured in turn with the setting's reference; what is unknown is None."""

    columns: ClassVar[tuple[str, ...]] = ()

    group: str
    """The setting: what the line may be compared with."""
    contender: str
    outcome: str = "ok"
    """"ok", or why there is nothing else."""
    milliseconds: float | None = None
    """Median."""
    quartiles: tuple[float, float] | None = None
    """Milliseconds of the first and the third quartile."""
    reference_milliseconds: float | None = None
    """Median of the reference, run in turn with this line."""
    reference_quartiles: tuple[float, float] | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    reference_peak_bytes: int | None = None
    num_tokens: int | None = None
    """Tokens that run."""
    flops: float | None = None
    """Operations that the work asks for, two a multiply-add; not those that a contender adds."""
    moved_bytes: float | None = None
    """Bytes that must be moved at least."""

    @property
    def time_ratio(self) -> float | None:
        """Times the reference's median."""
        return self.milliseconds and self.reference_milliseconds and self.milliseconds / self.reference_milliseconds

    @property
    def memory_ratio(self) -> float | None:
        """Times the reference's peak."""
        return self.peak_bytes and self.reference_peak_bytes and self.peak_bytes / self.reference_peak_bytes

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles, as a share of the median."""
        if self.quartiles is None or not self.milliseconds:
            return None
        return (self.quartiles[1] - self.quartiles[0]) / 2 / self.milliseconds

    @property
    def peak_gib(self) -> float | None:
        return self.peak_bytes and self.peak_bytes / GIB

    @property
    def tokens_per_second(self) -> float | None:
        return self._per_second(self.num_tokens)

    @property
    def tflops_per_second(self) -> float | None:
        return self._per_second(self.flops and self.flops / 1e12)

    @property
    def gigabytes_per_second(self) -> float | None:
        return self._per_second(self.moved_bytes and self.moved_bytes / 1e9)

    def _per_second(self, amount: float | None) -> float | None:
        return self.milliseconds and amount and amount / self.milliseconds * 1000

    def extra(self) -> dict[str, Any]:
        """For pytest-benchmark's ``extra_info``: rates, memory, and the ratio to the floor or reference."""
        names = ("milliseconds", "spread", "tokens_per_second", "tflops_per_second", "gigabytes_per_second", "peak_gib")
        found = {name: getattr(self, name) for name in (*names, "time_ratio", "memory_ratio")}
        return {"outcome": self.outcome} | {name: value for name, value in found.items() if value is not None}

    @abstractmethod
    def cells(self) -> tuple[str, ...]:
        """A cell per column."""

    def _time_cells(self, digits: int) -> tuple[str, str, str]:
        """Of the columns "ms", "± %" and the ratio to the reference."""
        spread = None if self.spread is None else 100 * self.spread
        return shown(self.milliseconds, digits), shown(spread, 1), shown(self.time_ratio, 2)

    def _memory_cells(self, digits: int) -> tuple[str, str]:
        """Of the columns for the peak and its ratio to the reference's."""
        return shown(self.peak_gib, digits), shown(self.memory_ratio, 2)


@dataclass(frozen=True, kw_only=True)
class LossLine(InTurnLine):
    """One contender's forward and backward of the distillation loss; its reference are the bare products.

    Its peak is beyond the inputs, gradients included.
    """

    columns: ClassVar = (
        "ms",
        "± %",
        "x GEMMs",
        "TFLOP/s",
        "peak GiB",
        "x GEMMs",
        "grads GiB",
        "loss",
        "off by",
        "rounds",
    )

    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    dtype: str
    loss: str
    head: str
    """"trained" or "frozen"."""
    gradient_bytes: int | None = None
    loss_value: float | None = None
    error: float | None = None
    """The worst relative error of loss and gradients against float64, at a small size in this dtype."""

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            *self._time_cells(2),
            shown(self.tflops_per_second, 2 if (self.tflops_per_second or 0) < 10 else 0),
            *self._memory_cells(3),
            shown(self.gradient_bytes and self.gradient_bytes / GIB, 3),
            shown(self.loss_value, 4),
            error_cell(self.error),
            str(self.rounds),
        )


@dataclass(frozen=True, kw_only=True)
class AttentionLine(InTurnLine):
    """One contender's forward and backward of attention over one row; its peak includes output and gradients."""

    columns: ClassVar = ("ms", "± %", "x ours", "TFLOP/s", "peak GiB", "x ours", "off by", "tokens", "rounds")

    visible_pairs: int
    """Pairs of a query and a key it sees, per head; ``flops`` are those of the visible pairs alone."""
    error: float | None = None
    """The worst relative error of output and gradients against float64, at a small size in this dtype."""

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            *self._time_cells(3),
            shown(self.tflops_per_second, 3 if (self.tflops_per_second or 0) < 10 else 0),
            *self._memory_cells(4),
            error_cell(self.error),
            str(self.num_tokens),
            str(self.rounds),
        )


@dataclass(frozen=True, kw_only=True)
class StepLine(InTurnLine):
    """Forward and backward of the student's part of a step; its peak is beyond weights, gradients and inputs."""

    columns: ClassVar = (
        "ms",
        "± %",
        "x ours",
        "activ GiB",
        "x ours",
        "tokens",
        "learnt",
        "passes",
        "row limit",
        "loss",
    )

    supervised_tokens: int | None = None
    """Answer tokens that are learnt, each as often as it is."""
    passes: int | None = None
    """Rows or padded batches, whose gradients add up."""
    max_tokens: int | None = None
    """Most tokens of a packed row."""
    loss_value: float | None = None

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            *self._time_cells(1),
            *self._memory_cells(4),
            shown(self.num_tokens, 0),
            shown(self.supervised_tokens, 0),
            shown(self.passes, 0),
            shown(self.max_tokens, 0),
            shown(self.loss_value, 4),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingLine(InTurnLine):
    """A whole training step: teacher, student, loss, backward, clipping and optimizer; its peak is all that is live."""

    columns: ClassVar = (
        *("ms", "± %", "x reference", "tokens/s", "TFLOP", "MFU %", "peak GiB", "x reference"),
        *("plan GiB", "plan ms", "recomputed", "tokens", "loss"),
    )

    method: str
    student: str
    teacher: str
    fraction: float
    """Of each sequence that is kept."""
    branches: int | None = None
    """Cuts of each trace in a step."""
    recomputed: bool | None = None
    """Whether activations were made again in the backward pass."""
    ceiling_tflops: float | None = None
    """The device's dense products, as its maker states them, or as measured where none does."""
    planned_bytes: int | None = None
    """The peak that ``trsd.plan`` predicts."""
    planned_milliseconds: float | None = None
    """The least that a step can take there, by the same prediction."""
    loss_value: float | None = None

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the step's model operations keep busy."""
        return self.tflops_per_second and self.ceiling_tflops and self.tflops_per_second / self.ceiling_tflops

    def extra(self) -> dict[str, Any]:
        return super().extra() | ({} if self.mfu is None else {"mfu": self.mfu})

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        small = (self.milliseconds or 0) < 10_000 and (self.flops or 0) < 1e12
        return (
            *self._time_cells(1),
            shown(self.tokens_per_second, 0),
            shown(self.flops and self.flops / 1e12, 4 if small else 0),
            shown(self.mfu and 100 * self.mfu, 1),
            *self._memory_cells(3 if small else 1),
            shown(self.planned_bytes and self.planned_bytes / GIB, 3 if small else 1),
            shown(self.planned_milliseconds, 0),
            {None: "-", True: "yes", False: "no"}[self.recomputed],
            shown(self.num_tokens, 0),
            shown(self.loss_value, 4),
        )


@dataclass(frozen=True, kw_only=True)
class TransferLine(InTurnLine):
    """Tensors that go to disk or come from it: teacher caches, checkpoints."""

    columns: ClassVar = ("ms", "± %", "x reference", "GB/s", "MiB", "rows/s", "rounds")

    rows: int | None = None
    """Rows of a cache that were moved."""

    @property
    def rows_per_second(self) -> float | None:
        return self._per_second(self.rows)

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            *self._time_cells(2),
            shown(self.gigabytes_per_second, 3),
            shown(self.moved_bytes and self.moved_bytes / 2**20, 1),
            shown(self.rows_per_second, 0),
            str(self.rounds),
        )


@dataclass(frozen=True, kw_only=True)
class DecodingLine(InTurnLine):
    """Questions thought about and answered; ``num_tokens`` are those written."""

    columns: ClassVar = ("s", "± %", "x reference", "tokens/s", "tokens", "rows", "rounds")

    rows_together: int | None = None
    """Sequences that decode together."""

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            shown(self.milliseconds and self.milliseconds / 1000, 2),
            *self._time_cells(0)[1:],
            shown(self.tokens_per_second, 0),
            shown(self.num_tokens, 0),
            shown(self.rows_together, 0),
            str(self.rounds),
        )


@dataclass(frozen=True, kw_only=True)
class OverheadLine(InTurnLine):
    """What the trainer does beside computing a step; its reference does the same another way, as the group says."""

    columns: ClassVar = ("ms", "± %", "reference", "step ms", "% of step", "promised", "rounds")

    added_milliseconds: float | None = None
    """What a step takes longer for it."""
    step_milliseconds: float | None = None
    """Median."""
    promised: float | None = None
    """The largest share that it may have."""

    @property
    def share(self) -> float | None:
        """Of a step."""
        return self.step_milliseconds and self.added_milliseconds / self.step_milliseconds

    def extra(self) -> dict[str, Any]:
        return super().extra() | ({} if self.share is None else {"share": self.share})

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        share, promised = (None if value is None else 100 * value for value in (self.share, self.promised))
        return (
            *self._time_cells(3)[:2],
            shown(self.reference_milliseconds, 3),
            shown(self.step_milliseconds, 1),
            shown(share, 3),
            "-" if promised is None else f"{promised:g}",
            str(self.rounds),
        )


@dataclass(frozen=True, kw_only=True)
class FillLine:
    """Real sequences packed into rows."""

    columns: ClassVar = ("fill rate", "sequences", "too long", "tokens", "rows", "ms")

    group: str
    contender: str
    """The set of sequences."""
    outcome: str = "ok"
    num_sequences: int | None = None
    num_dropped: int | None = None
    """Sequences longer than a row, which were left out."""
    num_tokens: int | None = None
    rows: int | None = None
    fill_rate: float | None = None
    milliseconds: float | None = None
    """Median time of packing."""

    def extra(self) -> dict[str, Any]:
        """For pytest-benchmark's ``extra_info``."""
        return {"outcome": self.outcome, "fill_rate": self.fill_rate, "num_tokens": self.num_tokens}

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        return (
            shown(self.fill_rate, 4),
            shown(self.num_sequences, 0),
            shown(self.num_dropped, 0),
            shown(self.num_tokens, 0),
            shown(self.rows, 0),
            shown(self.milliseconds, 2),
        )


@dataclass(frozen=True, kw_only=True)
class CeilingLine:
    """What the device can do at best: dense products, or bytes read and written."""

    columns: ClassVar = ("measured", "stated", "unit", "rounds")

    group: str
    contender: str
    outcome: str = "ok"
    measured: float | None = None
    stated: float | None = None
    """By the device's maker, where it is known."""
    unit: str = ""
    rounds: int = 0

    def extra(self) -> dict[str, Any]:
        """For pytest-benchmark's ``extra_info``."""
        return {"outcome": self.outcome, self.unit: self.measured}

    def cells(self) -> tuple[str, ...]:
        """A cell per column."""
        digits = 3 if (self.measured or 0) < 10 else 0
        return shown(self.measured, digits), shown(self.stated, 0), self.unit, str(self.rounds)


KINDS = (
    *(LossLine, AttentionLine, StepLine, TrainingLine, TransferLine, DecodingLine, OverheadLine),
    *(FillLine, CeilingLine),
)


def read_line(values: dict[str, Any]) -> Any:
    """The line that ``record.stored`` made these values of; fields that are no longer known are left out.

    Raises:
        ValueError: a kind that is not known, with those that are.
    """
    kinds = {kind.__name__: kind for kind in KINDS}
    if values.get("kind") not in kinds:
        raise ValueError(f"expected a line of kind {', '.join(kinds)}, got {values.get('kind')!r}")
    kind = kinds[values["kind"]]
    known = {entry.name for entry in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
