"""The reference of recipes as a page: ``python -m trsd.recipe_reference > docs/recipes.md``.

Everything in it comes from ``recipe.py`` (fields, types, defaults, what their docstrings say, and which methods read
them) and from the shipped recipes, so the page is never edited by hand; a test holds it to what this prints.
"""

import ast
import re
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trsd.recipe import METHOD_DEFAULTS, METHOD_FIELDS, Recipe
from trsd.recipe_file import RECIPES, load_recipe, shipped_recipes
from trsd.run import FREE_TO_CHANGE

SOURCE = Path(__file__).with_name("recipe.py")
# Titles of the groups, which blank lines divide in the class, by their first field.
TITLES = {
    "model_name_or_path": "The run: models, data, method",
    "max_thinking_tokens": "Traces: how the teacher writes them, and which are kept",
    "cut": "What is learnt of a trace",
    "teacher": "Teacher, adapter, loss",
    "learning_rate": "Training",
    "eval_budgets": "Evaluation, checkpoints, what is printed",
}
KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
INTRODUCTION = """# Recipes

Every setting of a run is a field of one recipe. A YAML file gives some of them, flags of the same names override it,
and the rest have the defaults below. Made from the code by `python -m trsd.recipe_reference > docs/recipes.md`.

```yaml
base: lsp-qwen3-8b-4b          # a shipped recipe, or a file beside this one; left out, the defaults
data: my-traces.jsonl
keep_fraction: 0.3
output_dir: runs/leading-third
```

```bash
python -m trsd.train --config recipe.yaml --learning_rate 2e-5              # the file, then the flags
python -m trsd.train --config recipe.yaml --learning_rate 2e-5 --dry_run    # what that comes to, without running it
```

- Lists are `[a, b]` in YAML and `a,b` as flags; `true` and `false` are `True` and `False` as flags, where a switch
  alone means `True`.
- An unknown key, a value of another kind or settings that contradict each other end a command with exit code 2, the
  key's name and what to do.
- Without `--config` a command that names no model and no data takes the demo of its method (`demo`, `demo-lsp`,
  `demo-palign`, `demo-sft`); one that names a model or data starts from the defaults.
- A recipe whose `method` is another than its base's takes none of the fields that belong to a method from it.
- `python -m trsd.train`, `trsd.cache`, `trsd.sweep` and `trsd.plan` take every field as a flag. What a run was started
  with is in its folder, as `recipe.yaml`.

More of what settings mean: [methods](methods.md), [data](data.md), [teacher targets](teacher-targets.md),
[memory](memory.md), [several GPUs](scaling-out.md), [checkpoints](checkpoints.md)."""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    hints, defaults = get_type_hints(Recipe), {entry.name: entry.default for entry in fields(Recipe)}
    for group in _groups():
        rows = ["| field | value | default | methods | |", "|---|---|---|---|---|"]
        for name, text in group:
            methods = ", ".join(METHOD_FIELDS[name]) if name in METHOD_FIELDS else "all"
            if text.startswith(f"{methods}: "):
                text = text.removeprefix(f"{methods}: ")
                text = text[0].upper() + text[1:]
            cells = (f"`{name}`", _kind(hints[name]), _default(name, defaults[name]), methods, text)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"## {TITLES[group[0][0]]}\n\n" + "\n".join(rows))
    free = ", ".join(f"`{entry.name}`" for entry in fields(Recipe) if entry.name in FREE_TO_CHANGE)
    parts.append(
        f"## What may change when a run is resumed\n\n{free}. Everything else is held to what the run began with."
    )
    return "\n\n".join([*parts, _shipped()]) + "\n"


def _groups() -> list[list[tuple[str, str]]]:
    """(field, its docstring as one line of Markdown) in the groups that blank lines divide."""
    source = SOURCE.read_text(encoding="utf-8")
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Recipe"]
    found: list[list[tuple[str, str]]] = []
    last_line = 0
    for entry, docstring in zip(body, body[1:], strict=False):
        if not isinstance(entry, ast.AnnAssign):
            continue
        if entry.lineno > last_line + 1:
            found.append([])
        last_line = docstring.end_lineno or 0
        text = " ".join(ast.literal_eval(docstring.value).split())  # type: ignore[attr-defined]
        found[-1].append((entry.target.id, text.replace("<", "\\<")))  # type: ignore[union-attr]
    return found


def _kind(hint: Any) -> str:
    """A type in words."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is not None and type(None) in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {KINDS[get_args(hint)[0]]}s" if get_args(hint)[0] is not str else "list of texts"
    return KINDS[hint]


def _default(name: str, value: Any) -> str:
    """A default as YAML has it; of a field whose method decides, what each decides."""
    by_method = [f"{method} `{said[name]}`" for method, said in METHOD_DEFAULTS.items() if name in said]
    if by_method:
        return ", ".join(by_method)
    if value is None:
        return "left out"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _shipped() -> str:
    """The shipped recipes, a row each."""
    rows = ["| `--config` | method | student | teacher | |", "|---|---|---|---|---|"]
    for name in shipped_recipes():
        path = RECIPES / f"{name}.yaml"
        recipe = load_recipe(path)
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        comment = " ".join(re.findall(r"^# (?!  )(.*)$", head, re.MULTILINE))
        sentence = re.match(r".*?\.(?= |$)", comment)
        teacher = f"`{recipe.teacher_model_name_or_path}`" if recipe.teacher_model_name_or_path else ""
        link, student = f"[{name}](../trsd/recipes/{path.name})", f"`{recipe.model_name_or_path}`"
        rows.append(f"| {link} | {recipe.method} | {student} | {teacher} | {sentence[0] if sentence else comment} |")
    note = (
        "Those with a paper's settings bring no evaluation data: add `--eval_data`, or evaluate the checkpoint.\n"
        "Models and data below `runs/` are made by the commands that the file's first lines give."
    )
    return "## What is shipped\n\n" + "\n".join(rows) + f"\n\n{note}"


def main() -> None:
    """Print the page."""
    print(reference(), end="")


if __name__ == "__main__":
    main()
