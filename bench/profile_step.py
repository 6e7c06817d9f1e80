"""Where a training step's time goes: ``python -m bench.profile_step [--pair 0] [--fraction 1.0] [--contender cached]``.

Runs a contender of the whole-step benchmark under torch's profiler and prints the device's time by family of kernels,
the largest kernels of each, and how long the device was idle; writes a trace for chrome://tracing or Perfetto. On a CPU
the same of torch's operations, for the small pair.
"""

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import NotMeasured
from bench.predict import COMPILED
from bench.record import environment, results_path
from bench.training import PairSteps, Shared, TrainingStep
from bench.training_settings import CPU_PAIRS, GPU_PAIRS
from trsd.errors import InputError
from trsd.models import quieten_transformers

# Kernels, or operations on a CPU, by their names; the first that fits.
FAMILIES = (
    ("fused by torch.compile", r"^triton_(poi|red|per|tem|mm|for)_|^cpp_fused"),
    ("attention", r"flash|fmha|attention|sdpa|^_(forward|query_gradient|key_gradient)_kernel|bwd_d[qkv]"),
    ("loss rows", r"^_(accumulate|mixture|gradient)_kernel|distill"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|aten::(mm|addmm|bmm|_scaled_mm|linear|matmul)$|sgemm|wgmma"),
    ("optimizer", r"adam|foreach|multi_tensor"),
    ("copies and casts", r"memcpy|memset|copy_|aten::(clone|_to_copy|fill_|zero_|cat)|direct_copy"),
    ("softmax and cross-entropy", r"softmax|nll_loss|cross_entropy"),
    ("embeddings and indexing", r"index|embedding|gather|scatter|sort"),
    ("reductions", r"reduce|aten::(sum|mean|amax|norm|linalg_vector_norm)"),
    ("elementwise", r"elementwise|aten::|vectorized"),
)
OTHER = "other"
LARGEST = 3


class Kernel(NamedTuple):
    """One kernel's or operation's total."""

    name: str
    milliseconds: float
    calls: int


def family_of(name: str) -> str:
    """Of a kernel's name."""
    return next((family for family, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def by_family(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """Kernels by family, the most time first, in families and within them."""
    found: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        found[family_of(kernel.name)].append(kernel)
    for members in found.values():
        members.sort(key=lambda kernel: -kernel.milliseconds)
    return dict(sorted(found.items(), key=lambda item: -sum(kernel.milliseconds for kernel in item[1])))


def kernels_of(profiler: profile, *, on_gpu: bool) -> list[Kernel]:
    """What ran on the device, by name; on a CPU each operation's time without that of those it calls."""
    found = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        on_device = str(event.device_type).endswith("CUDA")
        if microseconds > 0 and on_device == on_gpu and not getattr(event, "is_user_annotation", False):
            found.append(Kernel(event.key, microseconds / 1000, event.count))
    return found


def table(kernels: Sequence[Kernel], *, steps: int, step_milliseconds: float) -> str:
    """The time of a step by family."""
    busy = sum(kernel.milliseconds for kernel in kernels) / steps
    lines = [f"{'family':<34}{'ms a step':>12}{'share':>9}{'calls':>9}"]
    for family, members in by_family(kernels).items():
        spent = sum(kernel.milliseconds for kernel in members) / steps
        calls = sum(kernel.calls for kernel in members) / steps
        lines.append(f"{family:<34}{spent:>12.2f}{spent / busy:>9.1%}{calls:>9.0f}")
        for kernel in members[:LARGEST]:
            lines.append(f"    {kernel.name[:60]:<60}{kernel.milliseconds / steps:>10.2f}{kernel.calls / steps:>9.0f}")
    idle = max(0.0, step_milliseconds - busy)
    lines.append(f"{'busy':<34}{busy:>12.2f}")
    lines.append(f"{'a step takes':<34}{step_milliseconds:>12.2f}, {idle:.2f} of it without any of these")
    return "\n".join(lines)


def run(step: TrainingStep, *, steps: int, trace: Path) -> str:
    """Profile some steps; returns the table."""
    on_gpu = step.on_gpu
    for _ in range(3):
        step.once()  # compiled, allocated, and timed without the profiler
    undisturbed = 1000 * min(step.seconds[1:])
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step.once()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    return table(kernels_of(profiler, on_gpu=on_gpu), steps=steps, step_milliseconds=undisturbed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    pairs = GPU_PAIRS if on_gpu else CPU_PAIRS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", type=int, default=0, help=f"0 to {len(pairs) - 1}: {', '.join(p.name for p in pairs)}"
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="share of each sequence that is kept")
    parser.add_argument(
        "--contender", choices=("reference", "best", "online", "lean", "fp8", "cached"), default="cached"
    )
    parser.add_argument("--compiled", action="store_true", help="its layers are compiled")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trace", type=Path, help="left out, beside the results, not for the repository")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.pair < len(pairs) or not 0 < arguments.fraction <= 1 or arguments.steps < 1:
        parser.error("expected a pair of the list, a fraction in (0, 1], and at least one step")
    quieten_transformers()
    if not on_gpu:
        torch.set_num_threads(1)
    pair, about = pairs[arguments.pair], environment()
    contender = arguments.contender + COMPILED * arguments.compiled
    name = f"profile-{arguments.contender}-{'compiled-' * arguments.compiled}{arguments.fraction:g}"
    trace = arguments.trace or results_path(name, about["device"]).with_suffix(".trace.json")
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.open("a").close()  # before minutes are spent
    except OSError as error:
        parser.error(f"--trace: {trace}: {error.strerror}")
    with tempfile.TemporaryDirectory() as folder:
        steps = PairSteps(pair, arguments.fraction, Shared(pair.student, pair.teacher, _device(on_gpu)), Path(folder))
        make = {
            "reference": partial(steps.reference, best=False, recomputed=True),
            "best": partial(steps.reference, best=True, recomputed=False),
            "online": partial(steps.online, recomputed=False),
            "lean": partial(steps.online, recomputed=True, lean=True),
            "fp8": partial(steps.online, recomputed=False, fp8=True),
            "cached": partial(steps.cached, recomputed=False),
        }[arguments.contender]
        try:
            text = run(make(compiled=arguments.compiled), steps=arguments.steps, trace=trace)
        except (NotMeasured, InputError) as error:
            sys.exit(f"{pair.group(arguments.fraction)}, {contender}: {error}")
    print(f"{pair.group(arguments.fraction)}, {contender}, on {about['device']}\n{text}\n{trace}")


def _device(on_gpu: bool) -> str:
    return "cuda" if on_gpu else "cpu"


if __name__ == "__main__":
    main()
