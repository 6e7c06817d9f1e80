"""A recipe's traces and teacher targets, without training: the work of ``trsd.cache``."""

from pathlib import Path

import torch

from trsd.errors import InputError
from trsd.job import Job, with_teacher
from trsd.memory import out_of_memory_says, turned_down
from trsd.prepare import build_method, prepare_traces
from trsd.prepare_teacher import describe_cache, prepare_teacher, refuse_other_cache
from trsd.recipe import Recipe
from trsd.run import alone_in, discard_unbegun, open_run, with_output_dir


def cache(recipe: Recipe, name: str = "run") -> Path:
    """Make the recipe's traces and teacher targets; returns the folder of the targets.

    Raises:
        InputError: a recipe without cached targets, or input that cannot be used.
        OSError: as above, from the system.
    """
    recipe = with_teacher(recipe)
    if recipe.alpha == 0 or not recipe.teacher.endswith("_cache"):
        what = "alpha 0, so no teacher" if recipe.alpha == 0 else f"teacher {recipe.teacher}"
        raise InputError(f"teacher: this recipe has {what}, and there is nothing to cache: train it as it is")
    if recipe.resume_from_checkpoint:
        raise InputError("resume_from_checkpoint: a cache is gone on with by itself: leave it out")
    recipe = with_output_dir(recipe, name)
    with alone_in(Path(recipe.output_dir)), out_of_memory_says(turned_down(recipe)):
        return _cache(recipe)


def _cache(recipe: Recipe) -> Path:
    recipe, output_dir, _ = open_run(recipe)
    torch.manual_seed(recipe.seed)
    try:
        job = Job(recipe, output_dir)
        refuse_other_cache(job)
        method = build_method(job, prepare_traces(job))
    except (InputError, OSError, ImportError):
        discard_unbegun(output_dir)
        raise
    prepare_teacher(job, method)
    folder = job.cache_folder
    print(
        f"cache   {folder}: {describe_cache(job, folder)}\n"
        f"traces  {output_dir / 'traces'}\n"
        f"train   python -m trsd.train with the same flags and --output_dir {output_dir}"
    )
    return folder
