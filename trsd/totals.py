"""What a run took in all: totals.json, of all the starts that it needed."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from trsd.files import write_json
from trsd.metrics import read_metrics

TOTALS = "totals.json"


def write_totals(
    output_dir: Path, *, seconds: float, memory_parts: dict[str, float], resumed_from: Path | None
) -> dict[str, Any]:
    """Write what a run that ends now took, and return it.

    Args:
        output_dir: of the run, with its metrics.
        seconds: of this start.
        memory_parts: GiB of a step, by part.
        resumed_from: the checkpoint that this start went on from. Time and peaks of earlier starts are then counted
            too: all of it where they came to an end, and of one that was killed the time of its steps.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    totals = {"seconds": seconds, "peak_memory_gib": peak}
    if torch.cuda.is_available():
        totals["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
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
