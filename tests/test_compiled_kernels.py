"""Every Triton kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: nothing spills, nothing is too large."""

import importlib.util

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY_LIMIT, SMALL_SHARED_MEMORY_LIMIT, compile_for  # noqa: E402

from trsd_kernels import DistillOptions, attention_kernels, distill_rows, triton_rows  # noqa: E402
from trsd_kernels.branch_attention import padded_head_dim, tilings  # noqa: E402

SLOW = pytest.mark.slow
HOPPER_FIRST = [pytest.param(each, marks=[SLOW] * (each != 90)) for each in SHARED_MEMORY_LIMIT]
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
MOST_SPILLED_LATER = 32  # bytes a thread: Triton 3.8, in the forward pass of bf16 heads of 256 on sm_90
MAX_REGISTERS = 128  # two programs of 8 warps fill a multiprocessor's 65,536
ARGUMENTS = dict(
    student_bias_ptr=torch.bfloat16,
    teacher_bias_ptr=torch.bfloat16,
    labels_ptr=torch.int64,
    state_ptr=torch.float32,
    weights_ptr=torch.float32,
    **dict.fromkeys(
        ["student_stride", "teacher_stride", "state_stride", "weights_stride", "out_stride", "vocab_size"], "i32"
    ),
    vocab_start="i32",
    **dict.fromkeys(
        ["student_scale", "student_softcap", "teacher_scale", "teacher_softcap", "temperature", "share"], "fp32"
    ),
)
FLAGS = [
    "AT_TEMPERATURE",
    "HAS_STUDENT_BIAS",
    "HAS_TEACHER_BIAS",
    "HAS_STUDENT_SOFTCAP",
    "HAS_TEACHER_SOFTCAP",
]
KINDS = {
    "accumulate": ["none", "forward_kl", "reverse_kl", "jsd", "softmax"],
    "mixture": ["jsd", "skew_kl", "skew_reverse_kl"],
    "gradient": list(distill_rows.KINDS),
}
KERNELS = {
    "accumulate": distill_rows._accumulate_kernel,
    "mixture": distill_rows._mixture_kernel,
    "gradient": distill_rows._gradient_kernel,
}


ATTENTION = [
    attention_kernels._forward_kernel,
    attention_kernels._query_gradient_kernel,
    attention_kernels._key_gradient_kernel,
]


def test_every_kernel_of_the_package_is_compiled_here():
    modules = (distill_rows, attention_kernels)
    written = {name for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    assert written == {kernel.fn.__name__ for kernel in [*KERNELS.values(), *ATTENTION]}


@pytest.mark.parametrize("capability", HOPPER_FIRST)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("logits,out", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_kernels_compile_without_spills(name, capability, logits, out):
    for kind in KINDS[name]:
        for everything in (False, True):
            options = DistillOptions(student_logit_softcap=30.0 if everything else None)
            width = triton_rows.tile_width(name, 151936, options)
            constants = dict.fromkeys(FLAGS, everything) | dict(
                KIND=distill_rows.KINDS[kind], WITH_CE=True, BLOCK_V=width
            )
            kernel = KERNELS[name]
            compiled = compile_for(
                kernel,
                capability,
                dict(ARGUMENTS, student_ptr=logits, teacher_ptr=logits, out_ptr=out),
                {key: value for key, value in constants.items() if key in kernel.arg_names},
                num_warps=triton_rows.NUM_WARPS,
            )
            print(f"sm_{capability} {name} {kind}{' with everything' if everything else ''}: {compiled}")
            assert compiled.stack_bytes == compiled.spill_bytes == 0
            assert compiled.registers <= MAX_REGISTERS
            assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT[capability]


SCALARS = [name for name, kind in ARGUMENTS.items() if kind == "fp32"]


@pytest.mark.parametrize("name", KERNELS)
def test_scalars_are_fp32_to_a_kernel_also_where_torch_hands_them_over_as_fp64(name):
    """As torch.compile does with Python floats, which would lift whole tiles."""
    kernel, options = KERNELS[name], DistillOptions(student_logit_softcap=30.0)
    constants = dict.fromkeys(FLAGS, True) | dict(KIND=distill_rows.KINDS["jsd"], WITH_CE=True)
    constants |= dict(BLOCK_V=triton_rows.tile_width(name, 151936, options))
    pointers = dict(student_ptr=torch.bfloat16, teacher_ptr=torch.bfloat16, out_ptr=torch.bfloat16)
    plain, compiled = (
        compile_for(
            kernel,
            90,
            ARGUMENTS | pointers | dict.fromkeys(SCALARS, kind),
            {key: value for key, value in constants.items() if key in kernel.arg_names},
            num_warps=triton_rows.NUM_WARPS,
        )
        for kind in ("fp32", "fp64")
    )
    assert compiled.spill_bytes == 0 and compiled.registers <= plain.registers + 2 * len(SCALARS)
    assert plain.fp64_operations == 0 and compiled.fp64_operations <= 3 * len(SCALARS)  # loads and casts


@pytest.mark.parametrize("name", KERNELS)
def test_torch_can_take_a_kernels_source_over(name, tmp_path):
    """``torch.compile`` writes it, with the globals that it names, into a module of its own."""
    wrapper = pytest.importorskip("torch._inductor.codegen.wrapper")
    source = wrapper.user_defined_triton_kernel_transitive_closure_source_code(KERNELS[name])
    path = tmp_path / "taken.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{source}")
    spec = importlib.util.spec_from_file_location("taken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, KERNELS[name].fn.__name__).arg_names == KERNELS[name].arg_names


def test_a_spill_is_seen():
    constants = dict.fromkeys(FLAGS, True) | dict(KIND=1, WITH_CE=True, BLOCK_V=8 * triton_rows.TILES["accumulate"])
    compiled = compile_for(
        distill_rows._accumulate_kernel,
        90,
        dict(ARGUMENTS, student_ptr=torch.float32, teacher_ptr=torch.float32),
        constants,
        num_warps=triton_rows.NUM_WARPS,
    )
    assert compiled.spill_bytes > 0


def attention_argument(name, dtype):
    """The type of a kernel's argument, by its name."""
    if name.endswith("_ptr"):
        half = {"lse_ptr": torch.float32, "delta_ptr": torch.float32}
        integers = dict.fromkeys(["tiles_ptr", "prefix_ends_ptr", "positions_ptr"], torch.int32)
        return (half | integers).get(name, dtype)
    return "fp32" if name in ("scale", "softcap") else "i32"


HEAD_DIMS = {
    torch.bfloat16: [64, 96, 128, 256],
    torch.float16: [pytest.param(n, marks=SLOW) for n in (64, 128, 256)],
    torch.float32: [64, pytest.param(96, marks=SLOW), 128],
}


ALL_LIMITS = SHARED_MEMORY_LIMIT | SMALL_SHARED_MEMORY_LIMIT


@pytest.mark.parametrize(
    "capability", [*HOPPER_FIRST, *(pytest.param(each, marks=SLOW) for each in SMALL_SHARED_MEMORY_LIMIT)]
)
@pytest.mark.parametrize("extras", [(), pytest.param(("HAS_SOFTCAP", "HAS_WINDOW"), marks=SLOW)])
@pytest.mark.parametrize(
    "dtype,head_dim",
    [
        pytest.param(dtype, *getattr(head_dim, "values", [head_dim]), marks=getattr(head_dim, "marks", ()))
        for dtype, head_dims in HEAD_DIMS.items()
        for head_dim in head_dims
    ],
)
def test_attention_kernels_compile_without_spills(dtype, head_dim, extras, capability):
    for kernel, tiling in zip(ATTENTION, tilings(head_dim, dtype, capability // 10), strict=True):
        compiled = compile_for(
            kernel,
            capability,
            {name: attention_argument(name, dtype) for name in kernel.arg_names},
            dict(
                GROUP=4,
                HAS_SOFTCAP="HAS_SOFTCAP" in extras,
                HAS_WINDOW="HAS_WINDOW" in extras,
                PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
                HEAD_DIM=head_dim,
                BLOCK_D=padded_head_dim(head_dim),
                BLOCK_M=tiling.block_m,
                BLOCK_N=tiling.block_n,
            ),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        print(f"sm_{capability} {kernel.fn.__name__} {dtype} {head_dim} {tuple(tiling)}: {compiled}")
        most = MOST_SPILLED_LATER if TRITON >= (3, 8) and (dtype, head_dim) == (torch.bfloat16, 256) else 0
        assert max(compiled.stack_bytes, compiled.spill_bytes) <= most
        assert compiled.shared_bytes <= ALL_LIMITS[capability]
