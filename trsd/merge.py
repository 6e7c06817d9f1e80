"""Average models: ``python -m trsd.merge --models runs/a/checkpoint-150,runs/b/checkpoint-150 --output merged``.

    theta = sum_i w_i theta_i,    sum_i w_i = 1                                                                (1)

Merge-of-Thought (arXiv 2509.08814) trains, in every round, one branch per teacher from the same start and goes on from
their mean. Weights are read tensor by tensor and summed in fp32 (fp64 for fp64), so memory is one shard of the output
and one tensor; config, tokenizer and the other files are the first model's. The output is whole or not there.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trsd.command import run_command
from trsd.errors import InputError
from trsd.files import share_like_folder
from trsd.models import load_tokenizer, model_folder, tokenizer_fingerprint

# What a config may differ in without being another model.
LOOSE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Average the weights of models that share an architecture and a tokenizer."""

    models: tuple[str, ...]
    """Model folders or hub names, two or more; the first also gives config and tokenizer."""
    output: Path
    """The model folder to write."""
    weights: tuple[float, ...] = ()
    """What each model counts; scaled to sum to 1. Left out: all the same."""


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
    if output.exists():
        raise InputError(f"{output} exists already: choose another --output, or move it away")
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with ExitStack() as stack:
            models = [Checkpoint(folder, stack) for folder in folders]
            _refuse_unlike(models)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            first = models[0]
            for file in first.files:
                tensors = {name: _mean(models, shares, name) for name in first.files[file].keys()}  # noqa: SIM118
                save_file(tensors, temporary / file, metadata={"format": "pt"})
            for path in first.folder.iterdir():
                if path.is_file() and path.suffix != ".safetensors":
                    shutil.copy2(path, temporary / path.name)
        _write_card(temporary / "README.md", folders, shares)
        share_like_folder(temporary)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if count < 2:
        raise InputError(f"models: expected two or more to average, got {count}")
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


def _write_card(path: Path, folders: Sequence[Path], shares: Sequence[float]) -> None:
    lines = [f"- {share:.4g} x {folder}" for folder, share in zip(folders, shares, strict=True)]
    path.write_text("\n".join(["The mean of the weights of", "", *lines, ""]), encoding="utf-8")


def run(args: MergeArguments) -> None:
    """Average, and say where."""
    merge([model_folder(name) for name in args.models], args.output, weights=args.weights)
    print(f"model   {args.output}")


def main(argv: list[str] | None = None) -> None:
    """Average models from the command line; input that cannot be used exits with code 2."""
    run_command(MergeArguments, run, prog="python -m trsd.merge", argv=argv)


if __name__ == "__main__":
    main()
