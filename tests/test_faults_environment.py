"""What else is installed, and what is not; and that docs/faults.md names a test for every fault."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"


def run_python(code, *words, cwd=ROOT, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"} | environment
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


# 32: Hugging Face's package of the name of our folder


@pytest.fixture
def hub_kernels(tmp_path):
    """A folder with an installed ``kernels`` of the version transformers wants, with every name it may import."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        f"__version__ = {KERNELS_MIN_VERSION!r}\n"
        "class _Any:\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def __call__(self, *a, **k): return lambda thing: thing\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return type(name, (_Any,), {}) if name[0].isupper() else _Any()\n"
    )
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return folder


BESIDE = """
import kernels
assert kernels.__file__.startswith({folder!r}), kernels.__file__
from transformers.utils import is_kernels_available
assert is_kernels_available()
from transformers import LlamaConfig, LlamaForCausalLM
import trsd_kernels, trsd.models, torch
model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1))
assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
assert "kernels/trsd_kernels" in trsd_kernels.__file__.replace("\\\\", "/")
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_fault_32_the_hubs_kernels_package_is_not_shadowed_by_our_folder(hub_kernels, first):
    """Started at the repository root, whose ``kernels`` folder Python would take for a package if it were one."""
    folders = [str(ROOT), str(ROOT / "kernels")]
    path = [*folders, str(hub_kernels)] if first == "ours" else [str(hub_kernels), *folders]
    result = run_python(BESIDE.format(folder=str(hub_kernels)), PYTHONPATH=":".join(path))
    assert result.returncode == 0, result.stderr[-2000:]


def test_fault_32_without_the_hubs_package_our_folder_is_not_taken_for_it():
    code = (
        "from transformers.utils import is_kernels_available; assert not is_kernels_available(); "
        "from transformers import LlamaForCausalLM; import trsd_kernels"
    )
    if subprocess.run([sys.executable, "-c", "import importlib.metadata as m; m.version('kernels')"]).returncode == 0:
        pytest.skip("Hugging Face's kernels package is installed")
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture
def real_hub_kernels():
    """The folder in which Hugging Face's own package is installed."""
    try:
        return str(distribution("kernels").locate_file(""))
    except PackageNotFoundError:
        pytest.skip("Hugging Face's kernels package is not installed")


BESIDE_THE_REAL_ONE = """
import sys
from pathlib import Path
import kernels
assert callable(kernels.get_kernel) and Path(kernels.__file__).is_relative_to({folder!r}), kernels.__file__
from trsd import train
train.main(sys.argv[1:])
assert Path(sys.modules["trsd_kernels"].__file__).is_relative_to({ours!r})
assert sys.modules["kernels"] is kernels
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_fault_32_a_run_trains_beside_the_hubs_real_kernels_package(real_hub_kernels, words, tmp_path, first):
    """From the repository root, as ``fault_32`` above with its stand-in; a model from transformers is part of it."""
    folders, inherited = [str(ROOT), str(ROOT / "kernels")], os.environ.get("PYTHONPATH", "").split(":")
    path = [*folders, *inherited] if first == "ours" else [real_hub_kernels, *inherited, *folders]
    code = BESIDE_THE_REAL_ONE.format(folder=real_hub_kernels, ours=str(ROOT / "kernels"))
    result = run_python(code, *words("run", max_steps=1, branches_per_trace=2), PYTHONPATH=":".join(filter(None, path)))
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


# 33: neither triton nor a GPU

WITHOUT_TRITON = """
import sys
sys.modules.update(dict.fromkeys(["triton", "triton.language", "triton.runtime"]))
import torch
torch.cuda.is_available = lambda: False
from trsd import train
train.main(sys.argv[1:])
"""


def test_fault_33_a_run_trains_without_triton_and_without_a_gpu(words, tmp_path):
    result = run_python(WITHOUT_TRITON, *words("run", max_steps=1, branches_per_trace=2), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoint-1").is_dir() and "riton" not in result.stderr


def test_fault_33_what_is_missing_is_named_where_it_is_asked_for(words, tmp_path):
    result = run_python(WITHOUT_TRITON, *words("run", attn_implementation="triton"), cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "attn_implementation" in result.stderr and "triton is not installed" in result.stderr


# The table


def faults_tested(path):
    """Numbers that the names of a file's test functions carry."""
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {int(found[1]) for name in names if (found := re.match(r"test_fault_(\d\d)_", name))}


def rows_of_the_table():
    """{number: its row} of docs/faults.md."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    return {int(found[1]): found[0] for found in re.finditer(r"^\| (\d+) \|.*$", text, flags=re.MULTILINE)}


def test_every_fault_is_in_the_table():
    assert list(rows_of_the_table()) == list(range(1, 35))


@pytest.mark.parametrize("number", range(1, 35))
def test_the_files_that_the_table_names_hold_a_test_of_the_fault(number):
    named = re.findall(r"`(test_\w+\.py)`", rows_of_the_table()[number])
    own = [TESTS / name for name in named if name.startswith("test_faults_")]
    others = [TESTS / name for name in named if not name.startswith("test_faults_")]
    assert own and all(path.exists() for path in others), named
    if all(path.exists() for path in own):
        assert any(number in faults_tested(path) for path in own), f"no test_fault_{number:02}_... in {own}"
