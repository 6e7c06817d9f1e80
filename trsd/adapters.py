"""LoRA through peft: a student whose linear layers get a trained product of two thin matrices, all else frozen.

    y = W x + s B A x,    A [rank, in], B [out, rank], B = 0 at the start, s = alpha / rank (arXiv 2106.09685)  (1)

The adapter is put into the transformers model itself, by peft and not by transformers, whose releases ask for ones of
peft that do not exist yet. The model stays what it is to everyone else: its body, its lm_head and its embeddings, both
frozen, are where they were. A checkpoint holds W + s B A as a plain model folder, for whoever
loads it, and the adapter in ``adapter/`` in peft's format, from which training goes on exactly.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trsd.errors import InputError
from trsd.nf4 import to_nf4, whole_weight
from trsd.quiet import quiet_imports

ADAPTER = "adapter"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def add_adapter(
    model: PreTrainedModel,
    rank: int,
    *,
    seed: int,
    alpha: int | None = None,
    target_modules: Sequence[str] = (),
    base: str = "full",
) -> None:
    """Freeze ``model`` and give linear layers of its body an adapter, in fp32 and in effect.

    Args:
        model: any that ``load_model`` made.
        rank: of the adapter, at least 1.
        seed: of A.
        alpha: B A counts alpha / rank; left out, 2 rank.
        target_modules: which layers, as peft spells them: a name, or a path's end; empty: all.
        base: "full", or "nf4", the frozen layers in 4 bits (``nf4.py``).

    Raises:
        ImportError: peft is not installed, or what ``base`` needs.
        InputError: the body has no linear layer, or a name fits none.
    """
    config_class = _peft().LoraConfig
    layers = _target_layers(model, target_modules)
    model.requires_grad_(False)
    if base == "nf4":
        to_nf4(model)
        model.is_loaded_in_4bit = True  # what peft asks
    config = config_class(
        r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(config, model)
    if base == "nf4":
        del model.is_loaded_in_4bit  # for transformers it would be a model that cannot be saved
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them in the precision of the layer, too coarse for small steps
            parameter.data = parameter.data.float()


def check_adapter(config: Any, target_modules: Sequence[str]) -> None:
    """Raise what ``add_adapter`` would of a model with ``config``, before its weights are read."""
    _peft()
    with torch.device("meta"):
        _target_layers(AutoModelForCausalLM.from_config(config), target_modules)


def adapter_options(recipe: Any) -> dict[str, Any]:
    """What a ``Recipe`` says of its adapter, beside the rank and the seed, as ``add_adapter`` takes it."""
    return {"alpha": recipe.lora_alpha, "target_modules": recipe.lora_target_modules, "base": recipe.lora_base}


def _target_layers(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """``wanted``, or the names of all linear layers of the body; refuses what could not be trained."""
    body = {id(module) for module in model.get_decoder().modules() if isinstance(module, nn.Linear)}
    paths = [f".{path}" for path, module in model.named_modules() if id(module) in body]
    names = sorted({path.rpartition(".")[2] for path in paths})
    if not names:
        raise InputError(f"lora_rank: {type(model).__name__} has no linear layers to adapt: leave it out")
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    outside = [f".{path}" for path, module in model.named_modules() if id(module) in outer]
    for name in wanted:
        end = f".{name}"
        if any(path.endswith(end) for path in outside):
            raise InputError(
                f"lora_target_modules: {name} is an embedding or the lm_head, whose adapter the loss would not see, "
                f"for it takes the weight itself: leave it out (all weights, these too, learn without lora_rank); "
                f"layers of the body are {', '.join(names)}"
            )
        if not any(path.endswith(end) for path in paths):
            raise InputError(
                f"lora_target_modules: no linear layer of {type(model).__name__}'s body is called {name}: expected "
                f"some of {', '.join(names)}"
            )
    return sorted(set(wanted)) or names


def has_adapter(model: nn.Module) -> bool:
    """Whether ``add_adapter`` was here."""
    return hasattr(model, "peft_config")


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` computes what it did before ``add_adapter``."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_files(
    model: PreTrainedModel, state: dict[str, Tensor] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """The adapter of ``model`` in peft's format: tensors and other content by file name, under ``adapter/``.

    ``state``: the state dict of a ``model`` that is sharded, gathered.
    """
    names = _adapter_tensors(model)
    source = model.state_dict() if state is None else state
    tensors = {PEFT_PREFIX + key: source[name] for key, name in names.items()}
    with TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    # A set in peft, and so in another order in every process.
    config["target_modules"] = sorted(config["target_modules"])
    return {f"{ADAPTER}/{WEIGHTS}": tensors}, {f"{ADAPTER}/{CONFIG}": (json.dumps(config, indent=2) + "\n").encode()}


@torch.no_grad()
def merged_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of ``model`` without adapter, (1) worked out in fp32 on the CPU; ``model`` stays as it is.

    ``state``: the state dict of a ``model`` that is sharded, gathered.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    own = dict(chain(model.named_buffers(), model.named_parameters(remove_duplicate=False)))
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor
    for key, tensor in (model.state_dict() if state is None else state).items():
        name, inside, rest = key.partition(".base_layer.")
        if key.rpartition(".lora_")[0] in layers or key not in own:  # tables of 4-bit weights have keys of their own
            continue
        if tensor.data_ptr() not in seen:
            value = (whole_weight(own[key]) if state is None else tensor).detach().cpu()
            value = value.float() if value.is_floating_point() else value
            if inside and rest == "weight":
                value = value + _delta(layers[name], name, state)
            seen[tensor.data_ptr()] = value
        found[f"{name}.{rest}" if inside else key] = seen[tensor.data_ptr()]
    return found


def _delta(layer: Any, name: str, state: dict[str, Tensor] | None) -> Tensor:
    """What the adapter of the layer ``name`` adds to its weight."""
    if state is None:
        return layer.get_delta_weight("default").cpu()
    down, up = (state[f"{name}.lora_{part}.default.weight"] for part in "AB")
    return (up @ down) * layer.scaling["default"]


def _adapter_tensors(model: nn.Module) -> dict[str, str]:
    """Names in the state dict of ``model`` by what peft calls them in a file, without its prefix."""
    return {name.replace(".default.", "."): name for name in model.state_dict() if ".lora_" in name}


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model that ``add_adapter`` made the very adapter that a checkpoint wrote to ``folder``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        InputError: it is that of another model or rank.
    """
    path = folder / ADAPTER / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER}/{WEIGHTS}: it can be loaded as a model but not resumed")
    state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in load_file(path).items()}
    parameters = model.state_dict()
    own = {key: parameters[name] for key, name in _adapter_tensors(model).items()}
    unlike = sorted(k for k in state.keys() | own.keys() if k not in state or k not in own)
    unlike = unlike or sorted(key for key in own if own[key].shape != state[key].shape)
    if unlike:
        raise InputError(f"{path} is the adapter of another model or rank: {unlike[0]} differs")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _peft():
    try:
        with quiet_imports():
            import peft
    except ImportError:
        raise ImportError("lora_rank needs peft: pip install 'trsd[lora]'") from None
    return peft
