"""What a recipe would take: ``python -m trsd.plan --model Qwen3-4B --teacher Qwen3-8B --method lsp --gpu_memory 80``.

No weights and no GPU are needed. A step of the trainer's own loop is run without content (``step_simulation.py``),
which gives peak memory by part and operations by family; the device's ceilings (``ceilings.py``) turn those into the
least time a step can take. Then what fits, and which setting to turn. Every recipe field is a flag here as in training;
``--teacher`` names a model, or says where its targets come from.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

from trsd.command import import_quietly
from trsd.errors import InputError, message_of
from trsd.flags import described, parse_flags
from trsd.model_shapes import SHAPES
from trsd.planned_lengths import CLOSER, shared_lengths
from trsd.recipe import Recipe
from trsd.recipe_file import fail, parse_recipe, recipe_as_yaml
from trsd.terminal import at_a_terminal

TEACHER_KINDS = get_args(get_type_hints(Recipe)["teacher"])
MODELS = {
    "--model NAME": f"the student: a known shape ({', '.join(SHAPES)}), a folder or a hub name",
    "--teacher NAME": f"the teacher, likewise; or where its targets come from: {', '.join(TEACHER_KINDS)}",
}
DESCRIPTION = f"""Say what a recipe would take: memory by part, operations, least time, disk; what fits, what to turn.

{described(MODELS)}

Every field of the recipe is a flag too, as for python -m trsd.train, and
--config names a recipe."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Say what a recipe would take: memory by part, operations, least time, disk; what fits, and what to turn."""

    gpus: int = 1
    """GPUs that share weights, gradients and optimizer state (full sharding)."""
    gpu: str | None = None
    """The GPU, such as H200; "cpu" for a CPU; left out, the one at hand, else an H100 (a CPU for bundled models)."""
    gpu_memory: float | None = None
    """GiB of one GPU; left out, what the GPU has."""
    num_traces: int = 1000
    """Traces of the data set, for the time of an epoch and the size of a cache."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; left out, 5 % of max_length, as in OpenThoughts."""
    reasoning_tokens: int | None = None
    """Tokens of a reasoning, its close included; left out, what prompt and answer leave of max_length."""
    answer_tokens: int | None = None
    """Tokens of an answer; left out, 18 % of max_length."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as ``field: what to do``."""
        found = []
        for name in ("gpus", "num_traces"):
            if getattr(self, name) < 1:
                found.append(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, least in (("prompt_tokens", 1), ("reasoning_tokens", len(CLOSER)), ("answer_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"{name}: expected at least {least}, got {value}")
        if self.gpu_memory is not None and not 0 < self.gpu_memory < float("inf"):
            found.append(f"gpu_memory: expected GiB, more than 0, got {self.gpu_memory}")
        return found

    def lengths(self, max_length: int) -> tuple[int, int, int]:
        """Tokens of prompt, reasoning and answer of a trace."""
        shares = shared_lengths(max_length)
        prompt = self.prompt_tokens or shares[0]
        answer = self.answer_tokens or shares[2]
        return prompt, self.reasoning_tokens or max(len(CLOSER), max_length - prompt - answer), answer


def parse(argv: Sequence[str] | None) -> tuple[PlanArguments, Recipe, bool]:
    """The plan's own flags, a recipe from the rest, and whether it is only to be shown."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    names = [f"--{entry.name}" for entry in fields(PlanArguments)]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--model")
    parser.add_argument("--teacher", action="append", default=[])
    own, rest = parser.parse_known_args(words)
    values = {name: getattr(own, name[2:]) for name in names}
    given = [word for name, value in values.items() if value is not None for word in (name, value)]
    asks_for_help = {"-h", "--help"} & set(words)
    arguments = parse_flags(
        PlanArguments, ["--help"] if asks_for_help else given, prog="python -m trsd.plan", description=DESCRIPTION
    )
    if found := arguments.problems():
        fail("\n       ".join(found))
    rest += ["--model_name_or_path", own.model] if own.model else []
    for value in own.teacher:
        rest += ["--teacher" if value in TEACHER_KINDS else "--teacher_model_name_or_path", value]
    recipe, _, dry_run = parse_recipe(rest, prog="python -m trsd.plan")
    return arguments, recipe, dry_run


def _underscored(word: str) -> str:
    """A flag as it is spelled here; both spellings are taken, as in training."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


@at_a_terminal()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit code 2 for what cannot be planned."""
    arguments, recipe, dry_run = parse(argv)
    if dry_run:
        print(recipe_as_yaml(recipe), end="")
        return
    import_quietly()  # here, not at the top: --help and a wrong flag need not wait for torch and transformers
    from trsd.plan_report import report
    from trsd.planner import run

    try:
        print(report(run(arguments, recipe)))
    except (InputError, OSError, ImportError) as error:
        fail(message_of(error))


if __name__ == "__main__":
    main()
