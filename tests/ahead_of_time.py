"""Compile Triton kernels for a GPU that is not there and read what the assembler says about them."""

import contextlib
import io
import re
from typing import NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

# Shared memory one program may take, bytes: the opt-in maximum of the CUDA C++ Programming Guide.
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
SMALL_SHARED_MEMORY_LIMIT = {86: 101_376, 120: 101_376}  # workstations and desktops
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


class Compiled(NamedTuple):
    """Resources of one compiled kernel, per thread or per program."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    fp64_operations: int


def compile_for(
    kernel, capability: int, arguments: dict, constants: dict, *, num_warps: int, num_stages: int = 3
) -> Compiled:
    """Compile ``kernel`` for ``sm_<capability>``.

    Args:
        arguments: name -> torch dtype of a pointer, or "i32" / "fp32" of a scalar, in the kernel's order. Pointers and
            the integers whose name ends in ``_stride`` are taken as multiples of 16, as Triton finds them at a launch.
        constants: name -> value of every ``tl.constexpr``.
    """
    signature = {
        name: "constexpr" if name in constants else kind if isinstance(kind, str) else "*" + TYPES[kind]
        for name, kind in ((name, arguments.get(name)) for name in kernel.arg_names)
    }
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name.endswith("_stride")]
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    log = io.StringIO()
    before = knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    try:
        with contextlib.redirect_stdout(log):
            built = compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options=dict(num_warps=num_warps, num_stages=num_stages),
            )
    finally:
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = before

    def reported(pattern: str) -> int:
        return int(re.search(pattern, log.getvalue())[1])

    return Compiled(
        registers=reported(r"Used (\d+) registers"),
        stack_bytes=reported(r"(\d+) bytes stack frame"),
        spill_bytes=reported(r"(\d+) bytes spill stores") + reported(r"(\d+) bytes spill loads"),
        shared_bytes=built.metadata.shared,
        fp64_operations=len(re.findall(r"\.f64\b", built.asm["ptx"])),
    )
