"""AdamW over two groups, and learning rates as pure functions of the step (so resuming needs no scheduler state).

What the optimizer holds of a parameter, beside the parameter itself:

    adamw_torch        two moments in fp32, 8 bytes
    adamw_torch_8bit   two moments in 8 bits and a scale for 256 of them, 2.03 bytes (torchao; arXiv 2110.02861)
    adamw_torch_4bit   two moments in 4 bits and a scale for 128 of them, 1.06 bytes (torchao; arXiv 2309.01507)
    adamw_bnb_8bit     as adamw_torch_8bit, by bitsandbytes

Parameters of fewer than 4096 numbers keep fp32 moments in all. A step computes in fp32 and rounds what it keeps.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trsd.errors import InputError

DEFAULT = "adamw_torch"
LOW_BIT_PARTS = ("codes", "scale", "qmap")  # of torchao's moments, each a tensor of a class of its own


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, name: str = DEFAULT
) -> torch.optim.Optimizer:
    """AdamW by its Hugging Face ``name``; matrices decay, norms and biases do not.

    On a GPU in one kernel: torch's default there makes temporaries of the weights' own size.

    Raises:
        ImportError: the package of ``name`` is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    on_gpu = bool(trained) and all(parameter.is_cuda for parameter in trained)
    options: dict[str, Any] = {"fused": on_gpu} if name == DEFAULT else {}
    return optimizer_class(name, on_gpu=on_gpu)(
        [group for group in groups if group["params"]], lr=learning_rate, **options
    )


def optimizer_class(name: str, *, on_gpu: bool) -> type[torch.optim.Optimizer]:
    """The class of ``name``; raises ImportError, with the extra to install, when its package is missing."""
    if name == DEFAULT:
        return torch.optim.AdamW
    package = "bitsandbytes" if name == "adamw_bnb_8bit" else "torchao"
    try:
        if package == "bitsandbytes":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit
        from torchao.optim import AdamW4bit, AdamW8bit
    except ImportError:
        raise ImportError(f"optim {name} needs {package}: pip install 'trsd[lowbit]'") from None
    found = {"adamw_torch_8bit": AdamW8bit, "adamw_torch_4bit": AdamW4bit}[name]
    return found if on_gpu else _uncompiled(found)


def rounded_up(steps: float) -> int:
    """The next whole number of steps; what is above one by the rounding of a product is that one."""
    return math.ceil(steps * (1 - 1e-12))


def _uncompiled(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """``base`` without the compiler that its step calls: a CPU gains little by it, and may have no C++ compiler."""

    class Uncompiled(base):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Uncompiled


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as plain tensors, ``<state>/<parameter>`` or ``<state>.<part>/<parameter>``, not copied."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for key, value in _parts(optimizer.state.get(parameter, {})):
            tensor = torch.as_tensor(value).detach().contiguous()
            if tensor.data_ptr() in seen:  # a table that all parameters share; a file may not hold a tensor twice
                tensor = tensor.clone()
            seen.add(tensor.data_ptr())
            found[f"{key}/{name}"] = tensor
    return found


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo ``state_tensors``; the weights stay as they are.

    Raises:
        InputError: the names, shapes or types are not those of this model and optimizer.
    """
    parameters = dict(model.named_parameters())
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        if name not in parameters:
            raise InputError(
                f"the checkpoint's optimizer state {key} fits no parameter of this model: it is that of another"
            )
        kept.setdefault(name, {})[entry] = value
    restore = _restore_adamw if isinstance(optimizer, torch.optim.AdamW) else _restore_low_bit
    for name, state in kept.items():
        restore(optimizer, parameters[name], name, state)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer holds beside the parameters; a table that several of them share counts once."""
    parts = [part for state in optimizer.state.values() for _, part in _parts(state) if isinstance(part, Tensor)]
    return sum(part.nbytes for part in {id(part): part for part in parts}.values() if part.ndim)


def _parts(state: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """(key, plain tensor or number) of all that ``state`` is made of."""
    for entry, value in state.items():
        if hasattr(value, LOW_BIT_PARTS[0]):
            yield from ((f"{entry}.{part}", getattr(value, part)) for part in LOW_BIT_PARTS)
        else:
            yield entry, value


def _restore_adamw(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, state: dict[str, Tensor]) -> None:
    fused = any(group.get("fused") for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    for entry, value in state.items():
        if value.ndim and (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            raise InputError(
                f"the checkpoint's optimizer state {entry}/{name}, {value.dtype} of shape {list(value.shape)}, fits no "
                "parameter of this model: it is that of another model or vocabulary"
            )
        # AdamW keeps its moments beside the parameter, and its step counter on the CPU unless it is one fused kernel.
        beside = value.ndim or fused
        # Copied, for a loaded tensor is a view of the file.
        optimizer.state[parameter][entry] = value.to(parameter.device if beside else value.device, copy=True)


@torch.no_grad()
def _restore_low_bit(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, state: dict[str, Tensor]) -> None:
    """Let the optimizer make its own states in a step that is taken back, then fill in what they hold."""
    before, gradient = parameter.detach().clone(), parameter.grad
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameter.grad = gradient
    parameter.copy_(before)
    own = dict(_parts(optimizer.state[parameter]))
    if unlike := sorted(own.keys() ^ state.keys()):
        raise InputError(f"the checkpoint's optimizer state of {name} is another optimizer's: {unlike[0]} differs")
    for key, value in state.items():
        if not isinstance(own[key], Tensor):
            optimizer.state[parameter][key] = type(own[key])(value.item())
        elif own[key].shape == value.shape and own[key].dtype == value.dtype:
            own[key].copy_(value)
        else:
            raise InputError(
                f"the checkpoint's optimizer state {key}/{name} fits no parameter of this model: expected "
                f"{tuple(own[key].shape)} {own[key].dtype}, got {tuple(value.shape)} {value.dtype}"
            )


def learning_rate_factor(name: str, step: int, *, num_steps: int, warmup_ratio: float) -> float:
    """Learning rate of ``step`` (from 0) over its peak.

    ``constant`` and ``cosine`` warm up linearly over ``warmup_ratio`` of the steps; cosine then falls to 0.
    ``onecycle`` rises from 1/25 to 1 and falls to 1/250,000 along cosines (arXiv 1708.07120; torch's OneCycleLR with
    its momentum left alone).
    """
    if name == "onecycle":
        peak = float(warmup_ratio * num_steps) - 1
        if step <= peak and peak > 0:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / max(1e-9, num_steps - 1 - peak)))
    warmup = rounded_up(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    return _cosine(1.0, 0.0, (step - warmup) / max(1, num_steps - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the learning rate ``value``, in place where the optimizer keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
