"""One distribution, two packages: ``trsd`` (the trainer) and ``trsd_kernels`` (the kernels, usable alone)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
EVAL = ["math-verify>=0.8"]
ANALYSIS = ["kneed>=0.8"]
DATA = ["datasets>=4", "pyarrow>=17"]
LORA = ["peft>=0.19.1"]
LOWBIT = ["torchao>=0.15", "bitsandbytes>=0.49"]
TRL = ["trl>=1.16", "datasets>=4"]
LIGHTNING = ["lightning>=2.6"]
TRACKING = ["tensorboard>=2.18", "wandb>=0.19", "trackio>=0.2"]
TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.8",
    "build>=1.2",
    "triton>=3.6; platform_system == 'Linux'",
    *DATA,
    *EVAL,
    *ANALYSIS,
    *LORA,
    *LOWBIT,
    *TRL,
    *LIGHTNING,
    "tensorboard>=2.18",
    "gguf>=0.10",
]


def version() -> str:
    """``trsd.__version__``, read and not imported: nothing need be installed to build."""
    return re.search(r'^__version__ = "(.+)"$', (HERE / "trsd" / "__init__.py").read_text(), flags=re.MULTILINE)[1]


def description() -> str:
    """The README where it stands alone: without pictures and their captions, links into the repository as text."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n(?:\n\*(?!\*)(?:.+\n)+)?\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    name="trsd",
    version=version(),
    description="Distil reasoning language models from partial chains of thought, exactly, in little memory and time",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["trsd", "trsd.*"]), "trsd_kernels"],
    package_dir={"trsd_kernels": "kernels/trsd_kernels"},
    package_data={
        "trsd": [
            "py.typed",
            "recipes/*.yaml",
            "demo/reasoner/*",
            "demo/student/*",
            "demo/questions/*.jsonl",
            "lm_eval_tasks/*",
        ],
        "trsd_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=1.26",
        "httpx>=0.27",
        "huggingface_hub>=1",
        "pyyaml>=6",
        "tyro>=0.9",
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": sorted(set(TEST)),
        "bench": ["pytest>=8", "pytest-benchmark>=5"],
        "peers": ["trl>=1.16", "liger-kernel>=0.8.5", "fla-core>=0.6", "cut-cross-entropy>=25.1"],
        "trl": TRL,
        "lightning": LIGHTNING,
        "eval": EVAL,
        "analysis": ANALYSIS,
        "lm-eval": ["lm_eval[hf]>=0.4.13", *EVAL],
        "data": DATA,
        "gguf": ["gguf>=0.10", "sentencepiece>=0.2", "accelerate>=1"],
        "gsm": ["reasoning-gym>=0.1.20"],
        "vllm": ["vllm>=0.20"],
        "flash-attn": ["flash-attn>=2.7"],
        "lora": LORA,
        "lowbit": LOWBIT,
        "liger": ["liger-kernel>=0.8"],
        "tracking": TRACKING,
    },
    entry_points={"console_scripts": ["trsd=trsd.__main__:main", "trsd-train=trsd.__main__:train"]},
)
