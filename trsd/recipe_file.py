"""Recipes from YAML and then from flags, and back.

An unknown key, a wrong type or a contradiction ends the program with exit code 2, the key's name and a suggestion.
"""

import argparse
import difflib
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

from trsd.flags import described, parse_flags, with_values
from trsd.recipe import Recipe, belongs_to_a_method, unread_problems, with_method_defaults

METHODS, TEACHERS = (get_args(get_type_hints(Recipe)[name]) for name in ("method", "teacher"))
RECIPES = Path(__file__).parent / "recipes"
DEMO = "demo"
# Former names of fields and their present ones: each is taken, and said, for one minor version (docs/api.md).
RENAMED: dict[str, str] = {}


def fail(message: str) -> NoReturn:
    """Print what is wrong and exit with code 2, as for any wrong command line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _present_name(name: str, where: str) -> str:
    """What the field ``name`` is called now; a former name is said."""
    if name not in RENAMED:
        return name
    print(
        f"note: {where}: {name} is called {RENAMED[name]} now; the next minor version knows no other", file=sys.stderr
    )
    return RENAMED[name]


def _present_word(word: str) -> str:
    """A word of a command line with the present name of the field that it may set."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    known = flag.startswith("--") and name in RENAMED
    return f"--{_present_name(name, flag)}{equals}{value}" if known else word


def _as_flags(values: dict[str, Any], path: Path) -> tuple[list[str], dict[str, str | None]]:
    """YAML values as (command-line words, so that one parser checks both; texts, which no parser may read).

    Unknown keys are refused here.
    """
    known = {entry.name: entry.type for entry in fields(Recipe)}
    words: list[str] = []
    texts: dict[str, str | None] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; python -m trsd.train --help names them all"
            fail(f"{path}: unknown key {key!r}{hint}")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, list | dict) for v in value)):
            fail(f"{path}: {key}: expected a plain value, got {value!r}")
        if known[key] in (str, str | None):
            if not isinstance(value, known[key]):
                fail(f"{path}: {key}: expected text, got {value!r} (put it in quotes if it is meant as text)")
            texts[key] = value
            continue
        words += [f"--{key}", ",".join(str(part) for part in value) if isinstance(value, list) else str(value)]
    return words, texts


class _Misread(yaml.constructor.ConstructorError):
    """YAML takes a number for another one than who wrote it."""


class _Loader(yaml.SafeLoader):
    """YAML without its silent choice between two values of one key, and without its numbers to base 8 and 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """The number of ``node``; 1:30 and 010 raise, which would be 90 and 8."""
        kind = node.tag.rpartition(":")[2]
        value = getattr(self, f"construct_yaml_{kind}")(node)
        if ":" in node.value or kind == "int" and re.match(r"[-+]?0[0-9_]", node.value):
            raise _Misread(None, None, f"YAML takes {node.value} for {value}: write the number itself", node.start_mark)
        return value


for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.number)


def _yaml_values(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The ``key: value`` lines of a recipe over those of the recipe it names as ``base``."""
    if path.resolve() in seen:
        fail(f"{path}: base: these recipes build on each other in a circle")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        fail(f"no recipe at {path} ({error.strerror}); shipped: {', '.join(shipped_recipes())}")
    except _Misread as error:
        fail(f"{path}:{error.problem_mark.line + 1}: {error.problem}")
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # The last three are what PyYAML raises for values that are not what their form or tag says, or too deep.
        fail(f"{path} is not YAML: {error}")
    if not isinstance(values, dict):
        fail(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    for former in [key for key in values if key in RENAMED]:
        if (name := _present_name(former, str(path))) in values:
            fail(f"{path}: {name} is given twice, {former} was its name: leave one out")
        values[name] = values.pop(former)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        fail(f"{path}: base: expected a YAML file or a shipped recipe ({', '.join(shipped_recipes())}), got {base!r}")
    beside = path.parent / base
    below = _yaml_values(beside if beside.is_file() else resolve_config(base), (*seen, path.resolve()))
    if "method" in values and values["method"] != below.get("method", Recipe.method):
        below = {name: value for name, value in below.items() if not belongs_to_a_method(name)}
    return below | values


def load_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file over its ``base`` and the defaults; exits with code 2 when it is wrong."""
    words, texts = _as_flags(_yaml_values(path), path)
    try:
        return replace(parse_flags(Recipe, words, prog="python -m trsd.train"), **texts)
    except SystemExit:
        print(f"error: the value above is wrong in {path}", file=sys.stderr)
        raise


def parse_recipe(
    argv: list[str] | None = None,
    *,
    prog: str = "python -m trsd.train",
    does: str = "Distil a reasoning model from partial chains of thought.",
) -> tuple[Recipe, str, bool]:
    """(recipe, its name, dry run) of a command line of ``prog``: the YAML of ``--config``, then the flags.

    The help begins with what the command ``does``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dry_run", choices=("True", "False"), default="False")
    own, rest = parser.parse_known_args(with_values(sys.argv[1:] if argv is None else argv, {"dry_run"}))
    rest = [_present_word(word) for word in rest]
    _refuse_models_for_kinds(rest)
    base, name = Recipe(), "run"
    if own.config or not names_a_job(rest):
        path = resolve_config(own.config or _demo_of(rest))
        base, name = load_recipe(path), path.stem
        if _method_of(rest) in METHODS and _method_of(rest) != base.method:
            base = _without_method_fields(base, name)
    own_flags = {
        "--config RECIPE": f"a YAML file or a shipped recipe ({', '.join(shipped_recipes())}) that the flags override; "
        "left out: the demo of the method, or the plain defaults when a flag names a model or data",
        "--dry_run": "print the resolved recipe and stop",
    }
    recipe = parse_flags(Recipe, rest, prog=prog, default=base, description=f"{does}\n\n{described(own_flags)}")
    # Of what flags say alone: a recipe may have been written for other values of what they change.
    if found := recipe.problems() + unread_problems(recipe, {_field_of(word) for word in rest}):
        fail("\n       ".join(found))
    return with_method_defaults(recipe), name, own.dry_run == "True"


def _field_of(word: str) -> str:
    """The field that a word of a command line sets, if it is a flag."""
    return word.split("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else ""


def names_a_job(words: list[str]) -> bool:
    """Whether flags bring a model or data of their own, for which the demo's limits would be wrong."""
    names = {word.split("=")[0].replace("-", "_") for word in words}
    return bool(names & {"__model_name_or_path", "__data"})


def _demo_of(words: list[str]) -> str:
    """The demo of the method that flags name."""
    name = f"{DEMO}-{_method_of(words)}"
    return name if name in shipped_recipes() else DEMO


def _without_method_fields(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` for another method: what belongs to a method is left out of it, and said."""
    reset = {field.name: field.default for field in fields(Recipe) if belongs_to_a_method(field.name)}
    if said := [key for key, value in reset.items() if getattr(recipe, key) != value]:
        print(f"note: {name} is of method {recipe.method}, so left out: {', '.join(said)}", file=sys.stderr)
    return replace(recipe, **reset)


def _method_of(words: list[str]) -> str | None:
    """The method that flags name."""
    return _value_of("--method", words)


def _value_of(flag: str, words: list[str]) -> str | None:
    """The value of ``flag`` among ``words``."""
    spelled = [word for pair in words for word in pair.split("=", 1)]
    return spelled[spelled.index(flag) + 1] if flag in spelled[:-1] else None


def _refuse_models_for_kinds(words: list[str]) -> None:
    """``--teacher`` says where targets come from; a model there is what ``python -m trsd.plan`` takes."""
    named = _value_of("--teacher", words)
    if named is not None and named not in TEACHERS and ("/" in named or ":" in named or Path(named).is_dir()):
        fail(
            f"teacher: expected where its targets come from ({', '.join(TEACHERS)}), got {named!r}; a model goes to "
            "--teacher_model_name_or_path"
        )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def resolve_config(text: str) -> Path:
    """A YAML path, or the bare name of a shipped recipe."""
    return RECIPES / f"{text}.yaml" if text in shipped_recipes() and not Path(text).is_file() else Path(text)


def recipe_as_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML file that loads to the same recipe."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
