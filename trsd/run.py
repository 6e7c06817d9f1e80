"""A run's folder: made once, never overwritten, resumed only under the recipe it was started with."""

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from trsd.checkpoint_folders import checkpoints, newest_whole, step_of, sweep
from trsd.errors import InputError
from trsd.files import exclusively, write_json, write_text
from trsd.manifest import verify
from trsd.recipe import Recipe
from trsd.recipe_file import recipe_as_yaml
from trsd.row_shards import building_folder, lock_file

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
NOT_YET_BEGUN = {RECIPE_FILE, ENVIRONMENT_FILE}  # all that a run leaves whose input was refused
TEACHER = Path("teacher")
PREPARED = {"traces", TEACHER.name, building_folder(TEACHER).name, lock_file(TEACHER).name}  # what trsd.cache makes
FREE_TO_CHANGE = {
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "teacher_cache_dir",
    "generation_batch_size",
    "timeout_seconds",
    "shard_group_size",
    "cpu_offload",
    "vocab_parallel",
    # What a step computes with, and by no more than its rounding what it computes.
    "gradient_checkpointing",
    "gradient_checkpointing_policy",
    "torch_compile",
    "loss_chunk_bytes",
}
LATER = {  # what neither traces nor teacher targets depend on: free between trsd.cache and trsd.train
    "eval_data",
    "max_eval_samples",
    "validation_samples",
    "eval_budgets",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "max_skipped_steps",
    "num_train_epochs",
    "max_steps",
    "train_batch_size",
}


def with_output_dir(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` with the folder of its run, which is named after the time where it was left out."""
    return replace(recipe, output_dir=recipe.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the one process that works in the run folder ``folder``; InputError when another does."""
    folder = Path(os.path.abspath(folder))  # "." has a name, too
    if not folder.name:
        raise InputError(f"output_dir {folder}: expected a folder of its own for the run")
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusively(
            folder.with_name(f".{folder.name}.run.lock"),
            f"another process works in output_dir {folder}: choose another one, or wait until it has ended",
        ):
            yield
    finally:
        for parent in new:  # those in which nothing was kept
            with suppress(OSError):
                parent.rmdir()


def open_run(recipe: Recipe) -> tuple[Recipe, Path, Path | None]:
    """Make or reopen the run folder of ``recipe``, which names it; one that was only prepared is gone on with.

    Returns:
        The recipe with its ``output_dir``, the folder, and the checkpoint to resume from (None: from the beginning).

    Raises:
        InputError: the folder holds another run, or what is to be resumed does not exist or was another recipe's.
    """
    folder = Path(recipe.output_dir)
    if recipe.resume_from_checkpoint and not _is_new(recipe, folder):
        return recipe, folder, _checkpoint_to_resume(recipe, folder)
    if recipe.resume_from_checkpoint:
        print(f"note: {folder} holds no run to resume: one begins there", file=sys.stderr)
    begun = {path.name for path in folder.iterdir()} - NOT_YET_BEGUN if folder.exists() else set()
    if begun and not (folder / RECIPE_FILE).exists():
        raise InputError(
            f"output_dir {folder} already holds other files, such as {min(begun)}: choose another one, which need not "
            "exist yet"
        )
    if begun - PREPARED:
        raise InputError(
            f"output_dir {folder} already holds a run: choose another one, or go on with it by "
            "--resume_from_checkpoint latest"
        )
    if begun and (changed := _changed(recipe, folder, free=FREE_TO_CHANGE | LATER)):
        raise InputError(
            f"output_dir {folder} was prepared under another recipe ({changed}): choose another one; targets can be "
            "shared by --teacher_cache_dir, traces by --data of their file"
        )
    try:
        write_text(folder / RECIPE_FILE, recipe_as_yaml(recipe))
        write_json(folder / ENVIRONMENT_FILE, environment())
    except OSError:
        discard_unbegun(folder)
        raise
    return recipe, folder, None


def _is_new(recipe: Recipe, folder: Path) -> bool:
    """Whether ``latest`` is asked for where no run began: so one command can begin a run and go on with it."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return recipe.resume_from_checkpoint == "latest" and not found - NOT_YET_BEGUN - PREPARED


def discard_unbegun(folder: Path, files: Collection[str] = NOT_YET_BEGUN) -> None:
    """Remove the folder of a run whose input was refused before anything was made: there are ``files`` alone."""
    if folder.exists() and not {path.name for path in folder.iterdir()} - set(files):
        shutil.rmtree(folder)


def _checkpoint_to_resume(recipe: Recipe, folder: Path) -> Path | None:
    if not (folder / RECIPE_FILE).exists():
        raise InputError(f"output_dir {folder} holds no run to resume")
    if changed := _changed(recipe, folder):
        raise InputError(f"cannot resume {folder} with another recipe ({changed}): start a new output_dir")
    sweep(folder)
    if recipe.resume_from_checkpoint == "latest":
        found = newest_whole(folder)
        if found is None:
            print(f"note: {folder} has no checkpoint to resume: it begins at step 1", file=sys.stderr)
        return found
    wanted = Path(recipe.resume_from_checkpoint)
    wanted = wanted if wanted.exists() else folder / wanted.name
    if not re.fullmatch(r"checkpoint-\d+", wanted.name) or wanted.resolve().parent != folder.resolve():
        raise InputError(f"resume_from_checkpoint: {recipe.resume_from_checkpoint} is no checkpoint of {folder}")
    if not wanted.exists():
        raise InputError(f"no checkpoint at {wanted}; {folder} has {[path.name for path in checkpoints(folder)]}")
    try:
        verify(wanted)
    except InputError as error:
        raise InputError(f"{wanted.name} cannot be resumed: {error}. Try --resume_from_checkpoint latest") from None
    if later := [path.name for path in checkpoints(folder) if step_of(path) > step_of(wanted)]:
        raise InputError(
            f"{', '.join(later)} of {folder} {'comes' if len(later) == 1 else 'come'} after {wanted.name}, and "
            "--resume_from_checkpoint latest would go on from there: move what is later out of that folder first"
        )
    return wanted


def _changed(recipe: Recipe, folder: Path, free: set[str] = FREE_TO_CHANGE) -> str:
    """How ``recipe`` differs from the one in ``folder``, in what a run may not change; empty when it does not."""
    # A field that is younger than the run was at its default then.
    stored = yaml.safe_load(recipe_as_yaml(Recipe()))
    stored |= yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    now = yaml.safe_load(recipe_as_yaml(recipe))
    names = [entry.name for entry in fields(Recipe) if entry.name not in free]
    changed = [name for name in names if not _same(stored.get(name), now[name])]
    return "; ".join(f"{name}: {stored.get(name)} -> {now[name]}" for name in changed)


def _same(one: Any, other: Any) -> bool:
    """Whether a stored value and one of now are equal, or are paths of one file; a stored relative one is of a folder
    that is not known any more."""
    if one == other or not (isinstance(one, str) and isinstance(other, str) and os.path.isabs(one)):
        return one == other
    return os.path.exists(other) and os.path.realpath(one) == os.path.realpath(other)


def environment() -> dict[str, Any]:
    """Versions and machine of this process."""
    versions = {}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"python": platform.python_version(), **versions, "device": device, "threads": torch.get_num_threads()}
