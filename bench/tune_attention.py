"""Which tiles are fastest on this GPU: ``python -m bench.tune_attention [--head_dim 128] [--tokens 16384]``.

Times the forward and the two gradients together for every tiling of one kernel while the other two keep theirs, over
plain rows and over a trunk with branches, in bf16 with the heads of Qwen3-4B. What does not compile, spills or runs out
of shared memory is named. The winners belong into ``trsd_kernels.branch_attention``.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.attention import QWEN3_4B, Heads, Setting, draw, even_cuts, mixed_lengths
from bench.measure import Rounds
from bench.record import environment, results_path, write_json
from trsd_kernels import PackedLayout
from trsd_kernels.attention_tiles import Tiling
from trsd_kernels.branch_attention import tilings, triton_attention

KERNELS = ("forward", "query gradient", "key gradient")
# (queries, keys) of a tile; the key gradient holds its keys, the others their queries.
BLOCKS = {
    "forward": ((128, 64), (128, 128), (64, 64), (64, 128), (128, 32)),
    "query gradient": ((128, 64), (128, 32), (64, 64), (64, 32), (128, 128)),
    "key gradient": ((32, 128), (64, 128), (32, 64), (64, 64), (128, 64)),
}
LAUNCHES = tuple(itertools.product((4, 8), (1, 2, 3)))  # warps, stages


class Outcome(NamedTuple):
    """One tiling of one kernel over one row."""

    setting: str
    kernel: str
    tiling: tuple[int, ...]
    milliseconds: float | None
    """Median of forward and backward; None where it could not run."""
    reason: str = ""


def candidates(kernel: str, shipped: Tiling) -> Iterator[Tiling]:
    """The shipped tiling, then every other."""
    yield shipped
    for (block_m, block_n), (num_warps, num_stages) in itertools.product(BLOCKS[kernel], LAUNCHES):
        if (tiling := Tiling(block_m, block_n, num_warps, num_stages)) != shipped:
            yield tiling


def time_of(work: Callable[[], None], *, on_gpu: bool, rounds: int = 5) -> float:
    """Median milliseconds of ``work`` after warming up."""
    timed = Rounds(work, on_gpu=on_gpu, repeats=4 if on_gpu else 1)
    for _ in range(rounds + 1):
        timed.once()
    return 1000 * statistics.median(timed.seconds[1:])


def forward_and_backward(
    setting: Setting, layout: PackedLayout, tensors: Sequence[Tensor], blocks: tuple[Tiling, Tiling, Tiling]
) -> None:
    """What is timed."""
    *inputs, grad_out = tensors
    out = triton_attention(*inputs, layout, softmax_scale=setting.heads.head_dim**-0.5, blocks=blocks)
    torch.autograd.grad(out, inputs, grad_out)


def tune(settings: Sequence[Setting], *, device: str, dtype: torch.dtype) -> list[Outcome]:
    """Every candidate of every kernel over every setting, the best of each printed."""
    found = []
    for setting in settings:
        layout = setting.layout(device=device)
        tensors = draw(layout, setting.heads, dtype=dtype)
        capability = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
        shipped = tilings(setting.heads.head_dim, dtype, capability)
        for place, kernel in enumerate(KERNELS):
            outcomes = []
            for tiling in candidates(kernel, shipped[place]):
                blocks = (*shipped[:place], tiling, *shipped[place + 1 :])
                work = partial(forward_and_backward, setting, layout, tensors, blocks)
                try:
                    milliseconds, reason = time_of(work, on_gpu=device == "cuda"), ""
                except Exception as error:  # out of shared memory, or a compiler that gives up
                    milliseconds, reason = None, f"{type(error).__name__}: {str(error)[:60]}"
                outcomes.append(Outcome(setting.name, kernel, tuple(tiling), milliseconds, reason))
            report(outcomes)
            found += outcomes
    return found


def report(outcomes: list[Outcome]) -> None:
    """The shipped tiling, the three fastest, and what failed."""
    ran = sorted((each for each in outcomes if each.milliseconds), key=lambda each: each.milliseconds)
    print(f"\n{outcomes[0].setting}: {outcomes[0].kernel}, the rest as shipped")
    for label, each in [("shipped", outcomes[0]), *(("fastest", each) for each in ran[:3])]:
        shown = f"{each.milliseconds:.3f} ms" if each.milliseconds else each.reason
        print(f"  {label}  (queries, keys, warps, stages) = {each.tiling}  {shown}")
    if failed := [each for each in outcomes if each.milliseconds is None]:
        print(f"  {len(failed)} could not run, the first: {failed[0].tiling} {failed[0].reason}", flush=True)


def main() -> None:
    """Tune on this GPU and keep every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head_dim", type=int, default=QWEN3_4B.head_dim)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: tiles are tuned where they run")
    heads = Heads(QWEN3_4B.num_heads, QWEN3_4B.num_kv_heads, arguments.head_dim)
    settings = [
        Setting(heads, mixed_lengths(arguments.tokens, 128, 4096)),
        Setting(heads, (8192,), even_cuts(8192, 8), 256),
    ]
    found = tune(settings, device="cuda", dtype=torch.bfloat16)
    about = environment()
    path = results_path(f"tune_attention-{arguments.head_dim}", about["device"], about["date"])
    write_json(path, {"environment": about, "lines": [each._asdict() for each in found]})
    print(path)


if __name__ == "__main__":
    main()
