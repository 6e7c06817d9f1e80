"""Activations that are not kept for the backward pass but computed again in it, a decoder layer at a time.

A layer's own ``forward`` is what runs twice (arXiv 1604.06174). Hooks of the layer stay outside and run once: FSDP2
gathers a layer's weights in one, before the backward pass that the recomputation is part of. transformers' releases put
the checkpoint now around the hooks and now inside ``forward``; so it is not theirs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trsd.models import decoder_layers

# Operations whose results are worth more than the memory they take, by a part of their names.
KEPT = ("aten::mm", "aten::addmm", "attention", "varlen", "flash_attn")


def recompute_activations(model: PreTrainedModel, policy: str, **options: Any) -> None:
    """Keep less of a layer's forward pass and compute it again in the backward pass, while the model is in training.

    Args:
        model: whose layers do so.
        policy: "full" keeps a layer's input alone; "selective" also what products and attention gave, so that only
            norms, rotations and activations run twice.
        options: of ``torch.utils.checkpoint``.

    Raises:
        InputError: the model has no list of layers.
    """
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_or_not)
    keep_activations(model)
    for layer in decoder_layers(model, "gradient_checkpointing"):
        layer.forward = Recomputed(layer, layer.forward, options)


def keep_activations(model: PreTrainedModel) -> None:
    """Undo ``recompute_activations``."""
    for layer, forward in _recomputed(model):
        del layer.forward
        if layer.forward != forward.inner:  # somebody else had put one there before
            layer.forward = forward.inner


def recomputes(model: PreTrainedModel) -> bool:
    """Whether ``recompute_activations`` was here."""
    return bool(_recomputed(model))


def _recomputed(model: PreTrainedModel) -> list[tuple[nn.Module, "Recomputed"]]:
    layers = ((layer, layer.__dict__.get("forward")) for layer in decoder_layers(model, "gradient_checkpointing"))
    return [(layer, forward) for layer, forward in layers if isinstance(forward, Recomputed)]


class Recomputed:
    """The ``forward`` of a layer whose activations are computed again."""

    def __init__(self, layer: nn.Module, inner: Callable[..., Any], options: dict[str, Any]) -> None:
        self.layer, self.inner, self.options = layer, inner, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.inner(*args, **kwargs)
        return checkpoint(partial(self.inner, **kwargs), *args, use_reentrant=False, **self.options)

    def around(self, inner: Callable[..., Any]) -> "Recomputed":
        """The same of another ``forward`` of the layer."""
        return Recomputed(self.layer, inner, self.options)


def _kept_or_not(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operation.name() if hasattr(operation, "name") else str(operation)
    kept = any(part in name for part in KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
