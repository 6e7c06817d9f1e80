"""Accuracy against the share of each sequence kept: ``python -m trsd.sweep --config demo-lsp --fractions 0.1,0.5,1.0``.

Trains and evaluates the recipe once for every fraction and side, from the same start on the same traces, and writes
what LSP's paper (arXiv 2512.21002) shows of it: the curve with its knee, retention, left against right, tokens, step
time, memory and operations, and loss gaps (``sweep_report.py``). Every run is a process of its own, so that its peak
memory is its own. What is finished is not run again; what was interrupted goes on.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trsd.command import import_quietly
from trsd.engines import Sampling
from trsd.errors import InputError, message_of
from trsd.launch import refuse_ranks
from trsd.recipe_file import fail, names_a_job, parse_recipe, recipe_as_yaml
from trsd.terminal import at_a_terminal
from trsd.truncation import SIDES

FRACTIONS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a sweep."""

    fraction: float
    side: str

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.side}-{self.fraction:g}"


def settings_of(fractions: Sequence[float], sides: Sequence[str]) -> list[Setting]:
    """Every fraction on every side; the whole sequence once, for it has no sides."""
    shares = [share for share in sorted(set(fractions)) if share < 1]
    found = [Setting(fraction=share, side=side) for side in dict.fromkeys(sides) for share in shares]
    whole = [Setting(fraction=1.0, side="left")] if 1.0 in fractions else []
    return found + whole


@at_a_terminal()
def main(argv: list[str] | None = None) -> None:
    """Sweep from the command line; input that cannot be used exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m trsd.sweep",
        description="Train and evaluate a recipe at several fractions of each sequence. Flags of python -m trsd.train "
        "(--config, --max_steps, --dry_run, ...) are taken too, and the recipe needs eval_data. Without --config, "
        "--method, a model or data it is demo-lsp. Ten fractions are ten trainings and eleven evaluations.",
        allow_abbrev=False,
    )
    parser.add_argument("--fractions", default=FRACTIONS, help=f"shares kept, comma-separated; default {FRACTIONS}")
    parser.add_argument("--sides", default="left", help="of left, middle, right, comma-separated; default left")
    parser.add_argument("--output_dir", type=Path, required=True, help="where runs and report go; resumed if it exists")
    parser.add_argument("--num_samples", type=int, default=1, help="samples per evaluation question")
    parser.add_argument("--temperature_eval", type=float, default=0.0, help="of those samples; 0 is greedy")
    parser.add_argument("--top_p_eval", type=float, default=1.0, help="nucleus mass of those samples")
    own, rest = parser.parse_known_args(argv)
    if not names_a_job(rest) and not {"--config", "--method"} & {word.split("=")[0] for word in rest}:
        rest = ["--config", "demo-lsp", *rest]
    recipe, _, dry_run = parse_recipe(rest)
    try:
        fractions = [float(text) for text in own.fractions.split(",")]
    except ValueError:
        fail(f"--fractions: expected numbers such as 0.1,0.5, got {own.fractions!r}")
    if bad := [share for share in fractions if not 0 < share <= 1]:
        fail(f"--fractions: expected more than 0 and at most 1, got {bad}")
    sides = [side.strip() for side in own.sides.split(",")]
    if unknown := set(sides) - set(SIDES):
        fail(f"--sides: expected some of {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    if own.num_samples < 1 or (own.num_samples > 1 and own.temperature_eval == 0):
        fail("--num_samples: expected at least 1, and more than 1 only with --temperature_eval: greedy ones are equal")
    if own.temperature_eval < 0 or not 0 < own.top_p_eval <= 1:
        fail("--temperature_eval, --top_p_eval: expected 0 or more, and more than 0 up to 1")
    settings = settings_of(fractions, sides)
    if len({setting.name for setting in settings}) < len(settings):
        fail(f"--fractions: some are too close to tell apart by name: {own.fractions}")
    if dry_run:
        print("\n".join(setting.name for setting in settings) + f"\n\n{recipe_as_yaml(recipe)}", end="")
        return
    import_quietly()  # here, not at the top: --help and a wrong flag need not wait for torch and transformers
    from trsd.memory import OutOfMemory
    from trsd.sweeping import sweep

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the run in progress too
    sampling = Sampling(temperature=own.temperature_eval, top_p=own.top_p_eval, seed=recipe.seed)
    try:
        refuse_ranks("python -m trsd.sweep")
        sweep(recipe, own.output_dir, settings, num_samples=own.num_samples, sampling=sampling)
    except (InputError, OSError, ImportError) as error:
        fail(message_of(error))
    except OutOfMemory as error:
        sys.exit(f"error: {error}")
    print(f"written to {own.output_dir}: sweep.md, sweep.png, sweep.json")


if __name__ == "__main__":
    main()
