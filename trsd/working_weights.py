"""Mixed precision: fp32 weights that learn, and bf16 copies of them that the forward and backward passes compute with.

While the copies are in use every activation is bf16, as in a model that is loaded in bf16; autocast over fp32 weights
would keep embeddings, norms and the residual stream in fp32. A copy's gradient is added to its parameter's in fp32 as
soon as it is whole, and freed: no second set of gradients is held. Memory: 2 bytes a parameter beside the weights.

Embeddings and lm_head have no copies: a frequent token's gradient is a sum of many, which bf16 would lose, and the loss
takes the fp32 head. What the embeddings give out is rounded instead. Nor have parameters that transformers keeps in
fp32 when it loads the model in ``dtype``, such as a router's: the model's own code expects them so.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class WorkingWeights:
    """Copies in ``dtype`` of the fp32 parameters of ``model``; without ``dtype`` the parameters themselves work.

    Not ``copied``: layers that are sharded are cast when they are gathered, and only the embeddings' output is left.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None, *, copied: bool = True) -> None:
        self._slots: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        copies: dict[Tensor, Tensor] = {}
        self._dtype, self._embeddings = dtype, model.get_input_embeddings()
        kept = {id(layer.weight) for layer in (self._embeddings, model.get_output_embeddings())}
        kept |= kept_in_fp32(model, dtype)
        for module in model.modules() if dtype and copied else ():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype != torch.float32 or id(parameter) in kept:
                    continue
                if parameter not in copies:  # tied weights share one
                    copies[parameter] = _copy(parameter, dtype)
                self._slots.append((module, name, parameter, copies[parameter]))
        self._pairs = copies

    @property
    def num_bytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for copy in self._pairs.values())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, forward and backward run on the copies; both belong inside, for activations may be recomputed."""
        for module, name, _, copy in self._slots:
            module._parameters[name] = copy
        hook = self._embeddings.register_forward_hook(self._rounded)
        try:
            yield
        finally:
            hook.remove()
            for module, name, parameter, _ in self._slots:
                module._parameters[name] = parameter

    def _rounded(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._dtype is None else output.to(self._dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the parameters have become, after an optimizer step or a load."""
        if self._pairs:
            torch._foreach_copy_(list(self._pairs.values()), list(self._pairs))


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype | None) -> set[int]:
    """Ids of the parameters that ``model``'s class wants in fp32 beside others in ``dtype``."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:  # the other list is for fp16 alone
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not names:
        return set()
    pattern = re.compile("|".join(sorted(name.replace("*", ".*") for name in names)))  # as transformers matches them
    return {id(parameter) for name, parameter in model.named_parameters() if pattern.search(name)}


def _copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    copy = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:

        def hand_over(copy: Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                parameter.grad += gradient

        copy.register_post_accumulate_grad_hook(hand_over)
    return copy
