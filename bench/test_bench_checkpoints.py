"""Checkpoints: written and resumed from as the trainer does, beside torch.save and torch.load of the same tensors.

A save of ours is timed until the disk has it: copies, files, their sha256, fsync and rename; torch.save leaves its file
in the page cache. Reads come from there. Resuming makes the model, too, and checks it.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.lines import TransferLine
from bench.trained_model import BUNDLED, TrainedModel, trained_model
from bench.transfers import Transfer, fields_in_turn, num_bytes, owned, refuse_unlike, remove
from trsd.models import quieten_transformers

SUITE = ("checkpoints", "checkpoints: fp32 weights and AdamW's state, written and resumed from")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Of Qwen3-0.6B a few layers: all of them are 7 GB, which plain torch takes many seconds to write.
MODEL, NUM_LAYERS = ("Qwen3-0.6B", 4) if ON_GPU else (BUNDLED, None)
NAME = MODEL if NUM_LAYERS is None else f"{MODEL}, {NUM_LAYERS} of its layers"


@pytest.fixture(scope="module")
def trained(one_thread: None) -> TrainedModel:
    """The model, once."""
    quieten_transformers()
    return trained_model(MODEL, device=DEVICE, num_layers=NUM_LAYERS)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def line_of(group: str, contender: str, trained: TrainedModel) -> Callable[..., TransferLine]:
    return partial(TransferLine, group=group, contender=contender, moved_bytes=num_bytes(trained.tensors.values()))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return owned(torch.load(path, map_location=DEVICE, weights_only=True))


def test_save(trained, folder, benchmark, record):
    benchmark.group = NAME + ", written; the reference is torch.save"
    ours, theirs = folder / "checkpoint-1", folder / "plain.pt"

    def measure() -> list[dict[str, object]]:
        save = Transfer(
            lambda: trained.save(folder),
            check=lambda path: refuse_unlike(trained.resume(path), trained.tensors),
            undo=partial(remove, ours),
        )
        plain = Transfer(
            lambda: torch.save(trained.tensors, theirs),
            check=lambda _: refuse_unlike(loaded(theirs), trained.tensors),
            undo=partial(remove, theirs),
        )
        return [fields_in_turn(benchmark, save, plain)]

    record([line_of(benchmark.group, "save_checkpoint", trained)], measure)


def test_resume(trained, folder, benchmark, record):
    benchmark.group = NAME + ", resumed from; the reference is torch.load"

    def measure() -> list[dict[str, object]]:
        checkpoint, path = trained.save(folder), folder / "plain.pt"
        torch.save(trained.tensors, path)
        check = partial(refuse_unlike, wanted=trained.tensors)
        resume = Transfer(lambda: trained.resume(checkpoint), check=check)
        plain = Transfer(lambda: loaded(path), check=check)
        return [fields_in_turn(benchmark, resume, plain)]

    record([line_of(benchmark.group, "load_model and load_state", trained)], measure)
