"""Cache: ``python -m trsd.cache [--config recipe.yaml] [--field value ...]``, with the flags of ``trsd.train``.

Does what a run does before it trains: makes the traces and the teacher's targets, says how large they are and where,
and stops. ``trsd.train`` with the same flags finds them, in the same ``output_dir`` or by ``teacher_cache_dir``. A
build that was interrupted goes on when the command is given again.
"""

import sys
from pathlib import Path

import torch

from trsd.errors import InputError, message_of
from trsd.job import Job, with_teacher
from trsd.launch import refuse_ranks
from trsd.memory import OutOfMemory, out_of_memory_says, turned_down
from trsd.models import quieten_transformers
from trsd.prepare import build_method, prepare_traces
from trsd.prepare_teacher import describe_cache, prepare_teacher
from trsd.recipe import Recipe
from trsd.recipe_file import fail, parse_recipe, recipe_as_yaml
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


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 2 for input that cannot be used."""
    recipe, name, dry_run = parse_recipe(argv, prog="python -m trsd.cache")
    if dry_run:
        print(recipe_as_yaml(recipe), end="")
        return
    quieten_transformers()
    try:
        refuse_ranks("python -m trsd.cache")
        cache(recipe, name)
    except (InputError, OSError, ImportError) as error:
        fail(message_of(error))
    except OutOfMemory as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
