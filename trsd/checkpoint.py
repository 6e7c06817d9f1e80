"""Checkpoints: ``checkpoint-<step>/`` is a plain Hugging Face model folder, with ``state/`` beside for resuming.

A save first copies all that training changes (weights and AdamW's moments, 12 bytes a parameter in fp32), to the CPU,
and that is all the loop waits for; a thread then writes the copies while training goes on. No pickle: safetensors and
json only. A model with an adapter is written merged, its adapter beside in ``adapter/``. How folders come and go:
``checkpoint_folders.py``; whether one is whole: ``manifest.py``.
"""

import copy
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from trsd.adapters import adapter_files, has_adapter, merged_state
from trsd.checkpoint_folders import TRAINER, keep_within, publish, temporary_folder
from trsd.checkpoint_shards import (
    SHARDS,
    empty_state,
    first_failure,
    gathered_weights,
    load_shards,
    save_shards,
    sharded_state,
)
from trsd.errors import InputError
from trsd.manifest import read_json_object
from trsd.optim import restore_state, state_tensors
from trsd.ranks import Ranks

STATE = "state"
OPTIMIZER = f"{STATE}/optimizer.safetensors"
RANDOM = f"{STATE}/random.safetensors"
MAX_TRAINER_BYTES = 64 * 2**20


class SaveError(OSError):
    """The last checkpoint of a run could not be written."""


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint as it was at one step, on the CPU, whatever training does meanwhile."""

    step: int
    weights: dict[str, Tensor]
    """The plain model's state dict, which ``save_pretrained`` of a shell names and divides into files."""
    tensors: dict[str, dict[str, Tensor]]
    """Further safetensors files by relative name."""
    contents: dict[str, bytes]
    """Other files by relative name."""
    shard_bytes: int = 0
    """Of what all ranks write beside."""

    @property
    def num_bytes(self) -> int:
        """What will be written, tied weights once."""
        every = [*self.weights.values(), *(t for tensors in self.tensors.values() for t in tensors.values())]
        whole = sum({t.data_ptr(): t.nbytes for t in every}.values()) + sum(map(len, self.contents.values()))
        return whole + self.shard_bytes


class Checkpointer:
    """Saves the checkpoints of one run, in one thread beside training."""

    def __init__(
        self,
        output_dir: Path,
        tokenizer: Any,
        *,
        save_total_limit: int | None = None,
        card: Callable[[int], str],
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare to save to ``output_dir``.

        Args:
            output_dir: of the run.
            tokenizer: goes into every checkpoint, as it is now.
            save_total_limit: the oldest checkpoints beyond so many are removed, but never the newest and the best.
            card: README.md of the checkpoint of a step.
            ranks: of the run; all of them save, and ``output_dir`` is one folder to them all.
        """
        self.ranks = ranks or Ranks()
        self._shards: Future[Any] | None = None
        self.output_dir, self.save_total_limit, self.card = output_dir, save_total_limit, card
        self._tokenizer_files = _files_of(tokenizer.save_pretrained)
        self._shell: PreTrainedModel | None = None
        self._thread: threading.Thread | None = None
        self._newest: Path | None = None
        self._failure: tuple[int, str] | None = None

    def save(
        self, step: int, *, model: PreTrainedModel, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]
    ) -> None:
        """Copy everything now and write it in the background; waits for an earlier save first.

        A save that fails is a warning, and the next one tries again; ``wait`` raises if the last one failed.

        Args:
            step: optimizer steps done.
            model: to be saved, with an adapter or without.
            optimizer: of ``model``.
            trainer: what else to resume with, as JSON; ``load_state`` returns it. Of those with a
                ``validation_loss`` the checkpoint of the least is kept and named in best.json.
        """
        self._join()
        try:
            self._shell = self._shell or shell_of(model)
            snapshot = take_snapshot(step, model=model, optimizer=optimizer, trainer=trainer, ranks=self.ranks)
            if self.ranks.size > 1:
                state = sharded_state(model, optimizer)
                snapshot = replace(snapshot, shard_bytes=sum(t.numel() * t.element_size() for t in state.values()))
                self._shards = self._begin_shards(step, state)
                if self._shards is None:
                    return
        except (MemoryError, RuntimeError) as error:  # copies that do not fit in memory must not end the training
            if self.ranks.size > 1:
                raise  # the other ranks wait for this one
            self._fail(step, error)
            return
        if not self.ranks.is_main:
            return
        card = {"README.md": self.card(step).encode()}
        snapshot = replace(snapshot, contents=snapshot.contents | self._tokenizer_files | card)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> Path | None:
        """Finish what is pending; returns the newest checkpoint of this object, None when it was given none.

        Raises:
            SaveError: the last save failed.
        """
        self._join()
        newest, failure = self.ranks.told((self._newest, self._failure))
        if failure is not None:
            step, error = failure
            saved = f"the newest is {newest.name}" if newest else "this process saved none"
            raise SaveError(
                f"checkpoint-{step} of {self.output_dir} was not saved ({error}) and is lost; {saved}. Mend the "
                "cause and go on with --resume_from_checkpoint latest"
            )
        return newest

    def _begin_shards(self, step: int, tensors: dict[str, Tensor]) -> Future[Any] | None:
        """What all ranks write; None where rank 0 cannot make the folder, which is a failed save."""
        problem = None
        if self.ranks.is_main:
            temporary = temporary_folder(self.output_dir, step)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                (temporary / SHARDS).mkdir(parents=True)
            except OSError as error:
                problem = error
                self._fail(step, error)
        process, problem = self.ranks.told((os.getpid(), problem))
        if problem is not None:
            return None
        return save_shards(temporary_folder(self.output_dir, step, process), tensors, self.ranks)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        elif self._shards is not None:
            wait([self._shards])  # what went wrong rank 0 learns too, and says
        self._shards = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            folder = write_checkpoint(self.output_dir, snapshot, self._shell, shards=self._shards)
        except (Exception, CheckpointException) as error:  # whatever it is, an hour of training is worth more
            self._fail(snapshot.step, first_failure(error))
            return
        self._newest, self._failure = folder, None
        try:
            keep_within(self.output_dir, self.save_total_limit, saved=folder)
        except OSError as error:
            print(
                f"warning: {folder.name} is saved, but old checkpoints could not be seen to: {error}", file=sys.stderr
            )

    def _fail(self, step: int, error: BaseException) -> None:
        self._failure = step, str(error)
        reason = f"{type(error).__name__}: {error}"
        print(f"warning: checkpoint-{step} was not saved ({reason}); the next save tries again", file=sys.stderr)


def shell_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model without content and without adapter that writes a state dict as ``model`` would write its own."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = type(model)(config)
    shell.to(torch.float32 if has_adapter(model) else model.dtype)
    if model.can_generate():
        shell.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(model, "_weight_conversions"):  # how transformers turned the names in the files into the model's
        shell._weight_conversions = model._weight_conversions
    return shell


def take_snapshot(
    step: int,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    ranks: Ranks | None = None,
) -> Snapshot:
    """Copy what a checkpoint of ``step`` needs of a model, its optimizer and the random state.

    Of several ``ranks`` the weights are gathered to rank 0, and the optimizer's state is left to ``save_shards``.
    """
    tensors, contents = {}, {}
    sharded = ranks is not None and ranks.size > 1
    whole = gathered_weights(model) if sharded else None
    if has_adapter(model) and (whole or not sharded):
        weights = merged_state(model, whole)  # all that it shares with the model is frozen
        adapter, contents = adapter_files(model, whole)
        tensors = {name: _copies(state) for name, state in adapter.items()}
    else:
        weights = _copies(model.state_dict()) if whole is None else whole
    if not sharded:
        tensors[OPTIMIZER] = _copies(state_tensors(model, optimizer))
    tensors[RANDOM] = random_state()
    contents[TRAINER.as_posix()] = (json.dumps({**trainer, "step": step}) + "\n").encode()
    return Snapshot(step, weights, tensors, contents)


def write_checkpoint(
    output_dir: Path, snapshot: Snapshot, shell: PreTrainedModel, shards: Future[Any] | None = None
) -> Path:
    """Write ``output_dir/checkpoint-<step>``, whole or not at all, and return it.

    ``shards``: what all ranks are writing to the same temporary folder.
    """
    temporary = temporary_folder(output_dir, snapshot.step)
    try:
        if shards is None:
            shutil.rmtree(temporary, ignore_errors=True)
        if (free := shutil.disk_usage(output_dir).free) < snapshot.num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"it takes {snapshot.num_bytes / 2**20:.0f} MiB and {output_dir} has {free / 2**20:.0f} MiB free: "
                "make room, or set save_total_limit",
            )
        write_snapshot(snapshot, temporary, shell)
        if shards is not None:
            shards.result()
        return publish(temporary, snapshot.step)
    finally:
        if shards is not None:  # all ranks write there until it is done, and no other exchange may begin before
            wait([shards])
        shutil.rmtree(temporary, ignore_errors=True)


def write_snapshot(snapshot: Snapshot, folder: Path, shell: PreTrainedModel) -> None:
    """Write the files of ``snapshot`` to ``folder``, without a manifest."""
    shell.save_pretrained(folder, state_dict=dict(snapshot.weights))
    for name, content in snapshot.contents.items():
        _parent_made(folder / name).write_bytes(content)
    for name, tensors in snapshot.tensors.items():
        save_file(tensors, _parent_made(folder / name), metadata={"format": "pt"})


def load_state(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore optimizer and random state from a checkpoint that ``verify`` found whole.

    Returns:
        The step it was written after, and the ``trainer`` it was saved with.

    Raises:
        InputError: a part of the state is missing, malformed, or that of another model.
    """
    trainer = read_json_object(folder / TRAINER, max_bytes=MAX_TRAINER_BYTES)
    step = trainer.pop("step", None)
    if type(step) is not int or folder.name != f"checkpoint-{step}":
        raise InputError(f"{folder / TRAINER}: expected the step that the folder's name says, got {step!r}")
    guard = trainer.get("guard")
    skipped = guard.get("num_skipped") if isinstance(guard, dict) else 0
    taken = step - skipped if type(skipped) is int else step  # before the first one AdamW has no state
    moments = _optimizer_state(folder, model, ranks or Ranks()) if taken > 0 else {}
    random = _tensors(folder / RANDOM)
    check_random_state(random, where=folder / RANDOM)
    restore_state(model, optimizer, moments)
    if taken > 0 and not moments:
        raise InputError(f"{folder / OPTIMIZER} holds no state after {taken} steps: the checkpoint cannot be resumed")
    restore_random_state(random)
    return step, trainer


def _optimizer_state(folder: Path, model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """As it was saved, by one rank or by several; sharded as ``model`` is."""
    if ranks.size == 1 and not (folder / SHARDS).is_dir():
        return _tensors(folder / OPTIMIZER)
    found = empty_state(model)
    load_shards(folder, found, ranks)
    return found


def random_state() -> dict[str, Tensor]:
    """torch's generators, CPU and CUDA, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def check_random_state(state: dict[str, Tensor], *, where: Path) -> None:
    """Raise InputError unless ``state`` can be restored; generators that no state is there for are said."""
    wanted = random_state()
    if "cpu" not in state:
        raise InputError(f"{where} holds no random state of the CPU: a resumed run would not be the one that stopped")
    for name in state.keys() & wanted.keys():
        got, like = state[name], wanted[name]
        if (got.dtype, got.shape) != (like.dtype, like.shape):
            raise InputError(
                f"{where}: {name}: expected {like.dtype} of shape {list(like.shape)}, got {got.dtype} of shape "
                f"{list(got.shape)}: no random state of this version of torch"
            )
    if lacking := sorted(wanted.keys() - state.keys()):
        print(f"warning: {where} has no random state of {', '.join(lacking)}: they keep their own", file=sys.stderr)


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:  # a machine with more GPUs than the one that saved has states of its own to keep
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file; those on the CPU are views of it."""
    if not path.is_file():
        raise InputError(f"{path} is missing: the checkpoint can be loaded as a model but not resumed")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file that can be read ({error})") from None


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, in memory of their own; what is one tensor under two names stays one."""
    made: dict[Any, Tensor] = {}
    for tensor in tensors.values():
        place = _place(tensor)
        if place not in made:
            made[place] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return {name: made[_place(tensor)] for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _files_of(save: Callable[[Path], Any]) -> dict[str, bytes]:
    """What ``save`` writes to a folder."""
    with TemporaryDirectory() as name:
        save(Path(name))
        found: Iterable[Path] = (path for path in Path(name).rglob("*") if path.is_file())
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in found}


def _parent_made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
