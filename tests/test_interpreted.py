"""The Triton kernels' numerics without a GPU: their tests run again in the interpreter, in a process of its own.

The fast tests run a quarter of the cases (``thinned.py``), the slow ones the others.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import thinned

HERE = Path(__file__).parent
OF_THE_INTERPRETER = ("test_interpreted_bf16.py", "test_sanitizer.py")
NAMES = (
    "test_linear_distill.py",
    "test_logits_distill.py",
    "test_teacher_targets.py",
    "test_cuda_dtypes.py",
    "test_branch_attention.py",
)
PEERS_IN_TRITON = {"liger_kernel": "liger-kernel", "fla": "fla-core", "cut_cross_entropy": "cut-cross-entropy"}


def run_in_the_interpreter(*names, which="not slow"):
    """The tests of files, or single tests, in one process, for every start takes seconds."""
    pytest.importorskip("triton")
    marked = f"not gpu and {which}"
    command = [sys.executable, "-m", "pytest", "-x", "-rp", "-m", marked, "-p", "no:cacheprovider"]
    command += [str(HERE / name) for name in names]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    silent = [name for name in names if f"PASSED tests/{name}" not in result.stdout]
    assert not silent, f"nothing of {', '.join(silent)} ran: {result.stdout[-2000:]}"


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels_in_the_interpreter(which):
    run_in_the_interpreter(*NAMES, which=which)


def test_the_interpreter_is_as_the_tests_need_it():
    run_in_the_interpreter(*OF_THE_INTERPRETER)


def test_every_value_of_every_parameter_is_in_the_part_of_the_cases_that_is_kept():
    class Item:
        def __init__(self, test, **params):
            self.nodeid, self.callspec = f"f.py::{test}[{params}]", SimpleNamespace(params=params)

    many = [Item("many", a=a, b=b, c=c) for a, b, c in itertools.product("123", "45", "6789")]
    each = [Item("each", seed=seed) for seed in range(5)]
    alone = Item("alone")
    del alone.callspec
    gone = list(thinned.left_out([*many, *each, alone]))
    kept = [item for item in many if item not in gone]
    assert len(kept) == len(many) * thinned.PART and not {*each, alone} & {*gone}
    for name, values in (("a", "123"), ("b", "45"), ("c", "6789")):
        assert {item.callspec.params[name] for item in kept} == {*values}
    assert gone == list(thinned.left_out([*many, *each, alone]))


def test_peers_in_the_interpreter():
    if not any(map(importlib.util.find_spec, PEERS_IN_TRITON)):
        pytest.skip(f"pip install {' '.join(PEERS_IN_TRITON.values())}: none of them is there")
    run_in_the_interpreter("test_bench_peers.py")
