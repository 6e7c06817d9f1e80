"""What a run took in all: totals.json, of all the starts that it needed."""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trsd.files import write_json
from trsd.metrics import read_metrics

TOTALS = "totals.json"


class Peaks:
    """The most memory of this process, on the GPU also of its training steps by themselves."""

    def __init__(self) -> None:
        """Begin; what was held before counts too."""
        self._on_gpu = torch.cuda.is_available()
        self._whole = self._training = 0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count what is held inside as training's."""
        self._restart()
        yield
        self._training = max(self._training, self._restart())

    def _restart(self) -> int:
        """Most bytes on the GPU since the last restart."""
        if not self._on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        self._whole = max(self._whole, peak)
        torch.cuda.reset_peak_memory_stats()
        return peak

    def gib(self) -> dict[str, float]:
        """So far, as totals.json names them."""
        unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
        found = {"peak_memory_gib": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30}
        if self._on_gpu:
            self._restart()
            found["peak_gpu_memory_gib"] = self._whole / 2**30
            found["training_peak_gpu_memory_gib"] = self._training / 2**30
        return found


def training_peak_gib(totals: dict[str, Any]) -> tuple[float, str]:
    """(peak, what it is of) of ``totals``: of the training steps where it was measured for them alone."""
    if "training_peak_gpu_memory_gib" in totals:
        return totals["training_peak_gpu_memory_gib"], "on the GPU"
    return totals["peak_memory_gib"], "of the whole process, libraries and evaluation too"


def write_totals(
    output_dir: Path, *, seconds: float, peaks: Peaks, memory_parts: dict[str, float], resumed_from: Path | None
) -> dict[str, Any]:
    """Write what a run that ends now took, and return it.

    Args:
        output_dir: of the run, with its metrics.
        seconds: of this start.
        peaks: of this start.
        memory_parts: GiB of a step, by part.
        resumed_from: the checkpoint that this start went on from. Time and peaks of earlier starts are then counted
            too: all of it where they came to an end, and of one that was killed the time of its steps.
    """
    totals = {"seconds": seconds, **peaks.gib()}
    if resumed_from is not None:
        earlier = _earlier(output_dir, resumed_from)
        totals = {name: max(value, earlier.get(name, 0.0)) for name, value in totals.items()}
        totals["seconds"] = seconds + earlier["seconds"]
    totals |= {"resumed": resumed_from is not None, "memory_parts_gib": memory_parts}
    write_json(output_dir / TOTALS, totals)
    return totals


def _earlier(output_dir: Path, resumed_from: Path) -> dict[str, Any]:
    if (output_dir / TOTALS).exists():
        return json.loads((output_dir / TOTALS).read_text(encoding="utf-8"))
    step = int(resumed_from.name.rpartition("-")[2])
    steps = read_metrics(output_dir / "metrics.jsonl")
    return {"seconds": sum(row["step_seconds"] for row in steps if row["step"] <= step)}


def totals_line(totals: dict[str, Any]) -> str:
    """``totals`` in a line."""
    starts = " in all starts" if totals.get("resumed") else ""
    gpu = f", on the GPU {totals['peak_gpu_memory_gib']:.2f} GiB" if "peak_gpu_memory_gib" in totals else ""
    return f"{totals['seconds']:.0f} s{starts}, peak memory {totals['peak_memory_gib']:.2f} GiB{gpu}"
