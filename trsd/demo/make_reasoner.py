"""Train the bundled tiny reasoner from nothing: ``python -m trsd.demo.make_reasoner``.

A 1.7 M-parameter Qwen3 learns, from generated problems it never sees twice, to write a worked solution between
``<think>`` and ``</think>`` and then the answer. Cross-entropy on everything after the question, AdamW with warm-up and
cosine decay, bf16 autocast, weights kept in fp32. Seeded; the figures of the shipped copy are in its README.md.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trsd.demo.problems import Problem, draw_problems

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCAB_SIZE = 640
TOKENIZER_PROBLEMS = 4000
CONTEXT = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% else -%}
<think>
{% endif -%}
{%- endif -%}"""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, so any text round-trips and numbers are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = draw_problems("train", seed=seed)
    texts = (next(problems) for _ in range(TOKENIZER_PROBLEMS))
    chat = "system\nuser\nassistant\n\n\n"
    tokenizer.train_from_iterator((f"{p.question}\n{p.reasoning}\n{p.response}{chat}" for p in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model of the shipped shape."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, *, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (input_ids, labels), each [batch_size, length]; problems of similar length travel together."""
    problems = draw_problems("train", seed=seed)
    pool_batches = 16
    generator = torch.Generator().manual_seed(seed)
    while True:
        pool = [next(problems) for _ in range(batch_size * pool_batches)]
        rows = sorted(encode_rows(tokenizer, pool), key=lambda row: len(row[0]))
        for index in torch.randperm(pool_batches, generator=generator).tolist():
            part = rows[index * batch_size : (index + 1) * batch_size]
            length = max(len(ids) for ids, _ in part)
            input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
            labels = torch.full((batch_size, length), -100)
            for i, (ids, num_prompt) in enumerate(part):
                input_ids[i, : len(ids)] = torch.tensor(ids)
                labels[i, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
            yield input_ids, labels


def encode_rows(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[tuple[list[int], int]]:
    """(token ids, number of prompt tokens) of each problem in the model's chat format."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
        )
        for problem in problems
    ]
    rests = [f"{p.reasoning}\n</think>\n\n{p.response}{tokenizer.eos_token}" for p in problems]
    prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
    rest_ids = tokenizer(rests, add_special_tokens=False).input_ids
    return [(prompt + rest, len(prompt)) for prompt, rest in zip(prompt_ids, rest_ids, strict=True)]


def learning_rate_at(step: int, *, num_steps: int, peak: float, warmup_steps: int = 200) -> float:
    """Linear warm-up, then cosine decay to 2 % of ``peak``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[Tensor, Tensor]], *, num_steps: int, peak: float) -> None:
    """Train ``model`` in place, a printed line every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    start, seen = time.perf_counter(), 0
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps=num_steps, peak=peak)
        input_ids, labels = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += input_ids.numel()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}/{num_steps}  loss {loss.item():.4f}  {seconds:.0f} s  {seen / seconds:.0f} tokens/s",
                flush=True,
            )


def main(argv: list[str] | None = None) -> None:
    """Train the reasoner and write model, tokenizer and a record of how it was made."""
    parser = argparse.ArgumentParser(prog="python -m trsd.demo.make_reasoner", description=main.__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("reasoner"))
    parser.add_argument("--num_steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        sys.exit(f"error: {args.output_dir} exists already")

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = new_model(tokenizer)
    start = time.perf_counter()
    data = batches(tokenizer, batch_size=args.batch_size, seed=args.seed)
    train(model, data, num_steps=args.num_steps, peak=args.learning_rate)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    record = {
        "num_parameters": model.num_parameters(),
        "seed": args.seed,
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "training_minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__,
    }
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
