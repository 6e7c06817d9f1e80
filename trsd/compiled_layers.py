"""Layers compiled by torch: norms, rotary embeddings, activations and sums as few kernels, and less kept of them.

A decoder layer is compiled in the pieces before and behind its attention, which stays outside: then one compilation
serves rows of every length and layout, all layers of a model, and every attention back end. Experts stay outside, too.
What is kept for the backward pass are the results of matrix products and of attention; all else is made again from them
inside the kernels that need it. Layers are compiled while they are in use and are themselves at all other times, for
generation feeds them caches that grow.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.models import decoder_layers
from trsd.recomputation import Recomputed

# A piece is compiled once for each dtype, size, and kind of pass (with gradients, without) of the models that share its
# code; torch's own limit, 8, is soon met by a student, its teacher and a validation pass.
MOST_VARIANTS = 64


class CompilationFailed(RuntimeError):
    """Torch could not compile a layer; the message says why, and what to do."""


class CompiledLayers:
    """The decoder layers of some models, to be compiled when they first run."""

    def __init__(self, models: Iterable[PreTrainedModel], backend: str | Callable[..., Any] = "inductor") -> None:
        """Take models whose layers are in their final place: with adapters, in 8 bits, sharded.

        Args:
            models: one that is named twice counts once.
            backend: of ``torch.compile``.

        Raises:
            InputError: a model has no layers, as far as one can see.
        """
        layers = {id(layer): layer for model in models for layer in decoder_layers(model, "torch_compile")}.values()
        self._forwards = [(layer, _compiled(layer.forward, backend)) for layer in layers]
        # Which tokens an expert sees follows from their values, which is not for a graph.
        experts = [part for layer in layers for path, part in layer.named_modules() if path.endswith("experts")]
        self._forwards += [(part, torch.compiler.disable(part.forward)) for part in experts]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers run compiled; forward and backward both belong inside, for activations may be recomputed.

        Hooks of a layer, and the checkpoint around it, run around the compiled code as around its own. Raises
        ``CompilationFailed`` for what cannot be compiled.
        """
        if not self._forwards:
            yield
            return
        with (
            torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS),
            # Else what a product needs again is kept even where it is a product of two kept ones, element by element.
            torch._functorch.config.patch(ban_recompute_materialized_backward=False),
        ):
            modules = [module for module, _ in self._forwards]
            before = [module.__dict__.get("forward") for module in modules]  # there where somebody else put one
            for module, forward in self._forwards:
                module.forward = forward
            try:
                yield
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise _failure(error) from error
            finally:
                for module, own in zip(modules, before, strict=True):
                    if own is None:
                        del module.forward
                    else:
                        module.forward = own


def _compiled(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` compiled; the checkpoint of one that is recomputed stays around it."""
    if isinstance(forward, Recomputed):
        return forward.around(_compiled(forward.inner, backend))
    return torch.compile(forward, backend=backend, dynamic=True)


def _failure(error: Any) -> Exception:
    """What to raise for torch's error of a compiler: memory that ran out there is memory that ran out."""
    inner = error.inner_exception
    if isinstance(inner, torch.OutOfMemoryError | MemoryError):
        return inner
    lines = [" ".join(line.split()) for line in str(inner).splitlines() if line.strip()] or [""]
    line = next((line for line in lines if "error:" in line), lines[0])
    return CompilationFailed(
        f"torch_compile: torch cannot compile these layers here ({type(inner).__name__}: {line[:200]}): leave it out"
    )


def require_compiler(device: str) -> None:
    """Raise InputError where nothing could be compiled for ``device``, "cuda" or "cpu", with what is missing."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InputError("torch_compile: needs Triton, which cannot be used here: install it, or leave it out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            "torch_compile: needs a C++ compiler on a CPU, and none was found: install g++, or leave it out"
        ) from None
