"""Triton's interpreter as the tests need it: faster, and right about bf16.

For a launch it replaces the builtins of ``triton.language``. When the kernel calls another jitted function, as every
reduction does, it looks through all of these modules once more and finds nothing: half of its time.

It holds bf16 as the bits it is stored in, and calculates with those as with whole numbers; and where it rounds fp32 to
bf16 it cuts. Here what is calculated with bf16 is calculated in fp32 and rounded to the nearest, as a GPU does: see
``test_interpreted_bf16.py``.
"""

import numpy as np

# What takes handles and gives one of the dtype of the last.
CALCULATE = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_dot")


def prepare():
    """From now on the interpreter of this process is as this module says."""
    _look_once()
    _calculate_bf16()


def _look_once():
    """Modules whose builtins are replaced are left as they are."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules) or not modules:
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once


def _calculate_bf16():
    from triton.runtime.interpreter import InterpreterBuilder

    for name in CALCULATE:
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.get_bf16 = lambda self, value: _rounded(np.array([value], np.float32))


def _in_fp32(calculate):
    """``calculate``, a method of the builder, with operands in bf16 widened, and its result rounded to bf16."""
    from triton.language import bfloat16, float32, int1
    from triton.runtime.interpreter import TensorHandle

    def widened(operand):
        return TensorHandle(_values(operand), float32) if operand.dtype.scalar == bfloat16 else operand

    def calculated(self, *arguments):
        operands = [each for each in arguments if isinstance(each, TensorHandle)]
        if not any(operand.dtype.scalar == bfloat16 for operand in operands):
            return calculate(self, *arguments)
        result = calculate(self, *(widened(each) if isinstance(each, TensorHandle) else each for each in arguments))
        if result.data.dtype == bool:  # of a comparison
            return TensorHandle(result.data, int1)
        return _rounded(result.data) if operands[-1].dtype.scalar == bfloat16 else result

    return calculated


def _cast(cast):
    """``cast``, the builder's, from and to bf16 by way of fp32."""
    from triton.language import bfloat16
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    def casted(self, source, dtype):
        if bfloat16 not in (source.dtype.scalar, dtype.scalar):
            return cast(self, source, dtype)
        values = _values(source)
        if dtype.scalar == bfloat16:
            return _rounded(values.astype(np.float32))
        return TensorHandle(values.astype(_get_np_dtype(dtype)), dtype.scalar)

    return casted


def _values(handle):
    """The numbers of ``handle``, those in bf16 as fp32."""
    from triton.language import bfloat16

    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == bfloat16 else handle.data


def _rounded(values):
    """A handle of fp32 ``values`` in bf16, rounded to the nearest, ties to even."""
    from triton.language import bfloat16
    from triton.runtime.interpreter import TensorHandle

    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16), bfloat16)
