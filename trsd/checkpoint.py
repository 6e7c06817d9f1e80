"""Checkpoints: ``checkpoint-<step>/`` is a plain Hugging Face model folder, with ``state/`` beside for resuming.

A checkpoint is written to a temporary folder and renamed when complete, so a folder of that name is always whole.
No pickle: safetensors and json only. A model with an adapter is written merged, its adapter beside in ``adapter/``.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsd.adapters import has_adapter, save_adapted
from trsd.files import share_like_folder
from trsd.optim import restore_state, state_tensors

STATE = "state"


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    card: str,
) -> Path:
    """Write ``output_dir/checkpoint-<step>`` and return it."""
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if has_adapter(model):
            save_adapted(model, temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        state = temporary / STATE
        state.mkdir()
        save_file(optimizer_tensors(model, optimizer), state / "optimizer.safetensors")
        save_file(random_state(), state / "random.safetensors")
        (state / "trainer.json").write_text(json.dumps({"step": step}) + "\n")
        share_like_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_state(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore optimizer and random state from a checkpoint; returns the step it was written after."""
    if not (folder / STATE / "trainer.json").exists():
        raise FileNotFoundError(f"{folder} holds no training state: it can be loaded as a model but not resumed")
    restore_optimizer(model, optimizer, load_file(folder / STATE / "optimizer.safetensors"))
    restore_random_state(load_file(folder / STATE / "random.safetensors"))
    return int(json.loads((folder / STATE / "trainer.json").read_text())["step"])


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def sweep(output_dir: Path) -> None:
    """Remove the checkpoint folders that a crash left half written; nothing else that begins with a dot."""
    for leftover in output_dir.glob(".*"):
        if re.fullmatch(r"\.checkpoint-\d+\.\d+", leftover.name):
            shutil.rmtree(leftover)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<state>/<parameter name>`` tensors."""
    return state_tensors(model, optimizer)


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo ``optimizer_tensors``; raises when the names or shapes are not this model's."""
    restore_state(model, optimizer, tensors)


def random_state() -> dict[str, Tensor]:
    """torch's generators, CPU and CUDA, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:  # a machine with more GPUs than the one that saved has states of its own to keep
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)
