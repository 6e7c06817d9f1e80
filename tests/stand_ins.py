"""Commands of the documentation, run for real where big models, data and step counts are small ones.

What a command reads is put where it names it: ``Qwen/Qwen3-0.6B`` becomes a folder of that name with the bundled
reasoner inside. So its words stay as they are written, except hub data sets, servers, and numbers above ``LIMITS``.
"""

import argparse
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tyro
from conftest import REASONER, make_traces, write_rows
from documentation import ROOT
from fake_server import FakeServer
from transformers import AutoModelForCausalLM

from trsd.benchmarks import BENCHMARKS
from trsd.demo.problems import draw_problems
from trsd.model_shapes import SHAPES
from trsd.paths import BUNDLED
from trsd.plan import TEACHER_KINDS
from trsd.recipe_file import load_recipe, parse_recipe, resolve_config
from trsd.traces import FILE_TYPES, write_traces

# What a command may do at most. In ``LIMITS`` what is left out means no limit, and gets this one.
LIMITS = {"max_steps": 2, "max_train_samples": 4, "max_eval_samples": 3, "max_samples": 3}
LOWERED = {
    "max_thinking_tokens": 240,  # the bundled reasoner's longest thinking is 231
    "max_answer_tokens": 24,
    "train_batch_size": 4,
    "branches_per_trace": 4,
    "num_samples": 2,
    "validation_samples": 1,
    "judge_samples": 2,
    "num_problems": 8,
    "steps": 1,
}
FIXED = {"trsd.sweep": {"fractions": "0.5"}, "trsd.demo.smollm2_experiment": {"dry_run": "True"}}
MODELS = {"model", "model_name_or_path", "teacher_model_name_or_path", "models", "student", "tokenizer", "teacher"}
NUM_POSITIONAL = {"trsd.report": 1, "trsd.compare": 2, "bench.compare": 2}
READ_RECIPES = {"trsd.train", "trsd.cache", "trsd.sweep"}
FOR_RANKS = (
    "shard_group_size",
    "vocab_parallel",
    "cpu_offload",
)  # one process refuses them, test_faults_ranks.py has several


class Parsed(Exception):
    """A command line was read; ``value`` is what came of it."""

    def __init__(self, value: Any) -> None:
        self.value = value


def call(module: str, words: Sequence[str]) -> None:
    """``python -m module words`` in this process; raises SystemExit only for an exit code other than 0."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":\n    main()' in source, f"python -m {module} does nothing"
    with patch.object(sys, "argv", [f"python -m {module}", *words]):
        try:
            importlib.import_module(module).main()
        except SystemExit as exit_:
            if exit_.code not in (None, 0):
                raise


def parse_as_written(module: str, words: Sequence[str]) -> Any:
    """What the command makes of ``words``: a recipe, arguments or a namespace. SystemExit where it refuses them."""
    if module in ("trsd.train", "trsd.cache"):
        return parse_recipe([*words, "--dry_run"])[0]
    if module == "trsd.plan":
        return importlib.import_module(module).parse(words)[1]
    if module == "trsd.report":
        assert len(words) == 1, words
        return None
    if module == "trsd.sweep":
        recipes = []
        with patch("trsd.sweep.parse_recipe", lambda rest: recipes.append(parse_recipe(rest)) or recipes[0]):
            call(module, [*words, "--dry_run"])
        return recipes[0][0]
    stopping = [
        patch.object(tyro, "cli", _stop_after(tyro.cli)),
        patch.object(argparse.ArgumentParser, "parse_args", _stop_after(argparse.ArgumentParser.parse_args)),
    ]
    with stopping[0], stopping[1]:
        try:
            call(module, words)
        except Parsed as parsed:
            return parsed.value
    raise AssertionError(f"python -m {module} reads its command line neither by tyro nor by argparse")


def _stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_and_stop(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], argparse.ArgumentParser):
            args[0].allow_abbrev = False  # a page has whole names
        raise Parsed(parse(*args, **kwargs))

    return parse_and_stop


class Workshop:
    """Small things of every kind that commands read, made once."""

    def __init__(self, folder: Path, tokenizer: Any, think: Any) -> None:
        self.traces, self.run = folder / "traces.jsonl", folder / "run"
        write_traces(self.traces, make_traces(tokenizer, think, 6))
        problems = list(islice(draw_problems("train", seed=7), 6))
        rows = [{"question": each.question, "answer": each.answer} for each in problems]
        answered = [row | {"response": each.response} for row, each in zip(rows, problems, strict=True)]
        self.questions = write_rows(folder / "questions.jsonl", *rows)
        self.responses = write_rows(folder / "responses.jsonl", *answered)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(f"model_name_or_path: bundled:reasoner\ndata: {self.traces}\nmax_length: 512\n")
        words = ["--config", str(self.recipe), "--output_dir", str(self.run), "--max_steps", "2"]
        words += ["--eval_data", str(self.questions), "--max_eval_samples", "2", "--eval_budgets", "50%"]
        call("trsd.train", [*words, "--max_thinking_tokens", "240", "--max_answer_tokens", "24"])
        self.evaluation = self.run / "eval" / "before.json"
        self.folder = folder

    @cached_property
    def adapter(self) -> Path:
        """An adapter of the bundled reasoner, in peft's format."""
        peft = pytest.importorskip("peft")
        model = AutoModelForCausalLM.from_pretrained(REASONER)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(model, config).save_pretrained(self.folder / "adapter")
        return self.folder / "adapter"


class StandIn:
    """A command with what it reads put in its place, in the current folder."""

    def __init__(self, workshop: Workshop, module: str, words: Sequence[str]) -> None:
        self.workshop, self.module, self.words = workshop, module, list(words)
        for name, value in list(self.flags()):
            if name == "config":
                self._put_recipe(value)
        self.parsed = parse_as_written(module, words)

    def run(self) -> None:
        """Run it, in small."""
        for name, value in list(self.flags()):
            self._put(name, value)
        for word in self._positional():
            self._put_positional(word)
        self._limit()
        shapes = {name: _of_two_layers(make) for name, make in SHAPES.items()}
        with self._served(), patch.dict(SHAPES, shapes):
            call(self.module, self.words)

    def flags(self) -> Iterator[tuple[str, str]]:
        """(name, value) of the flags that have one, names with underscores."""
        for place, word in enumerate(self.words):
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                if not equals:
                    value = next(iter(self.words[place + 1 : place + 2]), "")
                yield name[2:].replace("-", "_"), value

    def replace(self, name: str, value: str) -> None:
        """Give the flag ``name`` another value, or add it."""
        for place, word in enumerate(self.words):
            spelled, equals, _ = word.partition("=")
            if word.startswith("--") and spelled[2:].replace("-", "_") == name:
                self.words[place : place + (1 if equals else 2)] = [spelled, value]
                return
        self.words += [f"--{name}", value]

    def _leave_out(self, name: str) -> None:
        if name in dict(self.flags()):
            self.replace(name, "")
            place = self.words.index(f"--{name}")
            del self.words[place : place + 2]

    def _positional(self) -> list[str]:
        return [word for word in self.words if not word.startswith("-")][: NUM_POSITIONAL.get(self.module, 0)]

    def _put_positional(self, word: str) -> None:
        if self.module == "trsd.report":
            put(self.workshop.run, word)
        elif self.module == "bench.compare":
            put(next((ROOT / "bench" / "results").glob("cpu-*.json")), word)
        else:
            put(self.workshop.evaluation, word if word.endswith(".json") else f"{word}/evaluation.json")

    def _put(self, name: str, value: str) -> None:
        if name in MODELS:
            for each in value.split(","):
                if not (self.module == "trsd.plan" and each in (*SHAPES, *TEACHER_KINDS)) and name != "teacher":
                    self._put_model(each)
        elif name in ("data", "eval_data"):
            traces = name == "data" and self.module in (*READ_RECIPES, "trsd.analyze")
            self.replace(name, self._put_data(value, traces=traces))
        elif name == "responses":
            put(self.workshop.responses, value)
        elif name == "compare":
            self._put_positional(value)
            self._put_positional(self.words[self.words.index(value) + 1])
        elif name == "texts":
            put(self.workshop.traces, value)
        elif name == "adapter":
            put(self.workshop.adapter, value)
        elif name == "gsm8k":
            for split in ("train", "test"):
                put(self.workshop.questions, f"{value}/{split}.jsonl")

    def _put_model(self, name: str) -> None:
        if not name.startswith(BUNDLED):
            put(REASONER, name)

    def _put_data(self, name: str, *, traces: bool) -> str:
        """Put rows where a data file is named; returns the file, which is another one for a data set of the hub."""
        if name.startswith(BUNDLED):
            return name
        if Path(name).suffix not in FILE_TYPES:
            of_the_hub = name.partition(":")[0]
            assert of_the_hub in BENCHMARKS or of_the_hub.count("/") == 1, f"{name}: no file, benchmark or OWNER/NAME"
            name = f"rows-of-the-hub-{'traces' if traces else 'questions'}.jsonl"
        put(self.workshop.traces if traces else self.workshop.questions, name)
        return name

    def _put_recipe(self, name: str) -> None:
        """The recipe of ``--config``, and what it names itself."""
        path = resolve_config(name)
        if path == Path(name):
            assert path.suffix in (".yaml", ".yml"), f"{name}: no file and no shipped recipe"
            put(self.workshop.recipe, name)
        recipe, said = load_recipe(path), {flag for flag, _ in self.flags()}
        for model in filter(None, (recipe.model_name_or_path, recipe.teacher_model_name_or_path)):
            self._put_model(model)
        if "data" not in said and not recipe.data.startswith(BUNDLED) and not Path(recipe.data).is_absolute():
            self.replace("data", self._put_data(recipe.data, traces=True))

    def _limit(self) -> None:
        """Lower what the command as it is written does too much of."""
        for name, value in FIXED.get(self.module, {}).items():
            self.replace(name, value)
        for name in FOR_RANKS if self.module in READ_RECIPES else ():
            self._leave_out(name)
        if dict(self.flags()).get("engine") == "vllm":  # which is not installed beside the tests
            self.replace("engine", "hf")
            self._leave_out("vllm_args")
        if self.module == "trsd.export" and "texts" not in dict(self.flags()):  # no name fits the bundled one
            put(self.workshop.traces, "texts.jsonl")
            self.words += ["--pre_tokenizer", "qwen2", "--texts", "texts.jsonl"]
        if self.module == "trsd.plan" or {"responses", "compare"} & dict(self.flags()).keys():
            return
        for name, most in (LIMITS | LOWERED).items():
            if hasattr(self.parsed, name):
                value = getattr(self.parsed, name)
                left_out = value is None and (name in LIMITS or name.endswith("_tokens"))
                if left_out or (value is not None and value > most):
                    self.replace(name, str(most))
        for name in ("budgets", "eval_budgets"):
            budgets = getattr(self.parsed, name, ())
            few = [
                text if text.endswith("%") else str(min(int(text), LOWERED["max_thinking_tokens"])) for text in budgets
            ]
            if few != list(budgets):
                self.replace(name, ",".join(dict.fromkeys(few)))

    @contextmanager
    def _served(self) -> Iterator[None]:
        """A server of this machine in the place of those that are named; what it writes are random tokens."""
        if "server" not in dict(self.flags()):
            yield
            return
        with FakeServer(max_model_len=2048) as server:
            self.replace("server", server.url)
            if hasattr(self.parsed, "close_unfinished"):
                self.replace("close_unfinished", "True")
            yield


def put(thing: Path, name: str) -> None:
    """A copy of ``thing`` at ``name`` in the current folder, unless something is there."""
    at = Path(name)
    if at.is_absolute() or ".." in at.parts:
        raise ValueError(f"{name}: documentation names what is below the folder one works in")
    if at.exists():
        return
    at.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if thing.is_dir() else shutil.copy)(thing, at)


def _of_two_layers(make: Callable[[], Any]) -> Callable[[], Any]:
    """A model's shape cut down to two layers: what a plan takes to make grows with them."""

    def shorter() -> Any:
        config = make()
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        return config

    return shorter
