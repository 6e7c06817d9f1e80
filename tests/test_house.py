"""Rules of the house: who may import whom, what importing costs, and that what is shipped is complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_kernels_import_torch_alone():
    allowed = {"torch", "triton", "trsd_kernels"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        assert set(imports_of(path)) <= allowed, path


def test_the_trainer_imports_neither_tests_nor_bench():
    for path in (ROOT / "trsd").rglob("*.py"):
        assert not {"tests", "bench"} & set(imports_of(path)), path


def test_what_is_imported_is_declared():
    """In setup.py, as required or in an extra: what comes with something else can go with its next release."""
    named = re.findall(r'"([a-z][a-z0-9_-]*)(?:\[[a-z]+\])?>=', (ROOT / "setup.py").read_text())
    declared = {name.replace("_", "-") for name in named}
    called = {"yaml": "pyyaml", "pytorch_lightning": "lightning", "sympy": "math-verify"}  # whose numbers are sympy's
    for path in (ROOT / "trsd").rglob("*.py"):
        names = set(imports_of(path)) - set(sys.stdlib_module_names) - {"trsd", "trsd_kernels"}
        assert {called.get(name, name).replace("_", "-") for name in names} <= declared, path


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment or None, timeout=120
    )


def test_kernels_import_from_the_tree_without_transformers_or_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import trsd_kernels; "
        "assert not {'transformers', 'trsd', 'datasets'} & set(sys.modules); print(trsd_kernels.__file__)"
    )
    result = run_python(code, PYTHONPATH=".:kernels", PATH="/usr/bin")
    assert result.returncode == 0, result.stderr
    assert Path(ROOT / result.stdout.strip()).resolve().is_relative_to(ROOT / "kernels")


def test_the_trainer_imports_without_its_optional_packages():
    names = ["vllm", "flash_attn", "liger_kernel", "datasets", "pyarrow", "math_verify", "wandb", "kneed", "peft"]
    block = f"import sys; sys.modules.update(dict.fromkeys({names!r})); "
    result = run_python(
        block + "import trsd.training, trsd.evaluate, trsd.generate, trsd.report, trsd.sweep, trsd.analyze",
        PYTHONPATH=".:kernels",
    )
    assert result.returncode == 0, result.stderr


def test_gpu_tests_and_benchmarks_are_collected_where_only_torch_and_transformers_are_installed():
    names = ["tyro", "pyarrow", "datasets", "math_verify", "kneed", "peft", "scipy", "ruff"]
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark." + "gpu" in path.read_text()]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r})); import pytest; "
        f"sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider', 'bench', *{files!r}]))"
    )
    result = run_python(code, PYTHONPATH=".:kernels", PATH="/usr/bin:/bin")
    assert len(files) > 5 and result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("trsd", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_stay_short_and_say_what_they_are(path):
    assert len(path.read_text().splitlines()) <= 500
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_names_of_the_kernels_are_documented():
    import trsd_kernels

    assert all(getattr(trsd_kernels, name).__doc__ for name in trsd_kernels.__all__)


def test_importing_without_triton_says_nothing():
    block = "import sys; sys.modules.update(dict.fromkeys(['triton', 'triton.language', 'triton.runtime'])); "
    result = run_python(block + "import trsd_kernels")
    assert result.returncode == 0 and "Triton" not in result.stderr, result.stderr


@pytest.mark.parametrize("folder", ["kernels", "trsd", "bench"])
def test_what_is_taken_from_torch_is_there(folder):
    """Also in lines that only a GPU runs; ``torch.ops`` is filled when other modules are imported."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            while isinstance(node, ast.Attribute):
                names.insert(0, node.attr)
                node = node.value
            if names and names[0] != "ops" and isinstance(node, ast.Name) and node.id == "torch":
                found = torch
                for name in names:
                    found = getattr(found, name, None)
                    assert found is not None, f"{path}: torch.{'.'.join(names)}"
