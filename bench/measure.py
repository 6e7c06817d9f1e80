"""Times and peak memory of one contender, in turn with a reference, so that a drifting clock moves both."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.contenders import BARE_GEMMS, Contender
from bench.deadline import TIME_IS_UP
from bench.in_sight import ops_in_sight
from bench.record import Line, Results
from bench.shapes import Inputs, Loss
from trsd.live_bytes import LiveBytes

SECONDS_PER_LINE = 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 30


class NotMeasured(Exception):
    """A contender that cannot run here; its text says why."""


class Rounds:
    """Some work, timed one round after the other."""

    def __init__(self, work: Callable[[], None], *, on_gpu: bool, repeats: int = 1) -> None:
        """Take the work.

        Args:
            work: what is timed.
            on_gpu: by the GPU's clock.
            repeats: how often the work runs in a round, where a GPU must not wait for so short a work's launch.
        """
        self.work, self.on_gpu, self.repeats = work, on_gpu, repeats
        self.seconds: list[float] = []

    def clean_up(self) -> None:
        """Drop what the work leaves behind; not timed."""

    def once(self) -> None:
        """One timed round."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            self._repeat()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
        else:
            begun = time.perf_counter()
            self._repeat()
            seconds = time.perf_counter() - begun
        self.seconds.append(seconds / self.repeats)
        self.clean_up()

    def _repeat(self) -> None:
        for _ in range(self.repeats):
            self.work()

    def warm_up(self) -> float:
        """Seconds of a round once everything is compiled and allocated."""
        for _ in range(3 if self.on_gpu else 2):
            self.once()
        seconds = self.seconds[-1] * self.repeats
        self.seconds.clear()
        return seconds

    def peak_bytes(self) -> int | None:
        """Most bytes live beyond what was before; None where they cannot be counted."""
        peak = self._peak_bytes_on_a_gpu() if self.on_gpu else self._peak_bytes_on_a_cpu()
        self.clean_up()
        return peak

    def _peak_bytes_on_a_gpu(self) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.work()
        return torch.cuda.max_memory_allocated() - before

    def _peak_bytes_on_a_cpu(self) -> int | None:
        with ops_in_sight(), LiveBytes() as memory:
            self.work()
        return memory.peak

    @property
    def milliseconds(self) -> float:
        """Median."""
        return 1000 * statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Milliseconds of the first and the third quartile; None of a single round."""
        if len(self.seconds) < 2:
            return None
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 1000 * first, 1000 * third


def timed_fields(run: Rounds, reference: Rounds) -> dict[str, object]:
    """The fields of an ``InTurnLine`` that two works' rounds give."""
    return dict(
        milliseconds=run.milliseconds,
        quartiles=run.quartiles,
        reference_milliseconds=reference.milliseconds,
        reference_quartiles=reference.quartiles,
        rounds=len(run.seconds),
    )


class Run(Rounds):
    """Forward and backward of one contender's loss."""

    def __init__(self, contender: Contender, inputs: Inputs, loss: Loss) -> None:
        super().__init__(self.forward_and_backward, on_gpu=inputs.labels.is_cuda)
        self.contender, self.inputs, self.loss = contender, inputs, loss
        self.step = contender.step(inputs, loss)
        self.loss_value: float | None = None
        self.gradient_bytes: int | None = None

    def forward_and_backward(self) -> None:
        loss = self.step()
        if loss is not None:
            loss.backward()
            self.loss_value = loss.detach()

    def clean_up(self) -> None:
        gradients = [x.grad for x in self.inputs.trained().values() if x.grad is not None]
        self.gradient_bytes = sum(x.nbytes for x in gradients) if gradients else None
        for tensor in self.inputs.trained().values():
            tensor.grad = None

    def _peak_bytes_on_a_cpu(self) -> int | None:
        return None if self.contender.uncounted else super()._peak_bytes_on_a_cpu()


def compare(
    benchmark: Callable, contender: Contender, inputs: Inputs, loss: Loss, *, reference: Contender = BARE_GEMMS
) -> dict[str, object]:
    """The measured fields of a ``LossLine``: the contender by the ``benchmark`` fixture, the reference in turn."""
    run, floor = Run(contender, inputs, loss), Run(reference, inputs, loss)
    measured = take_turns(benchmark, run, floor)
    loss_value = None if run.loss_value is None else float(run.loss_value)
    return measured | dict(gradient_bytes=run.gradient_bytes, loss_value=loss_value)


def take_turns(benchmark: Callable, run: Rounds, reference: Rounds) -> dict[str, object]:
    """The measured fields of an ``InTurnLine``: warm-up and memory of each, then both round by round."""
    slowest = run.warm_up()
    peak = run.peak_bytes()
    slowest += reference.warm_up()
    reference_peak = reference.peak_bytes()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS_PER_LINE / slowest)))
    benchmark.pedantic(run.once, setup=reference.once, rounds=rounds)
    return timed_fields(run, reference) | dict(peak_bytes=peak, reference_peak_bytes=reference_peak)


def record_lines(
    results: Results,
    lines: Sequence[Callable[..., Line]],
    measure: Callable[[], Sequence[dict[str, object]]],
    *,
    out_of_time: Callable[[], bool],
    benchmark: Any = None,
    install: str = "",
) -> None:
    """Measure one line or several together and add them to the results, whatever becomes of them.

    Args:
        results: where they go.
        lines: makes each line from its measured fields, or from its outcome alone.
        measure: the measured fields, line by line.
        out_of_time: whether nothing more is to be measured.
        benchmark: pytest-benchmark's fixture, whose ``extra_info`` is filled: environment, and rates of each line.
        install: what ``pip install`` takes to bring a contender along that raises ImportError.
    """
    missing, out_of_memory, measured = "", False, ()
    try:
        if out_of_time():
            raise NotMeasured(TIME_IS_UP)
        measured = measure()
    except ImportError as error:
        missing = f"pip install {install} ({error})" if install else str(error)
    except NotMeasured as error:
        missing = str(error)
    except torch.OutOfMemoryError:
        out_of_memory = True
    except Exception as error:
        for line in lines:
            results.add(line(outcome=f"failed: {type(error).__name__}: {str(error)[:80]!r}"))
        traceback.clear_frames(error.__traceback__)  # or its tensors would take the memory of the lines that follow
        raise
    if missing or out_of_memory:
        outcome = "out of memory" if out_of_memory else f"not measured: {missing}"
        for line in lines:
            results.add(line(outcome=outcome))
        pytest.skip("out of memory, which is the result" if out_of_memory else outcome)
    for make, fields in zip(lines, measured, strict=True):
        line = make(**fields)
        results.add(line)
        if benchmark is not None:
            benchmark.extra_info.update(results.environment)
            benchmark.extra_info[line.contender] = line.extra()


def forget() -> None:
    """Give back what earlier lines held, so that each starts from the same state."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
