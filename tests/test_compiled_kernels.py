"""Every Triton kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: nothing spills, nothing is too large."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY_LIMIT, compile_for  # noqa: E402

from trsd_kernels import DistillOptions, distill_rows, triton_rows  # noqa: E402

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


def test_every_kernel_of_the_package_is_compiled_here():
    written = {name for name, value in vars(distill_rows).items() if name.endswith("_kernel") and callable(value)}
    assert written == {kernel.fn.__name__ for kernel in KERNELS.values()}


@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMIT)
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
