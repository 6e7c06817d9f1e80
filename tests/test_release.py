"""What a release consists of: version and papers, public names, and that wheel and sdist hold all they need."""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import fields
from email import message_from_string
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
import yaml

import trsd
import trsd_kernels
from trsd.traces import Trace
from trsd_kernels.vocab_parallel import vocab_parallel_distillation

ROOT = Path(__file__).parent.parent
FOLDERS = ("trsd", "kernels", "tests", "bench", "docs", ".ci")
JUNK = ignore_patterns("__pycache__", ".benchmarks", "*.trace.json")
PAPERS = {"2603.13274", "2512.21002", "2601.10064"}  # TRSD, LSP, P-ALIGN
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, folder, **environment):
    """A command that has to succeed, where nothing of the repository is on the path; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment
    command = [str(word) for word in command]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


# Version, licence, changes, citation


def changes():
    """(version, date) of every entry of the changelog, the newest first."""
    return re.findall(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", text_of("CHANGELOG.md"), flags=re.MULTILINE)


def test_the_newest_change_and_the_citation_are_of_this_version_and_one_date():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert changes()[0] == (trsd.__version__, str(citation["date-released"]))
    assert citation["version"] == trsd.__version__


def test_the_version_is_written_in_one_python_file():
    written = [path.name for path in (ROOT / "trsd").rglob("*.py") if f'"{trsd.__version__}"' in path.read_text()]
    assert written == ["__init__.py"] and trsd.__version__ not in text_of("setup.py") + text_of("pyproject.toml")


def test_changes_have_the_sections_that_keep_a_changelog_knows():
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert set(re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), flags=re.MULTILINE)) <= known


def test_the_licence_is_the_whole_text_of_apache_2():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_citation_names_the_papers_of_the_methods_and_their_authors():
    references = yaml.safe_load(text_of("CITATION.cff"))["references"]
    assert {each["url"].rsplit("/", 1)[-1] for each in references} == PAPERS
    for each in references:
        assert each["type"] == "article" and each["title"] and all(who["family-names"] for who in each["authors"])


def test_the_citation_has_the_keys_that_its_format_asks_for():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"


# Public names


def public_functions():
    """(name, function) of everything public that can be called, the methods of public classes too."""
    named = {name: getattr(trsd_kernels, name) for name in trsd_kernels.__all__}
    for name, thing in (named | {"vocab_parallel_distillation": vocab_parallel_distillation}).items():
        if inspect.isfunction(thing):
            yield name, thing
            continue
        for inner, each in vars(thing).items():
            function = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
            ours = inspect.isfunction(function) and function.__module__.startswith("trsd_kernels")
            if ours and (inner == "__init__" or not inner.startswith("_")):
                yield f"{name}.{inner}", function


@pytest.mark.parametrize("name,function", [pytest.param(*each, id=each[0]) for each in public_functions()])
def test_a_public_function_has_a_docstring_and_full_annotations(name, function):
    if not name.endswith("__init__"):
        assert inspect.getdoc(function)
    signature = inspect.signature(function)
    bare = [
        each.name for each in signature.parameters.values() if each.annotation is each.empty and each.name != "self"
    ]
    assert not bare and signature.return_annotation is not signature.empty, f"{name} lacks annotations: {bare}"


@pytest.mark.parametrize("name", trsd_kernels.__all__)
def test_a_public_name_is_documented_and_on_the_page_of_public_names(name):
    thing = getattr(trsd_kernels, name)
    made = f"{name}(" if inspect.isclass(thing) else ""  # what dataclasses write themselves
    assert thing.__doc__ and not (made and thing.__doc__.startswith(made))
    assert f"`{name}`" in text_of("docs/api.md")


def test_the_page_of_public_names_lists_the_fields_of_a_trace():
    assert all(f"`{entry.name}`" in text_of("docs/api.md") for entry in fields(Trace) if entry.name != "tokenizer")


def test_the_file_for_type_checkers_takes_every_public_name():
    tree = ast.parse(text_of("tests/typed_user.py"))
    taken = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert set(trsd_kernels.__all__) <= taken


IMPORTING = """
import time, torch
first = time.process_time()
import trsd_kernels
print(first, time.process_time() - first)
"""


def test_importing_the_kernels_takes_less_than_twice_as_long_as_importing_torch():
    """1.1 s beside 0.9 s on a CPU machine, most of it what torch's custom operators import; the bound is two seconds.

    Of processor time, and of three attempts the best: other processes make it longer, none makes it shorter.
    """
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    shares = []
    while len(shares) < 3 and not (shares and shares[-1] < 1.8):
        torchs, ours = map(float, run(sys.executable, "-c", IMPORTING, folder=ROOT, PYTHONPATH=path).split())
        shares.append(ours / torchs)
    assert shares[-1] < 1.8, shares


# Wheel and sdist

BUILD = """
import sys
sys.modules.update(dict.fromkeys(["torch", "numpy", "yaml"]))  # not there where a wheel is built
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository in which somebody has worked."""
    pytest.importorskip("setuptools", minversion="70.1")
    folder = tmp_path_factory.mktemp("release") / "tree"
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            copytree(ROOT / name, folder / name, ignore=JUNK)
    for path in ROOT.iterdir():
        if path.is_file() and path.name not in (".git", ".gitignore", "PKG-INFO", "setup.cfg"):
            (folder / path.name).write_bytes(path.read_bytes())
    for name in ("runs/a/metrics.jsonl", ".venv/pyvenv.cfg", "trsd/__pycache__/cuts.cpython-311.pyc", "bench/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def sdist(tree):
    run(sys.executable, "-c", BUILD, "build_sdist", tree.parent, folder=tree)
    [path] = tree.parent.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def unpacked(sdist):
    """The folder of the sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked):
    """Built from the sdist, as an index's users get it."""
    run(sys.executable, "-c", BUILD, "build_wheel", unpacked.parent, folder=unpacked)
    [path] = unpacked.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder into which the wheel was installed, its scripts in ``bin``."""
    folder = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    run(*command, folder=wheel.parent)
    return folder


def files_in(folder, within=""):
    """Names of all files of ``within``, from ``folder`` on, without what Python and people leave there."""
    paths = (path for path in (folder / within).rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return {name for name in names if not re.search(r"__pycache__|\.pyc$|\.benchmarks|\.trace\.json$", name)}


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    information = {name for name in names if name.startswith(f"trsd-{trsd.__version__}.dist-info/")}
    assert names - information == files_in(ROOT, "trsd") | files_in(ROOT / "kernels", "trsd_kernels")
    for wanted in ("trsd/py.typed", "trsd_kernels/py.typed", "trsd/demo/student/model.safetensors"):
        assert wanted in names
    assert any(name.endswith("/LICENSE") for name in information)


def test_the_sdist_holds_what_building_and_testing_need_and_no_junk(unpacked):
    made = {"PKG-INFO", "setup.cfg"}
    folders = [name for name in FOLDERS if (ROOT / name).is_dir()]
    wanted = set().union(*(files_in(ROOT, folder) for folder in folders))
    files = {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "CITATION.cff"}
    files |= {"constraints.txt", "constraints-oldest.txt", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    wanted |= files
    inside = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in inside if not name.startswith(("trsd.egg-info/", "build/"))} - made == wanted


@pytest.fixture
def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_string(archive.read(name).decode())


def test_metadata_has_the_version_the_licence_and_the_bounds(metadata):
    assert (metadata["Version"], metadata["License"]) == (trsd.__version__, "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"torch>=2.11", "transformers>=5.17"} <= set(metadata.get_all("Requires-Dist"))


def test_the_description_stands_without_the_repository(metadata):
    """An index shows the README, from where relative links and pictures lead nowhere."""
    text = metadata.get_payload()
    assert text.startswith("# trsd\n") and "## The kernels in your own trainer" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "![" not in text and "before and after 150 steps of TRSD" not in text


def test_what_the_tests_need_is_in_the_tested_set(metadata):
    """``constraints.txt`` holds a version of everything that the extra ``test`` names."""
    tested = {line.partition("==")[0].lower().replace("_", "-") for line in text_of("constraints.txt").splitlines()}
    of_extra = [
        re.match(r"[\w.-]+", each)[0].lower()
        for each in metadata.get_all("Requires-Dist")
        if each.endswith('extra == "test"')
    ]
    assert {"trl", "lightning", "datasets", "tensorboard", "build"} <= set(of_extra) <= tested


def test_the_oldest_versions_are_the_lower_bounds(metadata):
    """``make test-oldest`` runs what setup.py promises of torch, with the Triton that this torch pins."""
    oldest = dict(line.split("==") for line in text_of("constraints-oldest.txt").splitlines() if line[:1] != "#")
    tested = dict(line.split("==") for line in text_of("constraints.txt").splitlines() if line[:1] != "#")
    assert f"torch>={oldest['torch'].removesuffix('.0')}" in metadata.get_all("Requires-Dist")
    assert set(oldest) == {"torch", "triton", "numpy"} and all(oldest[name] != tested[name] for name in oldest)


def test_what_the_demo_needs_is_nothing_that_only_tests_do(metadata):
    always = {re.match(r"[\w.-]+", each)[0] for each in metadata.get_all("Requires-Dist") if "extra ==" not in each}
    assert not always & {"trl", "lightning", "datasets", "tensorboard", "build", "pytest", "pyarrow", "peft", "triton"}


def test_the_installed_wheel_imports_outside_the_repository(installed, tmp_path):
    code = "import trsd, trsd_kernels.options, sys; print(trsd.__file__, trsd_kernels.__file__, *sys.modules)"
    files = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed)).split()
    assert files[:2] == [str(installed / name / "__init__.py") for name in ("trsd", "trsd_kernels")]
    assert "transformers" not in files


@pytest.mark.parametrize("script", [["trsd", "train"], ["trsd-train"]], ids=" ".join)
def test_a_script_of_the_installed_wheel_finds_the_bundled_recipe(installed, tmp_path, script):
    command = [sys.executable, installed / "bin" / script[0], *script[1:], "--dry_run"]
    recipe = yaml.safe_load(run(*command, folder=tmp_path, PYTHONPATH=str(installed)))
    assert recipe["eval_data"] == "bundled:questions/evaluation.jsonl"


@pytest.mark.slow
def test_the_demo_runs_from_the_installed_wheel(installed, tmp_path):
    words = ["--max_train_samples", "8", "--max_eval_samples", "4", "--max_steps", "2", "--eval_budgets", "50%"]
    printed = run(
        *(sys.executable, installed / "bin" / "trsd", "train", *words, "--train_batch_size", "4"),
        *("--output_dir", tmp_path / "run"),
        folder=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert (tmp_path / "run" / "report.html").exists() and "unconstrained accuracy" in printed


@pytest.mark.slow
def test_tests_run_from_the_sdist(unpacked):
    files = ["tests/test_recipe.py", "tests/test_layout.py", "tests/test_traces.py"]
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, folder=unpacked)


@pytest.mark.slow
def test_the_command_of_the_package_build_makes_the_same_files(tree, wheel, sdist, tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, tree, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {wheel.name, sdist.name}
    assert set(zipfile.ZipFile(tmp_path / wheel.name).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_a_type_checker_reads_the_annotations_of_the_installed_wheel(wheel, tmp_path):
    """In an environment that has the wheel where packages are, so that only ``py.typed`` makes it be read."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    (tmp_path / "user.py").write_text(text_of("tests/typed_user.py"))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", tmp_path / "venv" / "bin" / "python"]
    mypy = str(Path(importlib.util.find_spec("mypy").origin).parent.parent)
    run(*command, "user.py", folder=tmp_path, PYTHONPATH=mypy)
