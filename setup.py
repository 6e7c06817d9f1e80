"""One distribution, two packages: ``trsd`` (the trainer) and ``trsd_kernels`` (the kernels, usable alone)."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "pyarrow>=17",
    "math-verify>=0.8",
    "ruff>=0.8",
    "triton>=3.6; platform_system == 'Linux'",
    "kneed>=0.8",
    "peft>=0.19.1",
    "torchao>=0.15",
    "bitsandbytes>=0.49",
]
EVAL = ["math-verify>=0.8"]
ANALYSIS = ["kneed>=0.8"]

setup(
    name="trsd",
    version="0.1.0",
    description="Distil reasoning language models from partial chains of thought, exactly, in little memory and time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["trsd", "trsd.*"]), "trsd_kernels"],
    package_dir={"trsd_kernels": "kernels/trsd_kernels"},
    package_data={
        "trsd": ["recipes/*.yaml", "demo/reasoner/*", "demo/student/*", "demo/questions/*.jsonl", "lm_eval_tasks/*"]
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyyaml>=6",
        "tyro>=0.9",
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "bench": ["pytest>=8", "pytest-benchmark>=5"],
        "peers": ["trl>=1.16", "liger-kernel>=0.8.5", "fla-core>=0.6", "cut-cross-entropy>=25.1"],
        "eval": EVAL,
        "analysis": ANALYSIS,
        "lm-eval": ["lm_eval[hf]>=0.4.13", *EVAL],
        "data": ["datasets>=4", "pyarrow>=17"],
        "gguf": ["gguf>=0.10", "sentencepiece>=0.2", "accelerate>=1"],
        "gsm": ["reasoning-gym>=0.1.20"],
        "vllm": ["vllm>=0.20"],
        "flash-attn": ["flash-attn>=2.7"],
        "lora": ["peft>=0.19.1"],
        "lowbit": ["torchao>=0.15", "bitsandbytes>=0.49"],
        "liger": ["liger-kernel>=0.8"],
        "tracking": ["tensorboard>=2.18", "wandb>=0.19", "trackio>=0.2"],
    },
    entry_points={"console_scripts": ["trsd-train=trsd.train:main"]},
)
