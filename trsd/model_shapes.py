"""Configs of well-known models by name, to plan or measure with when their weights are not at hand.

The shapes are those of the models' published config files; tests hold their parameter counts.
"""

import difflib
from pathlib import Path
from typing import Any

from trsd.errors import InputError


def _config(kind: str, **fields: Any) -> Any:
    """A config of a class of transformers, which is imported when a shape is asked for, not when its name is read."""
    import transformers

    return getattr(transformers, kind)(**fields)


def _qwen3(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, tied: bool) -> Any:
    """A dense Qwen3: 8 key-value heads of 128."""
    return _config(
        "Qwen3Config",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        use_cache=False,
    )


SHAPES = {
    "Qwen3-0.6B": lambda: _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": lambda: _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": lambda: _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": lambda: _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": lambda: _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": lambda: _qwen3(5120, 25600, 64, 64, tied=False),
    "Qwen2.5-7B": lambda: _config(
        "Qwen2Config",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        use_cache=False,
    ),
    "Phi-4-mini": lambda: _config(
        "Phi3Config",
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        pad_token_id=199999,
        bos_token_id=199999,
        eos_token_id=199999,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "SmolLM2-135M": lambda: _config(
        "LlamaConfig",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    ),
}


def config_of(name_or_path: str) -> Any:
    """The config of a name in ``SHAPES``, with or without its owner and ``-Base`` or ``-Instruct``, or of a model.

    Raises:
        InputError: neither a known name nor a model that can be had, with the names that are known.
    """
    name = name_or_path.rsplit("/", 1)[-1]
    for suffix in ("-base", "-instruct"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    known = {shape.lower(): shape for shape in SHAPES}
    if name.lower() in known and not Path(name_or_path).is_dir():
        return SHAPES[known[name.lower()]]()
    from transformers import AutoConfig

    from trsd.models import model_folder, refuse_other_kinds

    try:
        folder = model_folder(name_or_path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name_or_path}: {hint}no known shape ({', '.join(SHAPES)}), and no model: {reason}"
        ) from error
    refuse_other_kinds(config, folder)
    return config
