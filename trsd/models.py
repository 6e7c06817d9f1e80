"""Loading Hugging Face causal language models and running them on packed rows.

A packed row goes through the model's body with explicit ``position_ids`` and its layout; the registered attention
refuses a call without one, so sequences can never silently see each other. Only the body runs: logits are the kernels'
business.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from trsd.checkpoint_folders import checkpoints
from trsd.errors import InputError
from trsd.memory import refuse_too_large
from trsd.paths import resolve_bundled
from trsd_kernels import AttentionRequest, PackedLayout, choose_backend, packed_layout, varlen_attention

PACKED_ATTENTION = "trsd_varlen"
# What is fetched from the hub; README.md is the card, which says how a model of ours was trained to be asked.
FETCHED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt", "*.py", "README.md")


def model_folder(name_or_path: str) -> Path:
    """The local folder of a model: bundled, on disk, or a hub snapshot that is downloaded once."""
    path = Path(resolve_bundled(name_or_path))
    if path.is_dir():
        if not (path / "config.json").exists():
            last = checkpoints(path)[-1:]
            hint = f"its last checkpoint is {last[0]}" if last else "expected a Hugging Face model folder"
            raise FileNotFoundError(f"{path} is a folder without config.json: {hint}")
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(
            f"no model folder at {name_or_path}: check the path, or give a hub name like owner/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(FETCHED)))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name_or_path} is no local model folder and could not be fetched from the hub ({reason}); where there is "
            "no network, give the folder of a model that was downloaded elsewhere"
        ) from error


def quieten_transformers() -> None:
    """Errors only, and no bars: what a command has to say it says itself."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's config; refuses models that do not continue text."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise InputError(f"the config of {folder} cannot be read: {reason}") from error
    refuse_other_kinds(config, folder)
    return config


# What encoders, classifiers and reward models are called in a config.
OTHER_HEADS = ("MaskedLM", "PreTraining", "Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")


def refuse_other_kinds(config: Any, folder: Path | str) -> None:
    """Raise InputError for a model that does not continue text from left to right, before its weights are read."""
    named = [str(name) for name in getattr(config, "architectures", None) or []]
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder and a decoder"
    elif named and all(name.endswith(OTHER_HEADS) for name in named):
        kind = f"a model of kind {named[0]}, which does not write text"
    elif not own and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = f"a model of kind {config.model_type}, which transformers cannot let write text"
    else:
        return
    raise InputError(
        f"{folder} holds {kind}: expected a decoder-only language model that continues text, such as Qwen3 or Llama"
    )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, with a pad token (EOS when it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    if not tokenizer("A question?", add_special_tokens=False).input_ids:  # transformers makes one of nothing
        raise InputError(
            f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the model there"
        )
    ending = turn_end(tokenizer)
    if ending is not None and ending != tokenizer.eos_token:
        # Base models often name another EOS than the chat template writes, and would never be seen to stop.
        print(
            f"note: the chat template of {folder} ends turns with {ending}, its tokenizer with {tokenizer.eos_token}: "
            f"answers end with {ending}",
            file=sys.stderr,
        )
        tokenizer.eos_token = ending
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {folder} names no EOS token: answers could never end; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turn_end(tokenizer: Any) -> str | None:
    """The special token that the chat template ends an assistant's turn with; None without one."""
    if tokenizer.chat_template is None:
        return None
    said = "What I answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates raise what they like, for instance when they want a system message
        return None
    ids = tokenizer(text.rpartition(said)[2].strip(), add_special_tokens=False).input_ids if said in text else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return tokenizer.convert_ids_to_tokens(ids[0]) if ids and ids[0] in special else None


def load_model(folder: Path, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The folder's causal language model, ready for packed rows; refuses what the loss or packing would get wrong."""
    load_config(folder, trust_remote_code=trust_remote_code)
    refuse_too_large(folder, dtype=dtype, device=device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",  # which every architecture has; packed rows never run it
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
    check_logits(model)
    return model


def load_for_decoding(folder: Path) -> PreTrainedModel:
    """A model that is only asked to write: on a GPU in bf16 if there is one, else on the CPU in fp32."""
    cuda = torch.cuda.is_available()
    return load_model(folder, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu")


def decoder_layers(model: PreTrainedModel, setting: str) -> list[nn.Module]:
    """The layers of the body, in order. Raises InputError where it has no list of them, which ``setting`` needs."""
    lists = (child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList))
    layers = [layer for layers in lists for layer in layers]
    if not layers:
        raise InputError(f"{setting}: {type(model).__name__} has no list of layers: leave it out")
    return layers


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise for a model that lets packed sequences see each other, whatever it calls its attention."""
    layout, backend = _probe(model)
    rows = {
        "as it is": [1, 2, 3, 4, 5, 6, 1, 2, 3, 4],
        "another sequence": [3, 1, 1, 4, 5, 6, 1, 2, 3, 4],
        "the trunk after the cut": [1, 2, 3, 4, 5, 1, 6, 2, 3, 4],
        "the trunk before the cut": [1, 2, 3, 4, 6, 6, 1, 2, 3, 4],
    }
    ids = torch.tensor(list(rows.values()), device=model.device)
    try:
        states = [packed_hidden_states(model, row, layout, backend=backend)[7:].double() for row in ids]
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        name = type(model).__name__
        raise InputError(f"{name} cannot run packed rows, choose another architecture: {error}") from error
    if not all(state.isfinite().all() for state in states):
        return  # broken weights say nothing about the layers; training stops at its first loss and says so
    _, *hidden, seen = [float((state - states[0]).norm()) for state in states]
    # Experts see batches of other sizes, which rounds otherwise; what leaks moves a state by much more.
    rounding = min(100 * torch.finfo(model.dtype).eps, 0.01) * float(states[0].norm())
    if max(hidden) > rounding or seen <= max(hidden):
        raise InputError(
            f"{type(model).__name__}: its layers do not keep packed sequences apart (no exchangeable attention, or a "
            "recurrent state); choose another architecture"
        )


def _probe(model: PreTrainedModel) -> tuple[PackedLayout, str]:
    """A small row with a branch, and the back end it can run on."""
    backend = packed_attention_backend(model.config, "auto", device=model.device, dtype=model.dtype, branches=True)
    return packed_layout([3, 4], [[], [(2, 3)]], device=model.device), backend


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raise for a model whose logits are not what ``logit_options`` makes of its hidden states."""
    layout, backend = _probe(model)
    ids = torch.arange(1, layout.num_tokens + 1, device=model.device)
    row = dict(position_ids=layout.position_ids[None], packed_layout=layout, attention_backend=backend)
    theirs = model(input_ids=ids[None], use_cache=False, **row).logits[0]
    refuse_other_logits(model, packed_hidden_states(model, ids, layout, backend=backend), theirs)


def refuse_other_logits(model: PreTrainedModel, hidden_states: Tensor, logits: Tensor) -> None:
    """Raise unless ``logits`` are what ``logit_options`` makes of ``hidden_states``, both of ``model``."""
    theirs, head = logits.double(), model.get_output_embeddings()
    ours = torch.nn.functional.linear(hidden_states, head.weight, getattr(head, "bias", None)).double()
    options = logit_options(model.config, "model")
    ours = ours * options.get("model_logit_scale", 1.0)
    if cap := options.get("model_logit_softcap"):
        ours = cap * torch.tanh(ours / cap)
    rounding = min(1000 * torch.finfo(model.dtype).eps, 0.05) * theirs.norm()
    if theirs.isfinite().all() and not (ours - theirs).norm() <= rounding:
        raise InputError(
            f"{type(model).__name__}: its logits are not its hidden states times the lm_head, scaled and capped as its "
            "config says; the loss would be another model's"
        )


# Fields of a config under which tokens are dropped once an expert is full: whose fate then hangs on the others.
CAPACITY_FIELDS = ("expert_capacity", "moe_expert_capacity", "capacity_factor", "moe_token_dropping")


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise for a model that the loss or packed rows would get wrong, with the reason."""
    config, name = model.config.get_text_config(), type(model).__name__
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{name}: expected an lm_head without bias, which the loss takes: choose another architecture")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name}: expected a decoder-only model")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InputError(
            f"{name}: layers of kind {sorted(kinds)} cannot run packed: a recurrent state or a chunk runs on across "
            "sequences and cannot fork at a cut; expected full or sliding attention"
        )
    dropping = [field for field in CAPACITY_FIELDS if getattr(config, field, None)]
    if dropping:
        raise InputError(
            f"{name}: its config sets {', '.join(dropping)}: experts that drop tokens when they are full make a "
            "sequence depend on what it is packed with"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError(f"{name}: its config sets use_bidirectional_attention; expected causal attention")


def logit_options(config: Any, who: str) -> dict[str, float]:
    """What a model does to its logits, as the loss's options of ``who`` ("student" or "teacher")."""
    config = config.get_text_config()
    found = {}
    if cap := getattr(config, "final_logit_softcapping", None):
        found[f"{who}_logit_softcap"] = cap
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return found if scale == 1.0 else found | {f"{who}_logit_scale": scale}


def refuse_attention_dropout(config: Any) -> None:
    """Raise InputError for a student whose attention drops some of its weights in training."""
    config = config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if value := getattr(config, name, None):
            raise InputError(
                f"packed rows have no attention dropout, and the student's config.json says {name} {value}: set it to "
                "0 there"
            )


def packed_attention_backend(
    config: Any,
    wanted: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    branches: bool,
    max_length: int | None = None,
) -> str:
    """The back end of ``trsd_kernels.varlen_attention`` for a model's rows, as ``wanted`` or the best for "auto".

    Args:
        config: of the model.
        wanted: a back end's name, or "auto".
        device, dtype: of the queries.
        branches: whether rows have any.
        max_length: tokens of the longest sequence, where known: a sliding window it does not reach is none.

    Raises:
        InputError: the back end that is wanted cannot serve the model here, with the reason.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if (kinds is not None and "sliding_attention" not in kinds) or (max_length is not None and max_length <= window):
        window = 0
    request = AttentionRequest(
        device=torch.device(device),
        dtype=dtype,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        has_branches=branches,
        window=window,
        softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
    )
    try:
        return choose_backend(request, wanted)
    except ValueError as error:
        raise InputError(f"attn_implementation: {error}") from error


@torch.compiler.disable
def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    attention_backend: str = "auto",
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over ``varlen_attention``; [1, num_tokens, num_heads, head_dim].

    Never compiled with what is around it: ``compiled_layers.py`` tells why.
    """
    if packed_layout is None or query.shape[0] != 1:
        raise InputError(
            "packed attention needs one row of tokens and its layout: call trsd.models.packed_hidden_states, "
            'or generate inside trsd.models.with_attention(model, "sdpa")'
        )
    if attention_mask is not None:
        raise InputError("packed attention takes no attention_mask: the layout already separates the sequences")
    if s_aux is not None:
        raise InputError("packed attention has no sink logits: choose another architecture")
    if dropout:
        raise InputError(f"attention dropout {dropout} is not supported on packed rows: set attention_dropout to 0")
    if not getattr(module, "is_causal", True):
        raise InputError(f"{type(module).__name__} is not causal: choose another architecture")
    # A window that no sequence reaches is none, and keeps the back ends that have none.
    windowed = sliding_window is not None and packed_layout.max_position >= sliding_window
    output = varlen_attention(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        layout=packed_layout,
        softmax_scale=scaling,
        window_size=(sliding_window - 1, 0) if windowed else (-1, -1),
        softcap=softcap or 0.0,
        backend=attention_backend,
    )
    return output[None], None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


@contextmanager
def with_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Inside, ``model`` runs by another attention ("sdpa" for ``generate``), in eval mode; then packed rows again."""
    was_training = model.training
    model.set_attn_implementation(implementation)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        model.set_attn_implementation(PACKED_ATTENTION)


def packed_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,  # [num_tokens]
    layout: PackedLayout,
    *,
    backend: str = "auto",
) -> Tensor:
    """Final hidden states of a packed row, [num_tokens, hidden_size]: what ``lm_head`` would be given.

    Args:
        model: one that ``load_model`` made, or whose attention implementation is ``PACKED_ATTENTION``.
        input_ids: [num_tokens] int64, trunks and branches in the order of ``layout``.
        layout: of the row, on the model's device.
        backend: of ``trsd_kernels.varlen_attention``.

    Raises:
        InputError: a model or row that cannot be run packed, with the reason.
        ValueError: a layout that does not fit, or a back end that cannot serve the model.
    """
    _refuse_mixed_rotary_factors(model.config.get_text_config(), layout)
    output = model.get_decoder()(
        input_ids=input_ids[None],
        position_ids=layout.position_ids[None],
        packed_layout=layout,
        attention_backend=backend,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def _refuse_mixed_rotary_factors(config: Any, layout: PackedLayout) -> None:
    """Some rotary embeddings change with the length of what is run, so a long sequence would change the short ones."""
    found = getattr(config, "rope_parameters", None) or {}
    lengths = (layout.lengths + layout.cuts)[layout.lengths > 0]
    longest, shortest = layout.max_position + 1, int(lengths.min()) if len(lengths) else 0
    for parameters in (found, *(part for part in found.values() if isinstance(part, dict))):  # one for all, or by layer
        kind = parameters.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > limit and (kind == "dynamic" or shortest <= limit):
            raise InputError(
                f"{kind} rotary embeddings change beyond {limit} tokens, and a packed row holds sequences of "
                f"{shortest} to {longest}: lower max_length to {limit}, so that all are rotated as they are alone"
            )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the token-to-id table: two tokenizers with one fingerprint write the same ids for the same pieces."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_same_tokenizer(one: Any, other: Any, *, student: Path, teacher: Path) -> None:
    """Raise InputError, naming the first token that differs, unless both write the same ids for the same pieces."""
    if tokenizer_fingerprint(one) == tokenizer_fingerprint(other):
        return
    mine, theirs = ({i: piece for piece, i in tokenizer.get_vocab().items()} for tokenizer in (one, other))
    first = min(i for i in mine.keys() | theirs.keys() if mine.get(i) != theirs.get(i))
    said = [
        f"{name} says {pieces[first]!r}" if first in pieces else f"{name} has none"
        for name, pieces in (("the student", mine), ("the teacher", theirs))
    ]
    raise InputError(
        f"teacher {teacher} and student {student} have different tokenizers, first at token {first}: "
        f"{', '.join(said)}. Their distributions are over different tokens; choose models of one family, or let the "
        "teacher write traces (python -m trsd.generate) and learn their text with method sft and no teacher"
    )


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
