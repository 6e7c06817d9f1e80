"""Loading Hugging Face causal language models and running them on packed rows.

A packed row goes through the model's body with explicit ``position_ids`` and ``cu_seqlens``; the registered attention
refuses a call without them, so documents can never silently see each other. Only the body runs: logits are the
kernels' business.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from trsd.errors import InputError
from trsd.paths import resolve_bundled
from trsd_kernels import cu_seqlens_of, position_ids_of, varlen_attention

PACKED_ATTENTION = "trsd_varlen"
WEIGHT_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt", "*.py")


def model_folder(name_or_path: str) -> Path:
    """The local folder of a model: bundled, on disk, or a hub snapshot that is downloaded once."""
    path = Path(resolve_bundled(name_or_path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} is a folder without config.json: expected a Hugging Face model folder")
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(
            f"no model folder at {name_or_path}: check the path, or give a hub name like owner/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(WEIGHT_PATTERNS)))
    except Exception as error:
        raise FileNotFoundError(
            f"{name_or_path} is no local model folder and could not be fetched from the hub ({error})"
        ) from error


def quieten_transformers() -> None:
    """Errors only, and no bars: what a command has to say it says itself."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, with a pad token (EOS when it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {folder} names no EOS token: answers could never end; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The folder's causal language model, ready for packed rows; refuses what the loss or packing would get wrong."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"the model of {folder} cannot be loaded: {error}") from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise InputError(
            f"the weights in {folder} are incomplete, {len(lost)} tensors would be random: {', '.join(lost[:5])}"
        )
    refuse_unsupported(model)
    model.set_attn_implementation(PACKED_ATTENTION)
    model = model.to(device).eval()
    check_packing(model)
    return model


def load_for_decoding(folder: Path) -> PreTrainedModel:
    """A model that is only asked to write: on a GPU in bf16 if there is one, else on the CPU in fp32."""
    cuda = torch.cuda.is_available()
    return load_model(folder, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu")


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise for a model that lets packed sequences see each other, whatever it calls its attention."""
    positions, cu_seqlens = position_ids_of([3, 3], model.device), cu_seqlens_of([3, 3], model.device)
    second = [
        packed_hidden_states(model, torch.tensor([*first, 4, 5, 6], device=model.device), positions, cu_seqlens)[3:]
        for first in ([1, 2, 3], [3, 1, 1])
    ]
    if not torch.allclose(*second, rtol=0, atol=0, equal_nan=True):
        raise InputError(
            f"{type(model).__name__}: its layers do not keep packed sequences apart (no exchangeable attention, or a "
            "recurrent state); choose another architecture"
        )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise for a model whose logits are not ``hidden @ lm_head.T`` or whose layers are not plain causal attention."""
    config, name = model.config.get_text_config(), type(model).__name__
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise InputError(f"{name}: its config sets {field}, which the loss does not apply yet; use another model")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{name}: expected an lm_head without bias")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise InputError(f"{name}: layers of kind {sorted(kinds)} cannot run packed yet; expected full attention")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name}: expected a decoder-only model")


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, num_heads, total_tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over ``varlen_attention``; [1, total_tokens, num_heads, head_dim]."""
    if cu_seqlens is None or query.shape[0] != 1:
        raise InputError(
            "packed attention needs one row of tokens and its cu_seqlens: call trsd.models.packed_hidden_states, "
            "or generate inside trsd.models.plain_attention(model)"
        )
    if attention_mask is not None:
        raise InputError("packed attention takes no attention_mask: cu_seqlens already separates the sequences")
    if softcap is not None or s_aux is not None:
        raise InputError("packed attention has neither score softcap nor sink logits: choose another architecture")
    if dropout:
        raise InputError(f"attention dropout {dropout} is not supported on packed rows: set attention_dropout to 0")
    if sliding_window is not None and int(cu_seqlens.diff().max()) > sliding_window:
        raise InputError(f"a sequence is longer than the sliding window {sliding_window}: lower max_length below it")
    output = varlen_attention(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)), cu_seqlens, softmax_scale=scaling
    )
    return output[None], None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` runs padded batches through SDPA (for ``generate``), in eval mode; then packed rows again."""
    was_training = model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        model.set_attn_implementation(PACKED_ATTENTION)


def packed_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,  # [total_tokens]
    position_ids: Tensor,  # [total_tokens]
    cu_seqlens: Tensor,  # int32 [num_seqs + 1]
) -> Tensor:
    """Final hidden states of a packed row, [total_tokens, hidden_size]: what ``lm_head`` would be given."""
    body = model.get_decoder()
    output = body(input_ids=input_ids[None], position_ids=position_ids[None], cu_seqlens=cu_seqlens, use_cache=False)
    return output.last_hidden_state[0]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the token-to-id table: two tokenizers with one fingerprint write the same ids for the same pieces."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model folder's config and weight files, by content."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors weights; convert them with save_pretrained first")
    for file in [folder / "config.json", *files]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
