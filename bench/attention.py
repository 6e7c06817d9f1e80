"""Attention alone: the rows that are measured, who measures up to them, and how many operations they are.

A row without branches holds sequences of mixed lengths. A row with branches is a trunk and K branches; the same
sequences without sharing are K packed ones, each the trunk's first ``cut`` tokens and its branch.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import NotMeasured, Rounds, take_turns
from trsd_kernels import AttentionRequest, PackedLayout, packed_layout, varlen_attention
from trsd_kernels.attention_backends import refusal

BACKWARD_PER_FORWARD = 2.5  # five products where the forward has two
# Of output and gradients, relative to float64; bf16's rounding is 4e-3 an operand.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Heads(NamedTuple):
    """The heads of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Setting(NamedTuple):
    """What attention runs over."""

    heads: Heads
    lengths: tuple[int, ...]
    """Tokens of each sequence, or of the one trunk."""
    cuts: tuple[int, ...] = ()
    branch_length: int = 0

    @property
    def name(self) -> str:
        heads = f"{self.heads.num_heads}/{self.heads.num_kv_heads} heads of {self.heads.head_dim}"
        if self.cuts:
            return (
                f"trunk of {self.lengths[0]}, {len(self.cuts)} branches of {self.branch_length} at even cuts, {heads}"
            )
        return f"{sum(self.lengths)} tokens in {len(self.lengths)} sequences, {heads}"

    def layout(self, *, separate: bool = False, device: str = "cpu") -> PackedLayout:
        """The row; ``separate``: its branches' sequences side by side, sharing nothing."""
        if separate:
            return packed_layout([cut + self.branch_length for cut in self.cuts], device=device)
        branches = [[(cut, self.branch_length) for cut in self.cuts], *[[] for _ in self.lengths[1:]]]
        return packed_layout(self.lengths, branches, device=device)


def mixed_lengths(total: int, shortest: int, longest: int, *, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths between ``shortest`` and ``longest`` that sum to ``total``; the last one is trimmed."""
    draws, lengths = random.Random(seed), []
    while sum(lengths) < total:
        length = round(math.exp(draws.uniform(math.log(shortest), math.log(longest))))
        lengths.append(min(length, total - sum(lengths)))
    return tuple(lengths)


def even_cuts(length: int, count: int) -> tuple[int, ...]:
    """The ends of ``count`` equal parts of ``length`` tokens, the whole included."""
    return tuple(length * part // count for part in range(1, count + 1))


def visible_pairs(layout: PackedLayout) -> int:
    """Pairs of a query and a key it sees: a segment of n tokens after a cut c has n c + n (n + 1) / 2."""
    lengths = layout.lengths
    return int((lengths * layout.cuts + lengths * (lengths + 1) // 2).sum())


def flops(layout: PackedLayout, heads: Heads) -> int:
    """Multiplications and additions of the visible pairs' products, forward and backward."""
    forward = 4 * visible_pairs(layout) * heads.num_heads * heads.head_dim
    return round((1 + BACKWARD_PER_FORWARD) * forward)


class Contender(NamedTuple):
    """A back end, over the row as it is or over its separate sequences."""

    backend: str
    separate: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend}, separate sequences" if self.separate else self.backend

    def prepare(self, setting: Setting, *, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
        """A function that runs forward and backward on random inputs and returns the output.

        Raises:
            NotMeasured: the back end cannot, with its reason.
        """
        layout = setting.layout(separate=self.separate, device=device)
        request = AttentionRequest(torch.device(device), dtype, setting.heads.head_dim, layout.has_branches)
        if reason := refusal(self.backend, request):
            raise NotMeasured(reason)
        query, key, value, grad_out = draw(layout, setting.heads, dtype=dtype)

        def step() -> Tensor:
            out = varlen_attention(query, key, value, layout=layout, backend=self.backend)
            torch.autograd.grad(out, (query, key, value), grad_out)
            return out.detach()

        return step


@functools.cache
def worst_error(contender: Contender, heads: Heads, *, with_branches: bool, device: str, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients against float64, at a small size.

    Raises:
        NotMeasured: it is beyond ``TOLERANCE``, or the back end cannot run here, with the reason.
    """
    setting = Setting(heads, (150,), even_cuts(150, 3), 20) if with_branches else Setting(heads, (150, 70))
    request = AttentionRequest(torch.device(device), dtype, heads.head_dim, with_branches and not contender.separate)
    if reason := refusal(contender.backend, request):
        raise NotMeasured(reason)
    layouts = [setting.layout(separate=contender.separate, device=each) for each in (device, "cpu")]
    *tensors, grad_out = draw(layouts[0], heads, dtype=dtype)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    results = []
    for inputs, layout, backend, upstream in (
        (tensors, layouts[0], contender.backend, grad_out),
        (wide, layouts[1], "sdpa", grad_out.cpu().double()),
    ):
        out = varlen_attention(*inputs, layout=layout, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    worst = 0.0
    for name, got, wanted in zip(("output", "query", "key", "value"), *results, strict=True):
        error = float((got.cpu().double() - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE[dtype]:
            what = name if name == "output" else f"gradient of {name}"
            raise NotMeasured(f"refused, its {what} is {error:.1e} off float64's")
        worst = max(worst, error)
    return worst


def draw(layout: PackedLayout, heads: Heads, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, upstream gradient) on the layout's device, the first three to be differentiated."""
    generator = torch.Generator(device=layout.device).manual_seed(0)
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    query, key, value, grad_out = (
        torch.randn(layout.num_tokens, count, heads.head_dim, generator=generator, device=layout.device).to(dtype)
        for count in counts
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out


def measure(
    benchmark: Callable, setting: Setting, contender: Contender, reference: Contender, *, device: str
) -> dict[str, object]:
    """The measured fields of an ``AttentionLine``; both sides are checked first."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    check = dict(with_branches=bool(setting.cuts), device=device, dtype=dtype)
    error = worst_error(contender, setting.heads, **check)
    worst_error(reference, setting.heads, **check)
    ours, other = (each.prepare(setting, device=device, dtype=dtype) for each in (reference, contender))
    # Several in a round, so that a GPU computes one while the next is launched.
    repeats = 8 if device == "cuda" else 1
    run, beside = (Rounds(step, on_gpu=device == "cuda", repeats=repeats) for step in (other, ours))
    return take_turns(benchmark, run, beside) | dict(error=error)


PLAIN_BACKENDS = ("triton", "torch", "flash_attn_4", "flash_attn_3", "flash_attn_2")
QWEN3_4B = Heads(32, 8, 128)
GPU_PLAIN = (
    Setting(QWEN3_4B, mixed_lengths(8192, 128, 4096)),
    Setting(QWEN3_4B, mixed_lengths(16384, 128, 4096)),
    Setting(Heads(32, 8, 64), mixed_lengths(8192, 128, 4096)),
)
GPU_BRANCHES = tuple(
    Setting(QWEN3_4B, (length,), even_cuts(length, count), 256) for length, count in ((8192, 8), (2048, 4))
)
CPU_HEADS = Heads(4, 2, 32)
CPU_PLAIN = (Setting(CPU_HEADS, mixed_lengths(1024, 32, 256)),)
CPU_BRANCHES = (Setting(CPU_HEADS, (512,), even_cuts(512, 8), 32),)


def reference_of(device: str) -> Contender:
    """Ours, which every line is measured in turn with."""
    return Contender("triton" if device == "cuda" else "sdpa")


def cases(device: str) -> list[tuple[Setting, Contender]]:
    """Every line, in the order of measuring."""
    if device == "cpu":
        alone, plain, branches, shared = ("sdpa",), CPU_PLAIN, CPU_BRANCHES, ("sdpa",)
    else:
        alone, plain, branches, shared = PLAIN_BACKENDS, GPU_PLAIN, GPU_BRANCHES, ("triton", "torch")
    one_row = itertools.chain(itertools.product(plain, alone), itertools.product(branches, shared))
    separate = itertools.product(branches, alone)
    found = [(setting, Contender(backend)) for setting, backend in one_row]
    found += [(setting, Contender(backend, separate=True)) for setting, backend in separate]
    return found
