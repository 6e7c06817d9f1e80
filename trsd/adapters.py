"""LoRA through peft: a student whose linear layers get a trained product of two thin matrices, all else frozen.

    y = W x + 2 B A x,    A [rank, in], B [out, rank], B = 0 at the start (arXiv 2106.09685; alpha = 2 rank)   (1)

The adapter is put into the transformers model itself, which stays what it is to everyone else: its body, its lm_head
and its embeddings, both frozen, are where they were. A checkpoint holds W + 2 B A as a plain model folder, for whoever
loads it, and the adapter in ``adapter/`` in peft's format, from which training goes on exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsd.errors import InputError

ADAPTER = "adapter"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def add_adapter(model: PreTrainedModel, rank: int, *, seed: int) -> None:
    """Freeze ``model`` and give every linear layer of its body an adapter, in fp32 and in effect.

    Args:
        model: any that ``load_model`` made.
        rank: of the adapter, at least 1.
        seed: of A.

    Raises:
        ImportError: peft is not installed.
        InputError: the body has no linear layer.
    """
    config_class = _peft().LoraConfig
    layers = {name.rpartition(".")[2] for name, m in model.get_decoder().named_modules() if isinstance(m, nn.Linear)}
    if not layers:
        raise InputError(f"lora_rank: {type(model).__name__} has no linear layers to adapt: leave it out")
    model.requires_grad_(False)
    config = config_class(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(layers), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them in the precision of the layer, too coarse for small steps
            parameter.data = parameter.data.float()


def has_adapter(model: nn.Module) -> bool:
    """Whether ``add_adapter`` was here."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` computes what it did before ``add_adapter``."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def adapter_files(model: PreTrainedModel) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """The adapter of ``model`` in peft's format: tensors and other content by file name, under ``adapter/``."""
    tensors = {PEFT_PREFIX + key: tensor for key, tensor in model.get_adapter_state_dict().items()}
    with TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        config = (Path(folder) / CONFIG).read_bytes()
    return {f"{ADAPTER}/{WEIGHTS}": tensors}, {f"{ADAPTER}/{CONFIG}": config}


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of ``model`` without adapter, (1) worked out in fp32 on the CPU; ``model`` stays as it is."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor
    for key, tensor in model.state_dict().items():
        name, inside, rest = key.partition(".base_layer.")
        if not inside and key.rpartition(".lora_")[0] in layers:
            continue
        if tensor.data_ptr() not in seen:
            value = tensor.cpu()
            value = value.float() if value.is_floating_point() else value
            if inside and rest == "weight":
                value = value + layers[name].get_delta_weight("default").cpu()
            seen[tensor.data_ptr()] = value
        found[f"{name}.{rest}" if inside else key] = seen[tensor.data_ptr()]
    return found


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
    own = model.get_adapter_state_dict()
    unlike = sorted(k for k in state.keys() | own.keys() if k not in state or k not in own)
    unlike = unlike or sorted(key for key in own if own[key].shape != state[key].shape)
    if unlike:
        raise InputError(f"{path} is the adapter of another model or rank: {unlike[0]} differs")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _peft():
    try:
        import peft
    except ImportError:
        raise ImportError("lora_rank needs peft: pip install 'trsd[lora]'") from None
    return peft
