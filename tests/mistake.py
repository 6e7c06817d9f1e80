"""A mistake: what is typed where, and what comes of it; and the scenes that mistakes are made in."""

import errno
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.exc import InvalidCxxCompiler


@dataclass(frozen=True)
class Scene:
    """Where a mistake is made: ``prepare`` may change it."""

    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack


@dataclass(frozen=True)
class Mistake:
    """What somebody types in the workspace of test_mistakes.py, and what is printed."""

    name: str
    typed: str
    """A command of ``python -m trsd.``"""
    says: str
    """The whole message, as it is on the page; … stands for what varies."""
    code: int = 2
    prepare: Callable[[Scene], Any] | None = None
    leaves: str = ""
    """What a run keeps that ended after it had begun; else nothing may be left."""
    loads_weights: bool = False


def without(*packages):
    def prepare(scene):
        for name in packages:
            scene.monkeypatch.setitem(sys.modules, name, None)

    return prepare


def raising(target, error):
    """``target`` raises ``error`` when it is called."""

    def prepare(scene):
        def raise_(*_, **__):
            raise error

        scene.monkeypatch.setattr(target, raise_)

    return prepare


def without_fp8_products(scene):
    """A torch, such as 2.11, that multiplies in 8 bits on a CPU with one scale alone."""
    raising("torch._scaled_mm", RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend."))(scene)


def memory_of(cpu, *, cuda=None):
    """A machine of so many bytes."""

    def prepare(scene):
        scene.monkeypatch.setattr("trsd.memory.total_memory", lambda device: cuda if device == "cuda" else cpu)

    return prepare


def without_compiler(scene):
    """A machine on which torch finds no C++ compiler."""

    def search(*_):
        raise InvalidCxxCompiler

    scene.monkeypatch.setattr("torch._inductor.cpp_builder.cpp_compiler_search", search)


def broken_compiler(scene):
    """A machine whose C++ compiler is there and compiles nothing."""

    def backend(graph, inputs):
        raise RuntimeError("C++ compile error\n\nmain.cpp:2:10: fatal error: Python.h: No such file or directory\n")

    scene.monkeypatch.setattr("trsd.placement.Placement.compiler", staticmethod(backend))


def read_only(scene):
    def mkdir(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    scene.monkeypatch.setattr(Path, "mkdir", mkdir)


TINY = "--model_name_or_path tiny --data text.jsonl --output_dir run"
SMALL = f"{TINY} --max_length 512 --max_tokens_per_batch 512 --max_steps 1"
SHORT = "--max_thinking_tokens 8 --max_answer_tokens 4"
GENERATE = f"generate --model tiny --data questions.jsonl --output new.jsonl {SHORT}"
TRACES = "--model_name_or_path tiny --max_length 512 --max_tokens_per_batch 512 --max_steps 1 --data traces.jsonl"
