"""The model card: README.md of a checkpoint, what it is and how it must be served so that serving matches training.

Its front matter is what the Hub reads, and under ``trsd`` what our own programs read again (``serving_facts``). Figures
come from the run's evaluations: the card that is saved with a checkpoint has those before training, and is written anew
after the last evaluation. Paths of the machine that trained are left out of it.
"""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trsd.checkpoint_folders import step_of
from trsd.errors import InputError
from trsd.manifest import replace_unloaded
from trsd.paths import BUNDLED, resolve_bundled
from trsd.recipe import Recipe
from trsd.recipe_file import recipe_as_yaml
from trsd.serving_snippets import LLAMA_CPP, TRANSFORMERS, Serving, program, vllm_program, vllm_serve
from trsd.thinking import ThinkFormat

CARD = "README.md"
LEADS = {
    "trsd": "Trained to answer well after any amount of thinking.",
    "lsp": "Trained on a part of each sequence, by a larger model's distributions. It may have seen few ends: watch\n"
    "how often it stops by itself, and close its thinking where it does not.",
    "palign": "Trained on the shortest sufficient prefixes of longer reasoning, and on its own completions of them.",
    "sft": "Trained on traces as text.",
}
SOURCES = {"trsd": "2603.13274", "lsp": "2512.21002", "palign": "2601.10064"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Fields of a recipe that say where a run was kept, and nothing about the model.
PLACES = ("output_dir", "teacher_cache_dir", "resume_from_checkpoint")
PATHS = {"model_name_or_path", "teacher_model_name_or_path", "data", "eval_data"}
FACTS = {
    "method": str,
    "closer": str,
    "open_tag": str,
    "close_tag": str,
    "budgets": list,
    "max_thinking_tokens": int,
    "max_answer_tokens": int,
}
# Those that say how a model is asked; the others tell what was done with it.
SERVED_BY = ("closer", "open_tag", "close_tag", "max_thinking_tokens", "max_answer_tokens")


class _Quoting(yaml.SafeDumper):
    """Texts of several lines in quotes, as Python would write them."""


_Quoting.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


@dataclass(frozen=True)
class Base:
    """What a model was trained from, without the paths of a machine."""

    shown: str
    hub_name: str | None = None
    """Under which the Hub has it, as far as its folder says."""
    license: str | None = None


class ModelCard:
    """The cards of one run's checkpoints."""

    def __init__(self, recipe: Recipe, think: ThinkFormat, tokenizer: Any) -> None:
        self.recipe, self.think, self.tokenizer = recipe, think, tokenizer
        self.base = base_of(recipe.model_name_or_path)

    def text(self, step: int, before: dict[str, Any] | None = None, after: dict[str, Any] | None = None) -> str:
        """The card of the checkpoint of ``step``; ``before`` and ``after`` are evaluations, where there are any."""
        recipe, budgets = self.recipe, _budgets(before or after)
        serving = Serving.of(
            self.think, self.tokenizer, budget=self._example(budgets), max_answer_tokens=recipe.max_answer_tokens
        )
        parts = [
            front_matter(self._front(budgets)),
            f"# {plain(self.base.shown)} after {step} steps of {recipe.method.upper()}",
            LEADS[recipe.method],
            "## What it is",
            self._facts(step),
            "## Serve it as it was trained",
            self._serving(budgets),
            *(["## Evaluation", _evaluation(before, after)] if before or after else []),
            *_snippets(serving),
            "## Recipe",
            "Fields that differ from the defaults; of paths, the last name.",
            fenced(self._recipe(), "yaml"),
        ]
        return "\n\n".join(parts) + "\n"

    def rewrite(self, checkpoint: Path, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        """Give ``checkpoint`` its card with the figures; it is whole at every moment."""
        replace_unloaded(checkpoint, CARD, self.text(step_of(checkpoint), before, after))

    def _front(self, budgets: list[tuple[str, int]]) -> dict[str, Any]:
        recipe = self.recipe
        known = {"license": self.base.license, "base_model": self.base.hub_name}
        facts = {
            "method": recipe.method,
            "closer": self.think.closer,
            "open_tag": self.think.open_tag,
            "close_tag": self.think.close_tag,
            "budgets": [tokens for _, tokens in budgets],
            "max_thinking_tokens": recipe.max_thinking_tokens,
            "max_answer_tokens": recipe.max_answer_tokens,
        }
        return {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            **{name: value for name, value in known.items() if value},
            "tags": ["trsd", "reasoning", "distillation"],
            "trsd": facts,
        }

    def _facts(self, step: int) -> str:
        recipe = self.recipe
        base = plain(self.base.shown)
        if self.base.hub_name:
            base = f"[{plain(self.base.hub_name)}](https://huggingface.co/{self.base.hub_name})"
        source = SOURCES.get(recipe.method)
        method = recipe.method.upper() + (f" ([arXiv {source}](https://arxiv.org/abs/{source}))" if source else "")
        teacher = base_of(recipe.teacher_model_name_or_path) if recipe.teacher_model_name_or_path else None
        steps = f"{step} optimizer step{'' if step == 1 else 's'} of {recipe.train_batch_size} traces"
        rows = [("trained from", base), ("method", f"{method}, {steps}")]
        if recipe.method in ("trsd", "lsp"):
            rows.append(("teacher", plain(teacher.shown) if teacher else "the same model before training"))
        rows.append(("data", plain(shortened(recipe.data))))
        if recipe.lora_rank:
            rows.append(("trained weights", f"an adapter of rank {recipe.lora_rank}, merged; it is in `adapter/`"))
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

    def _serving(self, budgets: list[tuple[str, int]]) -> str:
        recipe = self.recipe
        listed = ", ".join(f"{tokens} ({text})" if text.endswith("%") else text for text, tokens in budgets)
        drawn = f"at temperature {recipe.sampling_temperature:g}, top-p {recipe.sampling_top_p:g}"
        lines = [
            "To end the thinking at a budget, append the closer, the very string it was trained with, and let the",
            "model answer. As a Python string:",
            "",
            fenced(repr(self.think.closer), "python"),
            "",
            f"- Prompts: the chat template's, ending with {code(repr(self.think.opener))}.",
            f"- Trained on: {_cuts(recipe)}.",
            f"- Evaluated at: {f'thinking budgets of {listed} tokens' if budgets else 'no budgets'}.",
            f"- Limits: {recipe.max_thinking_tokens} tokens of thinking, {recipe.max_answer_tokens} of an answer.",
            f"- Traces that the run itself wrote were drawn {drawn if recipe.sampling_temperature else 'greedily'}.",
            "",
            "Other closers, templates, and longer thinking are not what it was trained for.",
        ]
        return "\n".join(lines)

    def _example(self, budgets: list[tuple[str, int]]) -> int:
        """A budget for the snippets."""
        tokens = [count for _, count in budgets if count]
        return tokens[len(tokens) // 2] if tokens else max(1, self.recipe.max_thinking_tokens // 2)

    def _recipe(self) -> str:
        values, defaults = (yaml.safe_load(recipe_as_yaml(recipe)) for recipe in (self.recipe, Recipe()))
        said = {name: value for name, value in values.items() if name not in PLACES and value != defaults[name]}
        said |= {name: shortened(said[name]) for name in PATHS & said.keys()}
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True).rstrip() if said else "{}"


def serving_facts(folder: Path) -> dict[str, Any] | None:
    """What the card in ``folder`` says of serving, by the names of ``FACTS``; None where no card of ours is there.

    Raises:
        InputError: it says so in another form.
    """
    facts = _front_matter(folder).get("trsd")
    if facts is None:
        return None
    well_formed = isinstance(facts, dict) and all(isinstance(facts.get(name), kind) for name, kind in FACTS.items())
    if not well_formed or not all(isinstance(tokens, int) for tokens in facts["budgets"]):
        raise InputError(f"{folder / CARD}: expected {', '.join(FACTS)} under trsd in its front matter, got {facts!r}")
    return {name: facts[name] for name in FACTS}


def front_matter(values: dict[str, Any]) -> str:
    """``values`` as the Hub reads them at the top of a README.md."""
    return f"---\n{yaml.dump(values, Dumper=_Quoting, sort_keys=False)}---"


def base_of(name_or_path: str) -> Base:
    """What a recipe's model is to be called."""
    folder = Path(resolve_bundled(name_or_path))
    if not folder.is_dir():
        return Base(name_or_path, hub_name=name_or_path)
    front = _front_matter(folder)
    license = front.get("license") if isinstance(front.get("license"), str) else None
    if name_or_path.startswith(BUNDLED):
        return Base(f"bundled {name_or_path.removeprefix(BUNDLED)} of trsd", license=license)
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", f"{folder.resolve().as_posix()}/")
    if cached:
        name = "/".join(cached.groups())
        return Base(name, hub_name=name, license=license)
    named = [front.get("base_model"), _config_name(folder)]
    hub_name = next((n for n in named if isinstance(n, str) and HUB_NAME.fullmatch(n) and not Path(n).exists()), None)
    return Base(name_of_folder(folder), hub_name=hub_name, license=license)


def name_of_folder(folder: Path) -> str:
    """The last name of a path; of a checkpoint with its run's."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"checkpoint-\d+", folder.name) else folder.name


def shortened(text: str) -> str:
    """A path of this machine as its last name; a hub name, or a path inside the current folder, as it is."""
    return name_of_folder(Path(text)) if text.startswith(("/", "~", ".")) else text


def code(text: str) -> str:
    """``text`` as Markdown shows it between backticks, however many are in it."""
    ticks = _ticks(text, 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """``text`` as a block of code."""
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def plain(text: str) -> str:
    """``text`` as Markdown shows it, without any meaning of its characters."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _ticks(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the top of a folder's README.md; empty where there is none that can be read."""
    path = folder / CARD
    if not path.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}


def _config_name(folder: Path) -> Any:
    """What older folders say that they were loaded from."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def _budgets(result: dict[str, Any] | None) -> list[tuple[str, int]]:
    return [(row["budget"], row["tokens"]) for row in result["budgets"]] if result else []


def _cuts(recipe: Recipe) -> str:
    """What amounts of thinking it was trained on."""
    if recipe.method == "palign":
        return "thinking cut behind the shortest prefix that a judge found sufficient"
    if recipe.method in ("lsp", "sft"):
        kept = {
            "fraction": f"the {recipe.keep_side} {recipe.keep_fraction:.0%} of each sequence",
            "endpoints": f"both ends of each sequence, {recipe.keep_fraction:.0%} of it",
            "first_derivation": "each sequence up to the first derivation of its answer",
        }[recipe.truncation]
        return "whole sequences" if recipe.keep_fraction == 1 and recipe.truncation == "fraction" else kept
    where = {
        "uniform": "at a share drawn uniformly",
        "log_uniform": "at every scale of length equally often",
        "fractions": f"at {', '.join(f'{share:.0%}' for share in recipe.cut_fractions)} of it",
        "budgets": f"after {', '.join(map(str, recipe.cut_budgets))} tokens",
        "first_derivation": "behind the first derivation of the answer",
        "judged": "behind the shortest prefix that a judge found sufficient",
    }[recipe.cut]
    snapped = ", moved back to the end of a sentence" if recipe.snap_to_sentence else ""
    return f"thinking cut {where}{snapped}; whole in {recipe.anchor_share:.0%} of the examples"


def _evaluation(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """The figures as a table: a column for each evaluation."""
    results = {name: result for name, result in (("before", before), ("after", after)) if result}
    first = next(iter(results.values()))

    def row(name: str, tokens: Any, cells: list[dict[str, Any]]) -> str:
        figures = [f"{cell['accuracy']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells]
        return f"| {' | '.join([name, str(tokens), *figures])} |"

    names = [f"accuracy {name} training" for name in results]
    lines = [f"| {' | '.join(['budget', 'tokens', *names])} |", f"|---|---|{'---|' * len(results)}"]
    for place, line in enumerate(first["budgets"]):
        lines.append(row(line["budget"], line["tokens"], [result["budgets"][place] for result in results.values()]))
    free = [result["unconstrained"] for result in results.values()]
    lengths = " → ".join(f"{cell['mean_thinking_tokens']:.0f}" for cell in free)
    lines.append(row("free", lengths, free))
    areas = [f"{result['auc']:.3f}" for result in results.values() if result["auc"] is not None]
    area = f" Area under the curve: {' → '.join(areas)}." if areas else ""
    sampling = first["sampling"]
    drawn = "greedy" if not sampling["temperature"] else f"temperature {sampling['temperature']:g}"
    lines += ["", f"{first['num_questions']} questions, {drawn}, 95 % intervals over questions.{area}"]
    return "\n".join(lines)


def _snippets(serving: Serving) -> list[str]:
    return [
        "## transformers",
        fenced(program(serving, TRANSFORMERS), "python"),
        "## vLLM",
        fenced(vllm_serve(serving), "bash"),
        fenced(vllm_program(serving), "python"),
        "## llama.cpp",
        fenced("python -m trsd.export --model . --output mine.gguf\nllama-server -m mine.gguf", "bash"),
        fenced(program(serving, LLAMA_CPP), "python"),
    ]
