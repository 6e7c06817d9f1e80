"""Weights of several models averaged, or an adapter put into the model it was trained on: the work of ``trsd.merge``.

    theta = sum_i w_i theta_i,    sum_i w_i = 1                                                                (1)
    W' = W + s B A,               s = alpha / rank (alpha / sqrt(rank) with use_rslora)                        (2)

Merge-of-Thought (arXiv 2509.08814) trains, in every round, one branch per teacher from the same start and goes on from
their mean. Weights are read tensor by tensor. (1) is summed in fp32 (fp64 for fp64) and kept as the first model's; (2)
is kept in fp32, for a half precision would lose an adapter's small steps. Memory is one shard of the output and one
tensor; config, tokenizer and the other files are the first or base model's. The output is whole or not there.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trsd.adapters import ADAPTER, CONFIG, PEFT_PREFIX, WEIGHTS
from trsd.errors import InputError
from trsd.files import share_like_folder, write_json
from trsd.merge import MergeArguments
from trsd.model_card import CARD, SERVED_BY, base_of, front_matter, name_of_folder, serving_facts
from trsd.models import load_tokenizer, model_folder, tokenizer_fingerprint
from trsd.row_shards import MANIFEST

# What a config may differ in without being another model.
LOOSE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
# Files of weights, which would be those of another model than the one beside them.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
INDEX = "model.safetensors.index.json"
# Fields of an adapter's config under which (2) is not the whole of it.
BEYOND_LORA = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")


class Checkpoint:
    """One model folder's tensors, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise InputError(f"{folder} holds no safetensors weights; convert them with save_pretrained first")
        self.files = {}
        for path in paths:
            try:
                self.files[path.name] = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise InputError(f"{path} cannot be read: {error}") from error
        self.file_of = {name: file for file, opened in self.files.items() for name in opened.keys()}  # noqa: SIM118

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it."""
        return self.files[self.file_of[name]].get_slice(name).get_shape()

    def tensor(self, name: str) -> Tensor:
        """A tensor."""
        return self.files[self.file_of[name]].get_tensor(name)

    def config(self) -> dict[str, Any]:
        """The config, without what does not matter."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self.folder / 'config.json'} is not JSON ({error})") from None
        return {key: value for key, value in config.items() if key not in LOOSE_FIELDS}


def merge(folders: Sequence[Path], output: Path, *, weights: Sequence[float] = ()) -> None:
    """Write (1) of the models in ``folders`` to ``output``.

    Args:
        folders: two or more model folders of one architecture and tokenizer.
        output: the folder to write; it must not exist.
        weights: w_i, positive or zero, scaled to sum to 1; empty: all the same.

    Raises:
        InputError: models that are not alike, by what differs first, or weights that make no mean.
    """
    shares = _shares(weights, len(folders))
    with _new_folder(output) as temporary, ExitStack() as stack:
        models = [Checkpoint(folder, stack) for folder in folders]
        _refuse_unlike(models)
        _write_model(models[0], temporary, lambda name: _mean(models, shares, name))
        names = [base_of(str(folder)).shown for folder in folders]
        lines = [f"- {share:.4g} x {name}" for name, share in zip(names, shares, strict=True)]
        facts = _common_facts([serving_facts(folder) for folder in folders])
        _write_card(temporary, ["The mean of the weights of", "", *lines], facts)


def merge_adapter(adapter: Path, base: Path, output: Path) -> None:
    """Write (2) of the adapter in ``adapter`` and the model in ``base`` to ``output``, in fp32.

    Args:
        adapter: a folder in peft's format, or one that holds such a folder as ``adapter``.
        base: the model folder that it was trained on.
        output: the folder to write; it must not exist.

    Raises:
        InputError: an adapter that is no plain LoRA in safetensors, or is another model's, by what does not fit.
    """
    folder = adapter if (adapter / CONFIG).exists() or not (adapter / ADAPTER).is_dir() else adapter / ADAPTER
    scale_of = _scaling(folder)
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin is a pickle, which could run any code" if pickled else f"it holds no {WEIGHTS}"
        raise InputError(f"{folder}: {why}; save the adapter with peft's save_pretrained, which writes safetensors")
    with _new_folder(output) as temporary, ExitStack() as stack:
        thin, model = Checkpoint(folder, stack), Checkpoint(base, stack)
        pairs = _adapter_pairs(thin, model)

        def merged(name: str) -> Tensor:
            tensor = model.tensor(name)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if name not in pairs:
                return tensor
            down, up = (thin.tensor(key).float() for key in pairs[name])
            return tensor + (up @ down) * scale_of(down.shape[0])

        _write_model(model, temporary, merged)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        write_json(temporary / "config.json", config | {"dtype": "float32"})
        name = f"{name_of_folder(folder.parent)}/{ADAPTER}" if folder.name == ADAPTER else name_of_folder(folder)
        lines = [base_of(str(base)).shown, "", f"with the adapter {name} merged into {len(pairs)} of its matrices"]
        _write_card(temporary, lines, serving_facts(folder.parent))


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``output`` once it is complete."""
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output, or move it away")
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        share_like_folder(temporary)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(like: Checkpoint, folder: Path, tensor_of: Callable[[str], Tensor]) -> None:
    """Write what ``tensor_of`` says of every name to ``folder``, in the shards and beside the files of ``like``."""
    for path in like.folder.iterdir():
        # A manifest is of the files that it was written beside.
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name != MANIFEST:
            shutil.copy2(path, folder / path.name)
    size = 0
    for file, opened in like.files.items():
        tensors = {name: tensor_of(name) for name in opened.keys()}  # noqa: SIM118
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        write_json(folder / INDEX, index | {"metadata": index.get("metadata", {}) | {"total_size": size}})


def _scaling(folder: Path) -> Callable[[int], float]:
    """s of (2) by the rank, as the adapter's config says; refuses what (2) does not say."""
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"{folder} holds no {CONFIG}: expected an adapter in peft's format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        alpha, kind = float(config["lora_alpha"]), config.get("peft_type", "LORA")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no LoRA adapter's config ({error!r})") from None
    beyond = [name for name in BEYOND_LORA if config.get(name)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if kind != "LORA" or beyond:
        what = f"sets {', '.join(beyond)}" if beyond else f"is of type {kind}"
        raise InputError(f"{path} {what}: expected plain LoRA; merge it with peft's merge_and_unload")
    return (lambda rank: alpha / math.sqrt(rank)) if config.get("use_rslora") else (lambda rank: alpha / rank)


def _adapter_pairs(adapter: Checkpoint, model: Checkpoint) -> dict[str, tuple[str, str]]:
    """Name of a matrix of the model -> names of its A and B; refuses an adapter of another model."""
    found: dict[str, dict[str, str]] = {}
    for key in adapter.file_of:
        path, inside, which = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        if not inside or which not in ("A.weight", "B.weight"):
            raise InputError(f"{adapter.folder}: {key} is no matrix of a plain LoRA: merge it with peft")
        found.setdefault(f"{path}.weight", {})[which[0]] = key
    if not found:
        raise InputError(f"{adapter.folder}: the adapter holds no matrices")
    pairs = {}
    for name, keys in sorted(found.items()):
        if name not in model.file_of:
            raise InputError(f"{adapter.folder} is the adapter of another model: {model.folder} holds no {name}")
        if len(keys) != 2:
            raise InputError(f"{adapter.folder}: only one of A and B is there for {name}")
        pairs[name] = keys["A"], keys["B"]
        down, up = (adapter.shape(key) for key in pairs[name])
        shape = model.shape(name)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or [up[0], down[1]] != shape:
            raise InputError(
                f"{adapter.folder} is the adapter of another model: {name} is {shape} in {model.folder}, "
                f"and B A of {up} and {down}"
            )
    return pairs


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if count < 2:
        raise InputError(f"models: expected two or more to average, or --adapter and --model, got {count}")
    if not weights:
        return [1 / count] * count
    if len(weights) != count:
        raise InputError(f"weights: expected one per model, got {len(weights)} for {count} models")
    total = sum(weights)
    if not all(0 <= weight < float("inf") for weight in weights) or not 0 < total < float("inf"):
        raise InputError(f"weights: expected numbers of 0 or more that do not sum to 0, got {list(weights)}")
    return [weight / total for weight in weights]


def _refuse_unlike(models: Sequence[Checkpoint]) -> None:
    first = models[0]
    tokenizer = tokenizer_fingerprint(load_tokenizer(first.folder))
    for other in models[1:]:
        pair = f"{other.folder} and {first.folder}"
        ours, theirs = first.config(), other.config()
        unlike = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if unlike:
            key = unlike[0]
            raise InputError(f"{pair} differ in their config: {key} is {theirs.get(key)!r} and {ours.get(key)!r}")
        if lone := sorted(first.file_of.keys() ^ other.file_of.keys()):
            raise InputError(f"{pair}: only one of them holds {lone[0]} ({len(lone)} tensors in all)")
        for name in first.file_of:
            if first.shape(name) != other.shape(name):
                raise InputError(f"{pair}: {name} has shape {other.shape(name)} and {first.shape(name)}")
        if tokenizer_fingerprint(load_tokenizer(other.folder)) != tokenizer:
            raise InputError(f"{pair} have different tokenizers: their embeddings are of different tokens")


def _mean(models: Sequence[Checkpoint], shares: Sequence[float], name: str) -> Tensor:
    tensors = (model.tensor(name) for model in models)
    first = next(tensors)
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in tensors):
            raise InputError(f"{name} holds whole numbers that differ between the models: it has no mean")
        return first
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(wide) * shares[0]
    for tensor, share in zip(tensors, shares[1:], strict=True):
        total.add_(tensor.to(wide), alpha=share)
    return total.to(first.dtype)


def _common_facts(facts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the cards of several models say alike; None, which is said, where a mean could be served in no one way."""
    known = [each for each in facts if each is not None]
    unlike = [name for name in SERVED_BY if len({each[name] for each in known}) > 1]
    if len(known) < len(facts) or unlike:
        if known:
            why = f"differ in {', '.join(unlike)}" if unlike else "do not all have a card that says so"
            print(f"note: the models {why}, so the mean's card says nothing of closer, tags and limits")
        return None
    budgets = [each for each in known[0]["budgets"] if all(each in other["budgets"] for other in known)]
    methods = " + ".join(dict.fromkeys(each["method"] for each in known))
    return known[0] | {"budgets": budgets, "method": methods}


def _write_card(folder: Path, lines: Sequence[str], facts: dict[str, Any] | None) -> None:
    """What was merged, under what its checkpoint says of serving."""
    front = [front_matter({"library_name": "transformers", "trsd": facts})] if facts else []
    (folder / CARD).write_text("\n".join([*front, *lines, ""]), encoding="utf-8")


def run(args: MergeArguments) -> None:
    """Average or merge, and say where."""
    if args.adapter is None and args.model is None:
        merge([model_folder(name) for name in args.models], args.output, weights=args.weights)
    elif args.adapter is None or args.model is None:
        missing, given = ("adapter", "model") if args.adapter is None else ("model", "adapter")
        raise InputError(f"{missing}: expected beside --{given}: --adapter FOLDER --model BASE --output FOLDER")
    elif args.models or args.weights:
        raise InputError("models, weights: these average models, and --adapter merges one: leave out one or the other")
    else:
        merge_adapter(args.adapter, model_folder(args.model), args.output)
    print(f"model   {args.output}")
