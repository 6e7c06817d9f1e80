"""The frozen weights under an adapter in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes.

A weight is one of 16 values, the quantiles of a normal distribution, times a scale of its block of 64: 0.5 bytes and a
scale of 4 for 64, together 0.5625 bytes a weight. A layer's weights are made whole for its product, forward and
backward, and dropped again. Which weights they are is decided by the model folder alone, so a resumed run has the same.
"""

import math

from torch import Tensor, nn
from transformers import PreTrainedModel

BLOCK = 64


def to_nf4(model: PreTrainedModel) -> int:
    """Turn linear layers of the body of ``model`` into 4 bits, in place; returns how many.

    A layer whose inputs are no multiple of 64 stays as it is.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    bitsandbytes = require_bitsandbytes()
    changed = 0
    for module in list(model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            # Blocks that run on from one row into the next come back wrong from bitsandbytes 0.50 on a CPU.
            if type(layer) is not nn.Linear or layer.in_features % BLOCK:
                continue
            weight = layer.weight.detach()
            low = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=weight.dtype, device="meta"
            )
            low.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=False, module=low
            )
            low.bias = layer.bias
            # It would repack the weights when it is first evaluated, into what its backward does not read.
            low.support_avx512bf16_for_cpu = False
            setattr(module, name, low.to(weight.device))
            changed += 1
    return changed


def whole_weight(parameter: Tensor) -> Tensor:
    """What a parameter that may be in 4 bits stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    return require_bitsandbytes().functional.dequantize_4bit(parameter.data, state)


def num_weights(parameter: Tensor) -> int:
    """Of a parameter that may be in 4 bits, which packs two into each number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def require_bitsandbytes():
    """bitsandbytes; raises ImportError, with the extra to install, where it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError("lora_base nf4 needs bitsandbytes: pip install 'trsd[lowbit]'") from None
    return bitsandbytes
