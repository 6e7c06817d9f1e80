"""Triton's interpreter made faster for the tests: what it has replaced it does not look for again.

For a launch it replaces the builtins of ``triton.language``. When the kernel calls another jitted function, as every
reduction does, it looks through all of these modules once more and finds nothing: half of its time.
"""


def look_once():
    """From now on, modules whose builtins are replaced are left as they are."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules) or not modules:
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
