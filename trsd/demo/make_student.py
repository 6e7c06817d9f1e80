"""Make the bundled student: the bundled reasoner with its third layer left out, ``python -m trsd.demo.make_student``.

Leaving out a layer and distilling what is left is how smaller models are made of larger ones (ShortGPT, arXiv
2403.03853; Minitron, arXiv 2407.14679). The student was trained in no other way: it still knows how its text goes and
can hardly calculate, which is what a base model is to a reasoner. It is whom the demos of LSP and fine-tuning train.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trsd.paths import resolve_bundled

LEFT_OUT = 2  # of the layers 0 to 3; without the second one, 1, the model no longer ends its thinking


def without_layer(model: PreTrainedModel, number: int) -> PreTrainedModel:
    """``model`` without its layer ``number``, in place."""
    layers, config = model.get_decoder().layers, model.config
    del layers[number]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    config.num_hidden_layers = len(layers)
    config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index != number]
    return model


def main(argv: list[str] | None = None) -> None:
    """Write the student's model folder, in bf16."""
    parser = argparse.ArgumentParser(prog="python -m trsd.demo.make_student", description=main.__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("student"))
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        sys.exit(f"error: {args.output_dir} exists already")
    folder = resolve_bundled("bundled:reasoner")
    model = without_layer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), LEFT_OUT)
    model.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(folder).save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
