"""Everything in the documentation that can be run is run; of the rest a table says why not, and what is tested instead.

Pages are all Markdown files of the repository. ``stand_ins.py`` says how commands run in small.
"""

import ast
import contextlib
import importlib.util
import io
import json
import linecache
import re
import subprocess
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from documentation import ROOT, Command, anchors, blocks, commands_of, links, name_of, pages, read, spans
from stand_ins import StandIn, Workshop
from torch.distributed.run import get_args_parser

from trsd.recipe import Recipe
from trsd.recipe_file import RECIPES, load_recipe

LANGUAGES = {"bash", "python", "yaml", "json", "text", ""}
PYTHON = {"python", "python3", ".venv/bin/python"}

# Commands that are not run: their beginning, why, and what is tested instead.
NOT_RUN = {
    "make": ("they install, or run everything: continuous integration does", "the target is in the Makefile"),
    "pip install": ("it needs a network", "the extras are in setup.py, the files exist"),
    "python -m pip install": ("it needs a network", "the extras are in setup.py, the files exist"),
    "git clone": ("it needs a network", "nothing"),
    "cd": ("each command has a folder of its own here", "nothing"),
    "python -m pytest": ("continuous integration runs the tests", "the files exist"),
    "python -m venv": ("the interpreter's own", "nothing"),
    "vllm serve": (
        "vLLM is not installed beside the tests",
        "its flags are known; test_vllm_engine.py serves and asks",
    ),
    "llama-server": ("llama.cpp is not installed beside the tests", "test_export.py asks it where it is"),
    "curl": ("there is no server", "test_vllm_engine.py waits for one's health and asks it"),
}
# What only the shell does; a block is held to `bash -n`.
LOOPS = ("for", "while", "until", "if")
SHELL = {*LOOPS, "export", "sleep", "seq", "wait", "kill", "jobs", "head", "ls", "scontrol"}
LAUNCHERS = {"srun", "nohup", "time", "exec"}
# What `vllm serve` takes, of vLLM's own documentation.
VLLM_SERVE = {"--port", "--max-model-len", "--served-model-name", "--tensor-parallel-size", "--dtype"}
VLLM_SERVE |= {"--generation-config", "--reasoning-parser", "--reasoning-config"}
# Flags of other programs that prose names: SLURM's, vLLM's, llama.cpp's.
OTHERS_FLAGS = {"--signal", "--generation-config", "--reasoning-budget"}
# Longer than two seconds or so even in small; they are parsed in the fast tests, which run one of the plans.
SLOW = ("bench.error_table", "bench.predict", "trsd.sweep", "trsd.demo.make_reasoner")
COMPILING = {"--compile", "--compiled"}
SLOW_PAGES = {"docs/integrations.md"}  # it imports and runs every trainer
OPTIONAL = {"trl", "lightning", "datasets", "peft", "openai", "vllm", "wandb", "trackio", "tensorboard", "accelerate"}
OPTIONAL |= {"liger_kernel", "math_verify", "bitsandbytes", "torchao", "pyarrow", "httpx", "kernels", "llama_cpp"}


def shell_commands():
    """Every command of every bash block once, however often it is written."""
    found = {}
    for block in blocks("bash"):
        for command in commands_of(block.text, block.place):
            found.setdefault(command.words, command)
    return list(found.values())


def ours(command):
    """(module, words) of a command of this repository, behind whatever launches it; None of another."""
    words = list(command.words)
    while words and words[0] in LAUNCHERS:
        words.pop(0)
    if words[:1] == ["trsd-train"]:
        return "trsd.train", words[1:]
    if words and words[0] in (*PYTHON, "torchrun") and "-m" in words:
        place = words.index("-m")
        if place + 1 < len(words) and words[place + 1].split(".")[0] in ("trsd", "bench"):
            return words[place + 1], words[place + 2 :]
    return None


def is_slow(command):
    module, words = ours(command)
    one_of_the_plans = module == "trsd.plan" and not command.place.startswith("README.md")
    return module in SLOW or one_of_the_plans or not COMPILING.isdisjoint(words)


def named(items, place=lambda item: item.place, text=lambda item: item.text):
    return [pytest.param(item, id=f"{place(item)} {text(item)[:60]}") for item in items]


OURS = [command for command in shell_commands() if ours(command)]
OTHERS = [command for command in shell_commands() if not ours(command)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tokenizer, think):
    return Workshop(tmp_path_factory.mktemp("workshop"), tokenizer, think)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; benchmarks keep their results there, and random numbers stay as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRSD_BENCH_RESULTS", str(tmp_path))
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


# Commands


@pytest.mark.parametrize("command", named(OURS))
def test_a_command_is_parsed_as_it_is_written(command, workshop, folder):
    StandIn(workshop, *ours(command))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, id=f"{each.place} {each.text[:60]}", marks=[pytest.mark.slow] * is_slow(each))
        for each in OURS
    ],
)
def test_a_command_runs_in_small(command, workshop, folder):
    StandIn(workshop, *ours(command)).run()


@pytest.mark.parametrize("command", named([each for each in OURS if "torchrun" in each.words]))
def test_what_launches_a_command_takes_its_flags(command):
    parser = get_args_parser()
    parser.allow_abbrev = False
    assert parser.parse_args(command.words[command.words.index("torchrun") + 1 :]).module


def kind_of(command):
    """The line of NOT_RUN that a command of another program is in."""
    return next((begin for begin in NOT_RUN if f"{plain(command)} ".startswith(f"{begin} ")), None)


def plain(command):
    words = [word for word in command.words if word not in LAUNCHERS]
    return " ".join(["python", *words[1:]] if words and words[0] in PYTHON else words)


@pytest.mark.parametrize("command", named(OTHERS))
def test_a_command_of_another_program_is_in_the_table_of_those_that_are_not_run(command):
    assert command.words[0] in SHELL or kind_of(command), f"{command.place}: neither run nor in a table: {command.text}"


@pytest.mark.parametrize("command", named([each for each in OTHERS if kind_of(each) == "make"]))
def test_make_has_the_target_and_the_variables(command):
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        variable, equals, _ = word.partition("=")
        pattern = rf"\$[({{]{variable}[)}}]" if equals else rf"^{word}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), word


def distribution():
    """The arguments of setup() in setup.py."""
    from unittest.mock import patch

    with patch("setuptools.setup") as setup:
        path = str(ROOT / "setup.py")
        exec(compile((ROOT / "setup.py").read_text(), path, "exec"), {"__file__": path, "__name__": "setup"})
    return setup.call_args.kwargs


@pytest.mark.parametrize(
    "command", named([each for each in OTHERS if kind_of(each) in ("pip install", "python -m pip install")])
)
def test_what_is_installed_is_there(command):
    extras = distribution()["extras_require"]
    known = {re.split(r"[\[<>=; ]", requirement)[0] for each in extras.values() for requirement in each}
    words = list(command.words[command.words.index("install") + 1 :])
    while words:
        word = words.pop(0)
        if word in ("-c", "-r", "--constraint"):
            assert (ROOT / words.pop(0)).is_file()
        elif not word.startswith("-"):
            name, chosen = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", word).groups()
            assert name in {".", "trsd", *known}, word
            assert name not in (".", "trsd") or set((chosen or "test").split(",")) <= set(extras), word


@pytest.mark.parametrize("command", named([each for each in OTHERS if kind_of(each) == "python -m pytest"]))
def test_files_of_tests_exist(command):
    files = [word.partition("::")[0] for word in command.words[3:] if not word.startswith("-")]
    assert all((ROOT / file).exists() for file in files if "/" in file), files


@pytest.mark.parametrize("command", named([each for each in OTHERS if kind_of(each) == "vllm serve"]))
def test_flags_of_vllm_are_known(command):
    assert {word.partition("=")[0] for word in command.words if word.startswith("-")} <= VLLM_SERVE


@pytest.mark.parametrize("block", named(blocks("bash"), text=lambda block: ""))
def test_a_block_is_good_shell(block):
    result = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Python


def statements_of(page):
    """(statement, what its comment says it prints or None) of a page's Python, with line numbers of the page."""
    for block in blocks("python", of=page):
        source = "\n" * (block.line - 1) + block.text
        lines = source.splitlines()
        for node in ast.parse(source, filename=block.place).body:
            claim = None
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func) == "print"
            ):
                _, _, comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
                claim = comment.strip() or None
            yield node, claim


def said(claim, printed):
    """Whether ``printed`` is what a comment claims, in which ``...`` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in claim.split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", " ".join(printed.split()), flags=re.DOTALL)


PAGES_WITH_PYTHON = [page for page in pages() if blocks("python", of=page)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW_PAGES))
        for page in PAGES_WITH_PYTHON
    ],
)
def test_python_of_a_page_runs_and_prints_what_it_says(page, folder):
    nodes = list(statements_of(page))
    tree = ast.Module([node for node, _ in nodes], [])
    missing = sorted(name for name in imported(tree) & OPTIONAL if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    linecache.cache[name_of(page)] = (0, None, page.read_text().splitlines(keepends=True), name_of(page))
    namespace = {"__name__": "documentation"}
    for node, claim in nodes:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module([node], []), name_of(page), "exec"), namespace)
        if claim:
            assert said(claim, printed.getvalue()), f"{name_of(page)}:{node.lineno} prints {printed.getvalue()!r}"


def imported(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# YAML, JSON, and what is written between backticks


@pytest.mark.parametrize("block", named(blocks("yaml"), text=lambda block: ""))
def test_yaml_parses_and_recipes_are_recipes(block, folder):
    values = yaml.safe_load(block.text)
    if isinstance(values, dict) and set(values) & {"base", *FIELDS}:
        (folder / "recipe.yaml").write_text(block.text)
        assert load_recipe(folder / "recipe.yaml").problems() == []


@pytest.mark.parametrize("block", named(blocks("json"), text=lambda block: ""))
def test_json_parses(block):
    for line in block.text.splitlines() if block.text.count("\n{") else [block.text]:
        json.loads(line)


FIELDS = {entry.name for entry in fields(Recipe)}
CHOICES = {
    name: set(get_args(kind)) or {each for part in get_args(kind) for each in get_args(part)}
    for name, kind in get_type_hints(Recipe).items()
}


def flags():
    """Every flag of ours, of torchrun and of vLLM."""
    found = {"--config", "--dry_run", "--help", *VLLM_SERVE, *(f"--{name}" for name in FIELDS)}
    found |= {option for action in get_args_parser()._actions for option in action.option_strings}
    for path in [path for folder in ("trsd", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:add_argument|addoption)\(\s*\"(--[\w-]+)\"", source))
        for node in ast.walk(ast.parse(source)) if "Arguments" in source else ():
            if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
                found |= {f"--{each.target.id}" for each in node.body if isinstance(each, ast.AnnAssign)}
    return found


def test_flags_between_backticks_are_flags_of_a_command():
    known = flags() | OTHERS_FLAGS
    written = {
        (flag, where)
        for page in pages()
        for where, text in spans(page)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    }
    assert not sorted((where, flag) for flag, where in written if flag not in known)


def commands_between_backticks():
    """Commands of ours in prose, and in the comments of the shipped recipes; ``...`` in them is left out."""
    found = []
    for where, text in (each for page in pages() for each in spans(page)):
        found += commands_of(text, where) if "-m trsd." in text or "-m bench." in text else []
    for path in sorted(RECIPES.glob("*.yaml")):
        comments = re.findall(r"^#   (python -m (?:.*\\\n#)*.*)$", path.read_text(), flags=re.MULTILINE)
        for text in comments:
            found += commands_of(re.sub(r"\\\n#\s*", "", text), f"trsd/recipes/{path.name}")
    kept = [Command(each.place, tuple(word for word in each.words if word != "...")) for each in found]
    return [each for each in kept if ours(each)]


@pytest.mark.parametrize("command", named(commands_between_backticks()))
def test_a_command_in_prose_is_there_and_parsed_as_it_is_written(command, workshop, folder):
    module, words = ours(command)
    assert importlib.util.find_spec(module), f"{command.place}: no {module}"
    if words:  # without any it names the command
        StandIn(workshop, module, words)


@pytest.mark.parametrize("page", named(pages(), place=name_of, text=lambda page: ""))
def test_settings_between_backticks_have_values_that_there_are(page):
    """``--optim adamw_torch_8bit`` and ``cut: judged``: the choices of a recipe's fields."""
    for where, text in spans(page):
        for name, value in re.findall(r"(?:^|\s)(?:--)?(\w+)(?:: | |=)([\w.%-]+)", text):
            choices = {each for each in CHOICES.get(name, ()) if isinstance(each, str)}
            if choices and (f"--{name}" in text or f"{name}: " in text):
                assert value in choices, f"{where}: `{text}`: {name} is one of {', '.join(sorted(choices))}"


# Pages


@pytest.mark.parametrize("page", named(pages(), place=name_of, text=lambda page: ""))
def test_every_block_is_of_a_known_language_and_commands_are_in_bash_blocks(page):
    found, prose = read(page)
    for block in found:
        assert block.language in LANGUAGES, f"{block.place}: a fence of {block.language!r}"
        if block.language in ("text", ""):
            assert not COMMAND.search(block.text), f"{block.place}: a command that nothing would run: ```bash"
    assert not re.search(r"^ {4,}" + COMMAND.pattern[1:], prose, flags=re.MULTILINE), "an indented command: ```bash"


COMMAND = re.compile(r"^(?:python -m |torchrun |make \w+$|pip install |\$ )", flags=re.MULTILINE)


@pytest.mark.parametrize("page", named(pages(), place=name_of, text=lambda page: ""))
def test_links_of_a_page_resolve(page):
    for where, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{where}: nothing at {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{where}: no heading {anchor} in {name_of(file)}"


def test_every_page_of_the_documentation_is_in_its_index():
    index = ROOT / "docs" / "README.md"
    targets = {(index.parent / target.partition("#")[0]).resolve() for _, target in links(index)}
    assert {page for page in pages() if page.parent == index.parent and page != index} <= targets


def test_figures_of_the_front_page_stand_on_the_page_of_results():
    """Of the README's table of the loss: ratio of times, and memory, in one row of bench/RESULTS.md."""
    front, results = ((ROOT / name).read_text() for name in ("README.md", "bench/RESULTS.md"))
    measured = [tuple(line.split(" | ")) for line in results.splitlines() if line.count(" | ") == 10]
    rows = re.findall(r"^\| .+ \| ([\d.]+) times \| (?:([\d.]+) GiB|not counted) \|$", front, flags=re.MULTILINE)
    assert len(rows) == 5
    for ratio, gib in rows:
        assert any((line[3], line[5]) == (ratio, gib or "-") for line in measured), (ratio, gib)
