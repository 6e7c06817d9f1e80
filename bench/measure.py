"""Times and peak memory of one contender, in turn with the bare products, so that a drifting clock moves both."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from bench.contenders import BARE_GEMMS, Contender
from bench.live_bytes import LiveBytes
from bench.shapes import Inputs, Loss

SECONDS_PER_LINE = 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 30


class Run:
    """Forward and backward of one contender, timed one by one."""

    def __init__(self, contender: Contender, inputs: Inputs, loss: Loss) -> None:
        self.contender, self.inputs, self.loss = contender, inputs, loss
        self.step = contender.step(inputs, loss)
        self.on_gpu = inputs.labels.is_cuda
        self.seconds: list[float] = []
        self.loss_value: float | None = None
        self.gradient_bytes: int | None = None

    def forward_and_backward(self) -> None:
        loss = self.step()
        if loss is not None:
            loss.backward()
            self.loss_value = loss.detach()

    def drop_gradients(self) -> None:
        for tensor in self.inputs.trained().values():
            tensor.grad = None

    def once(self) -> None:
        """One timed round."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            self.forward_and_backward()
            end.record()
            end.synchronize()
            self.seconds.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            self.forward_and_backward()
            self.seconds.append(time.perf_counter() - start)
        self.drop_gradients()

    def warm_up(self) -> float:
        """Seconds of a round once everything is compiled and allocated."""
        for _ in range(3 if self.on_gpu else 2):
            self.once()
        seconds = self.seconds[-1]
        self.seconds.clear()
        return seconds

    def peak_bytes(self) -> int | None:
        """Most bytes live beyond what was before, gradients included; None where they cannot be counted."""
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.forward_and_backward()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = self._peak_bytes_on_a_cpu()
        gradients = [x.grad for x in self.inputs.trained().values() if x.grad is not None]
        self.gradient_bytes = sum(x.nbytes for x in gradients) if gradients else None
        self.drop_gradients()
        return peak

    def _peak_bytes_on_a_cpu(self) -> int | None:
        if self.contender.countable is None and not self.contender.uncounted:
            with LiveBytes() as memory:
                self.forward_and_backward()
            return memory.peak
        self.forward_and_backward()
        if self.contender.countable is None:
            return None
        with LiveBytes() as memory:
            self.contender.countable(self.inputs, self.loss)
        return memory.peak

    @property
    def milliseconds(self) -> float:
        return 1000 * statistics.median(self.seconds)


def compare(
    benchmark: Callable, contender: Contender, inputs: Inputs, loss: Loss, *, reference: Contender = BARE_GEMMS
) -> dict[str, object]:
    """The measured fields of a ``record.Line``: the contender by the ``benchmark`` fixture, the reference in turn."""
    run = Run(contender, inputs, loss)
    slowest = run.warm_up()
    peak = run.peak_bytes()
    floor = Run(reference, inputs, loss)
    slowest += floor.warm_up()
    floor_peak = floor.peak_bytes()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS_PER_LINE / slowest)))
    benchmark.pedantic(run.once, setup=floor.once, rounds=rounds)
    return dict(
        milliseconds=run.milliseconds,
        bare_gemms_milliseconds=floor.milliseconds,
        rounds=len(run.seconds),
        peak_bytes=peak,
        bare_gemms_peak_bytes=floor_peak,
        gradient_bytes=run.gradient_bytes,
        loss_value=None if run.loss_value is None else float(run.loss_value),
    )


def forget() -> None:
    """Give back what earlier lines held, so that each starts from the same state."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
