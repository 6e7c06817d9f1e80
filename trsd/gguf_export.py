"""A model folder of a Qwen2, Qwen3 or Llama architecture as a GGUF file: the work of ``trsd.export``.

One file that llama.cpp serves, and that its ``llama-quantize`` makes smaller. Weights are written one at a time;
matrices in ``dtype``, vectors in fp32 as llama.cpp wants them. What the model card says about serving (closer, tags,
budgets, limits) goes along under ``trsd.*``.

Whatever would come out another model is refused by name: scaled rotary positions, sliding windows, biases that
llama.cpp has no place for, a tokenizer that it would cut otherwise (``gguf_tokenizer.py``). llama.cpp's own
convert_hf_to_gguf.py knows more architectures, and takes a checkpoint folder as it is.
"""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trsd.errors import InputError
from trsd.export import ExportArguments
from trsd.gguf_tokenizer import Vocabulary, vocabulary_of
from trsd.merging import Checkpoint
from trsd.model_card import name_of_folder, serving_facts
from trsd.models import load_config, load_tokenizer, model_folder
from trsd.traces import read_rows

ARCHITECTURES = {"qwen2": "QWEN2", "qwen3": "QWEN3", "llama": "LLAMA"}
CONVERTER = "llama.cpp's own convert_hf_to_gguf.py may know it"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def export(
    folder: Path, output: Path, *, dtype: str = "bf16", pre_tokenizer: str | None = None, texts: Path | None = None
) -> None:
    """Write the model in ``folder`` to the GGUF file ``output``; the arguments are those of ``ExportArguments``.

    Raises:
        InputError: what cannot be exported as the model that it is, by name.
        ImportError: the package gguf is not installed.
    """
    gguf = _gguf()
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output, or move it away")
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    refuse_unsupported(config)
    facts = serving_facts(folder)
    with ExitStack() as stack:
        model = Checkpoint(folder, stack)
        names = _gguf_names(gguf, config, model)
        vocabulary = vocabulary_of(
            tokenizer,
            config.vocab_size,
            tags=tuple(facts[name] for name in ("open_tag", "close_tag") if facts),
            pre_tokenizer=pre_tokenizer,
            texts=_texts_of(texts, tokenizer) if texts else (),
        )
        with _new_file(output) as temporary:
            writer = gguf.GGUFWriter(temporary, config.model_type)
            try:
                _add_config(gguf, writer, config, dtype, name_of_folder(folder))
                _add_vocabulary(writer, vocabulary, tokenizer)
                _add_facts(writer, facts)
                _write_tensors(gguf, writer, names, model, config, dtype)
            finally:
                writer.close()


def refuse_unsupported(config: Any) -> None:
    """Raise InputError for a model that would be another one in llama.cpp."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(f"model: {kind} is none of {', '.join(ARCHITECTURES)}, which are exported here; {CONVERTER}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise InputError(f"model: its rotary positions are scaled ({rope}), expected default; {CONVERTER}")
    if getattr(config, "use_sliding_window", False):
        raise InputError(f"model: it attends within a sliding window, which {kind} of llama.cpp does not; {CONVERTER}")
    if config.hidden_act != "silu":
        raise InputError(f"model: its activation is {config.hidden_act}, expected silu; {CONVERTER}")
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        raise InputError(f"model: it has {' and '.join(biased)}, expected none in {kind}; {CONVERTER}")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"GGUF files are written with the package gguf ({error}): pip install 'trsd[gguf]'"
        ) from error
    return gguf


def _gguf_names(gguf: Any, config: Any, model: Checkpoint) -> dict[str, str]:
    """llama.cpp's name -> ours of every tensor."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # llama.cpp takes the embedding where none is
    names = {}
    for ours in sorted(model.file_of.keys() - tied):
        theirs = known.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise InputError(f"{model.folder}: {ours} has no place in a {config.model_type} of llama.cpp; {CONVERTER}")
        names[theirs] = ours
    if (rows := model.shape("model.embed_tokens.weight")[0]) != config.vocab_size:
        raise InputError(f"{model.folder}: the embedding has {rows} rows, its config says {config.vocab_size}")
    return names


def _texts_of(path: Path, tokenizer: Any) -> list[str]:
    """Every text of a file of rows, and each row's token ids as the one text that they make."""
    found = []
    for _, row in read_rows(path):
        found += [value for value in row.values() if isinstance(value, str)]
        parts = [row.get(f"{name}_ids") or [] for name in ("prompt", "reasoning", "close", "answer")]
        if whole := [i for part in parts for i in part]:
            found.append(tokenizer.decode(whole))
    return found


@contextmanager
def _new_file(output: Path) -> Iterator[Path]:
    """A temporary file that becomes ``output`` once it is complete."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _add_config(gguf: Any, writer: Any, config: Any, dtype: str, name: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _add_facts(writer: Any, facts: dict[str, Any] | None) -> None:
    for name, value in (facts or {}).items():
        if isinstance(value, str):
            writer.add_string(f"trsd.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"trsd.{name}", value)
        else:
            writer.add_uint32(f"trsd.{name}", value)


def _write_tensors(gguf: Any, writer: Any, names: dict[str, str], model: Checkpoint, config: Any, dtype: str) -> None:
    """Say what tensors there are, then write them one by one."""
    kinds = {name: dtype if len(model.shape(ours)) > 1 else "f32" for name, ours in names.items()}
    for name, ours in names.items():
        shape, kind = model.shape(ours), kinds[name]
        raw = gguf.GGMLQuantizationType[kind.upper()]
        num_bytes = math.prod(shape) * DTYPES[kind].itemsize
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, ours in names.items():
        tensor = _as_llama_cpp(model.tensor(ours), ours, config)
        converted = tensor.to(DTYPES[kinds[name]])
        if not converted.isfinite().all():
            raise InputError(f"{model.folder}: {ours} is not finite in {kinds[name]}: use --dtype bf16 or f32")
        whole = torch.int16 if kinds[name] == "bf16" else converted.dtype  # numpy knows no bf16; its bytes are these
        writer.write_tensor_data(converted.contiguous().view(whole).numpy())


def _as_llama_cpp(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Llama's queries and keys in llama.cpp's rotary order: pairs side by side instead of half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def run(args: ExportArguments) -> None:
    """Export, and say where."""
    export(model_folder(args.model), args.output, dtype=args.dtype, pre_tokenizer=args.pre_tokenizer, texts=args.texts)
    print(f"model   {args.output}")
