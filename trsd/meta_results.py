"""Results on the meta device, remembered by what they were made of: torch works most of them out in Python, op by op.

A model's layers are alike, so nearly every operation of a step was asked before of tensors of the same shapes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MetaResults:
    """Calls functions of tensors, and makes anew what a call of the same shapes has returned.

    It remembers what functions make of meta tensors alone.

    Args:
        pure: the functions write into no argument and change the shape of none. Of others it remembers those alone
            that return nothing but new tensors.
    """

    def __init__(self, *, pure: bool = False) -> None:
        self.pure = pure
        self._known: dict[Any, _Results | None] = {}

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``."""
        try:
            asked = function, _form(args), _form(kwargs)
        except _NotMeta:
            return function(*args, **kwargs)
        given = list(tensors_in((args, kwargs))) if self.pure else []
        asked = *asked, _shared(given)
        if asked not in self._known:
            result = function(*args, **kwargs)
            self._known[asked] = _results_of(result, list(tensors_in((args, kwargs))), pure=self.pure)
            return result
        known = self._known[asked]
        return function(*args, **kwargs) if known is None else known.make(given)


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """All tensors among an operation's arguments or results."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (tuple, list)):
        for part in nest:
            yield from tensors_in(part)
    elif isinstance(nest, dict):
        yield from tensors_in(list(nest.values()))


def new_tensors(result: Any, given: Any) -> list[Tensor]:
    """The tensors of ``result`` that are no views of ``given``."""
    storages = {tensor.untyped_storage()._cdata for tensor in tensors_in(given)}
    return [tensor for tensor in tensors_in(result) if tensor.untyped_storage()._cdata not in storages]


class _NotMeta(Exception):
    """An argument that its form does not describe."""


class _Form(NamedTuple):
    """What of a tensor without content decides the forms of results."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _form(nest: Any) -> Any:
    """What of arguments decides the forms of results; hashable."""
    kind = type(nest)
    if kind is Tensor or kind is nn.Parameter:
        if nest.is_meta and not nest.is_complex():  # which has a bit for its conjugate
            return _form_of(nest)
        if nest.device.type == "cpu" and not nest.ndim:  # a factor that compiled code is handed
            return nest.dtype, nest.item()
        raise _NotMeta
    if kind is tuple or kind is list:
        return kind, *map(_form, nest)
    if kind is dict:
        return kind, *((name, _form(value)) for name, value in nest.items())
    if kind in _PLAIN:
        return kind, nest  # for 1, 1.0 and True are equal
    raise _NotMeta


def _form_of(tensor: Tensor) -> _Form:
    return _Form(tensor.dtype, tuple(tensor.shape), tensor.stride())


def _shared(tensors: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which of ``tensors`` share bytes with which before them, and how far apart they begin, in elements."""
    first: dict[int, tuple[int, Tensor]] = {}
    found = []
    for index, tensor in enumerate(tensors):
        before, base = first.setdefault(tensor.untyped_storage()._cdata, (index, tensor))
        found.append((before, tensor.storage_offset() - base.storage_offset()))
    return tuple(found)


class _New(NamedTuple):
    """A tensor with a storage of its own."""

    form: _Form

    def make(self, given: list[Tensor]) -> Tensor:
        return torch.empty_strided(self.form.shape, self.form.strides, dtype=self.form.dtype, device="meta")


class _View(NamedTuple):
    """A tensor that shares the bytes of an argument."""

    argument: int
    form: _Form
    offset: int
    """In elements, from where the argument begins."""

    def make(self, given: list[Tensor]) -> Tensor:
        base = given[self.argument]
        return base.as_strided(self.form.shape, self.form.strides, base.storage_offset() + self.offset)


class _Value(NamedTuple):
    """A number, or a tensor of one on a CPU."""

    value: Any

    def make(self, given: list[Tensor]) -> Any:
        return self.value.clone() if isinstance(self.value, Tensor) else self.value


class _Results(NamedTuple):
    """What a function returned."""

    kind: type | None
    """Of the sequence that holds it; None of something by itself."""
    parts: list[_New | _View | _Value]

    def make(self, given: list[Tensor]) -> Any:
        made = [part.make(given) for part in self.parts]
        return made[0] if self.kind is None else self.kind(made)


def _results_of(result: Any, given: list[Tensor], *, pure: bool) -> _Results | None:
    """How to make ``result`` anew; None where that is not known."""
    kind = type(result) if type(result) in (tuple, list) else None
    parts = [result] if kind is None else list(result)
    known = [_part_of(part, given) for part in parts]
    new = [part.untyped_storage()._cdata for part, how in zip(parts, known, strict=True) if isinstance(how, _New)]
    if None in known or len(set(new)) < len(new) or not (pure or 0 < len(new) == len(known)):
        return None
    return _Results(kind, known)


def _part_of(result: Any, given: list[Tensor]) -> _New | _View | _Value | None:
    if type(result) in _PLAIN:
        return _Value(result)
    if type(result) is not Tensor or result.is_complex():
        return None
    storage = result.untyped_storage()
    for index, argument in enumerate(given):
        if argument.untyped_storage()._cdata == storage._cdata:
            offset = result.storage_offset() - argument.storage_offset()
            return _View(index, _form_of(result), offset) if argument.dtype == result.dtype else None
    if not result.is_meta:
        return None if result.ndim else _Value(result.clone())
    new = _New(_form_of(result))
    return new if new.make([]).untyped_storage().nbytes() == storage.nbytes() else None
