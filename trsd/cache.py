"""Cache: ``python -m trsd.cache [--config recipe.yaml] [--field value ...]``, with the flags of ``trsd.train``.

Does what a run does before it trains: makes the traces and the teacher's targets, says how large they are and where,
and stops. ``trsd.train`` with the same flags finds them, in the same ``output_dir`` or by ``teacher_cache_dir``. A
build that was interrupted goes on when the command is given again.
"""

import sys

from trsd.command import import_quietly
from trsd.errors import InputError, message_of
from trsd.launch import refuse_ranks
from trsd.recipe_file import fail, parse_recipe, recipe_as_yaml
from trsd.terminal import at_a_terminal

DOES = "Make what a run makes before it trains, the traces and the teacher's targets, and stop."


@at_a_terminal()
def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 2 for input that cannot be used."""
    recipe, name, dry_run = parse_recipe(argv, prog="python -m trsd.cache", does=DOES)
    if dry_run:
        print(recipe_as_yaml(recipe), end="")
        return
    import_quietly()  # here, not at the top: --help and a wrong flag need not wait for torch and transformers
    from trsd.caching import cache
    from trsd.memory import OutOfMemory

    try:
        refuse_ranks("python -m trsd.cache")
        cache(recipe, name)
    except (InputError, OSError, ImportError) as error:
        fail(message_of(error))
    except OutOfMemory as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
