"""Flags of a command line from the fields of a dataclass: names with underscores, tuples as ``a,b,c``.

A switch takes True or False, and alone it means True.
"""

import ast
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import dedent, fill
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

Arguments = TypeVar("Arguments")
_REGISTRY = ConstructorRegistry()
NUMBERS = {int: "a whole number", float: "a number"}


def _number(kind: type, word: str) -> Any:
    """``word`` as an int or float, with an error that says what a number of that kind is."""
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"expected {NUMBERS[kind]}, got {word!r}") from None


@_REGISTRY.primitive_rule
def _one_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``int``, ``float``, and what may be left out as ``None``."""
    kinds = set(get_args(info.type)) or {info.type}
    optional = type(None) in kinds
    kind = next(iter(kinds - {type(None)}), None)
    if len(kinds) != 1 + optional or kind not in NUMBERS:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None}}|{kind.__name__.upper()}" if optional else kind.__name__.upper(),
        instance_from_str=lambda words: None if optional and words == ["None"] else _number(kind, words[0]),
        is_instance=lambda value: value is None if optional and value is None else isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _comma_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``tuple[item, ...]`` as one word."""
    if info.type_origin is not tuple or get_args(info.type)[1:] != (...,):
        return None
    item = get_args(info.type)[0]
    name = {str: "TEXT"}.get(item, item.__name__.upper())

    def parse(words: list[str]) -> tuple[Any, ...]:
        parts = [part.strip() for part in words[0].split(",") if part.strip()]
        return tuple(part if item is str else _number(item, part) for part in parts)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{name},{name},...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(part, item) for part in value),
        str_from_instance=lambda value: [",".join(str(part) for part in value)],
    )


def parse_flags(arguments: type[Arguments], words: Sequence[str] | None, *, prog: str, **options: Any) -> Arguments:
    """``words`` (None: the process's) as an instance of ``arguments``; exits with code 2 on what it cannot read.

    Args:
        arguments: a dataclass; the docstrings under its fields are the help.
        words: of the command line.
        prog: what the help calls the command.
        **options: of ``tyro.cli``, such as ``default`` and ``description``.
    """
    kinds = get_type_hints(arguments)
    switches = {name for name, kind in kinds.items() if kind is bool or bool in get_args(kind)}
    words = with_values(sys.argv[1:] if words is None else words, switches)
    for kind in arguments.__mro__[:-1]:
        _join_help(kind)
    try:
        with _colours_as_asked():
            return tyro.cli(
                arguments,
                args=words,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=_REGISTRY,
                **options,
            )
    except SystemExit as exit_:
        for hint in _hints(words, set(kinds)) if exit_.code else ():
            print(f"hint: {hint}", file=sys.stderr)
        raise


def described(entries: Mapping[str, str]) -> str:
    """``entries``, flags and what is said of them, in two columns that fit a terminal of 80."""
    width = max(map(len, entries)) + 3
    return "\n".join(
        fill(text, 80, initial_indent=name.ljust(width), subsequent_indent=" " * width, break_on_hyphens=False)
        for name, text in entries.items()
    )


@cache
def _join_help(kind: type) -> None:
    """Have the help of every field of ``kind`` in one piece: tyro keeps the line breaks of an indented docstring."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # installed without sources; then tyro finds no help either
        return
    (definition,) = ast.parse(dedent(source)).body
    body = definition.body  # type: ignore[attr-defined]
    for entry, below in zip(body, body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = " ".join(ast.literal_eval(below.value).split())
            name = entry.target.id  # type: ignore[union-attr]
            kind.__annotations__[name] = Annotated[kind.__annotations__[name], tyro.conf.arg(help=text)]


@contextmanager
def _colours_as_asked() -> Iterator[None]:
    """No colours where NO_COLOR is set (no-color.org), which tyro knows from a terminal without any alone."""
    terminal = os.environ.get("TERM")
    if terminal is not None and os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if terminal is not None:
            os.environ["TERM"] = terminal


def with_values(words: Sequence[str], switches: set[str]) -> list[str]:
    """``words`` with True behind every switch that stands alone."""
    found: list[str] = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        found.append(word)
        if word.startswith("--") and word[2:].replace("-", "_") in switches and following.startswith("--"):
            found.append("True")
    return found


def _hints(words: Sequence[str], names: set[str]) -> list[str]:
    """What may be meant by words that belong to no flag."""
    hints = []
    for before, word in zip(["", *words], words, strict=False):
        if before.startswith("--") or word.startswith("--"):
            continue
        if before.endswith(","):
            hints.append(f"a list is one word, without spaces: {before}{word}")
        elif Path(word).suffix.lower() in (".jsonl", ".parquet") and "data" in names:
            hints.append(f"--data {word}?")
    return hints
