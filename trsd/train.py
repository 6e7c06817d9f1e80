"""Train: ``python -m trsd.train [--config recipe.yaml] [--field value ...]``; without arguments the demo, on a CPU.

The command line alone: ``training.py`` is the run. Everything that a run makes is in its ``output_dir``.
"""

from trsd.command import import_quietly
from trsd.recipe_file import parse_recipe, recipe_as_yaml
from trsd.terminal import at_a_terminal


@at_a_terminal()
def main(argv: list[str] | None = None) -> None:
    """The command line: exit code 2 for input that cannot be used, 1 for training that cannot go on.

    A signal ends it with 128 and its number: SIGTERM with 143, Ctrl-C with 130, a terminal that hangs up with 129.
    """
    recipe, name, dry_run = parse_recipe(argv)
    if dry_run:
        print(recipe_as_yaml(recipe), end="")
        return
    import_quietly()  # here, not at the top: --help and a wrong flag need not wait for torch and transformers
    from trsd.training import start

    start(recipe, name)


if __name__ == "__main__":
    main()
