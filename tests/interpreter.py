"""Triton's interpreter as the tests need it: faster, and right about bf16.

For a launch it replaces the builtins of ``triton.language``. When the kernel calls another jitted function, as every
reduction does, it looks through all of these modules once more and finds nothing: half of its time. Every sum of whole
numbers it calculates once more in 64 bits, to tell an overflow, which it then does not tell; and wherever it looks up a
dtype it makes a table of them all.

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
    _leave_out_what_nobody_reads()
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


def _leave_out_what_nobody_reads():
    from triton.runtime import interpreter

    look_up, found = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        if dtype.scalar.is_ptr():
            return look_up(dtype)
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = looked_up
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


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
        if not any(operand.data.dtype == np.uint16 for operand in operands):  # which is what bf16 is held in
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
