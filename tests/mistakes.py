"""The most likely mistakes: what is typed, and what comes of it. tests/test_mistakes.py makes them all, and holds
docs/troubleshooting.md to the same messages. Those in models, data and settings are in mistakes_in_input.py."""

import errno
from pathlib import Path

import torch
from mistake import (
    GENERATE,
    SHORT,
    SMALL,
    TINY,
    TRACES,
    Mistake,
    broken_compiler,
    memory_of,
    raising,
    read_only,
    without,
    without_compiler,
    without_fp8_products,
)
from mistakes_in_input import DATA, MODELS, SETTINGS

from trsd.run import alone_in

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.9 GiB memory in use."
)

FOLDERS = [
    Mistake(
        "an output folder in use for something else",
        f"train {TINY} --output_dir tiny",
        "error: output_dir … already holds other files, such as …: choose another one, which need not exist yet",
    ),
    Mistake(
        "an output folder of a finished run",
        f"train {TRACES} --output_dir done",
        "error: output_dir … already holds a run: choose another one, or go on with it by --resume_from_checkpoint "
        "latest",
    ),
    Mistake(
        "going on with another recipe",
        f"train {TRACES} --output_dir done --resume_from_checkpoint latest --learning_rate 1e-3",
        "error: cannot resume … with another recipe (…: … -> …): start a new output_dir",
    ),
    Mistake(
        "going on with what was never begun",
        f"train {TINY} --resume_from_checkpoint checkpoint-9",
        "error: output_dir … holds no run to resume",
    ),
    Mistake(
        "going on with a checkpoint that is not there",
        f"train {TRACES} --output_dir done --resume_from_checkpoint checkpoint-9",
        "error: no checkpoint at …; … has […]",
    ),
    Mistake(
        "two runs in one folder",
        f"train {TINY}",
        "error: another process works in output_dir …: choose another one, or wait until it has ended",
        prepare=lambda scene: scene.stack.enter_context(alone_in(Path("run"))),
    ),
    Mistake(
        "a file as output folder",
        f"train {TINY} --output_dir text.jsonl",
        "error: …: a part of this path is a file and no folder: choose another path",
    ),
    Mistake(
        "results where no file can be",
        "analyze --data traces.jsonl --tokenizer tiny --output_dir text.jsonl",
        "error: output_dir: … cannot be written to: …: this exists already: choose another path, or move it away",
    ),
    Mistake(
        "a read-only disk",
        f"train {TINY}",
        "error: …: this disk is read-only: choose a path on another one",
        prepare=read_only,
    ),
    Mistake(
        "a full disk",
        f"train {TINY}",
        "error: the disk is full: free some space, or choose a path on another one",
        prepare=raising("trsd.run.write_json", OSError(errno.ENOSPC, "No space left on device")),
    ),
    Mistake(
        "a file that is there already",
        f"{GENERATE} --output text.jsonl",
        "error: … exists already: choose another --output, or move it away",
    ),
    Mistake(
        "a merged model that is there already",
        "merge --models tiny,tiny --output folder",
        "error: … exists already: choose another --output, or move it away",
    ),
    Mistake(
        "the report of what is no run",
        "report folder",
        "error: … is no run folder (it has no recipe.yaml)",
    ),
    Mistake(
        "a teacher cache of other traces",
        f"train {SMALL} --teacher_cache_dir done/teacher",
        "error: the teacher cache … was made with other …: delete the folder and it is computed again, or go back to "
        "what it was made with",
        leaves="traces",
    ),
    Mistake(
        "a teacher cache of another kind",
        f"train {TRACES} --output_dir run --teacher top_k_cache --teacher_cache_dir done/teacher",
        "error: the teacher cache … was made with other …: delete the folder and it is computed again, or go back to "
        "what it was made with",
    ),
]

MACHINE = [
    Mistake(
        "a back end of attention that needs a GPU",
        f"train {TINY} --attn_implementation flash_attn_2",
        "error: attn_implementation: attention back end … cannot serve plain rows: it needs CUDA tensors, not cpu",
    ),
    Mistake(
        "layers to compile without a compiler",
        f"train {TINY} --torch_compile True",
        "error: torch_compile: needs a C++ compiler on a CPU, and none was found: install g++, or leave it out",
        prepare=without_compiler,
    ),
    Mistake(
        "layers to compile with a compiler that is broken",
        f"train {SMALL} --torch_compile True",
        "error: torch_compile: torch cannot compile these layers here (…): leave it out",
        code=1,
        prepare=broken_compiler,
        leaves="traces",
        loads_weights=True,
    ),
    Mistake(
        "a teacher in 8 bits with a torch that has no such products",
        f"train {SMALL} --teacher online_fp8 --bf16 True",
        "error: teacher: torch … has no fp8 products on a CPU: update it, or use online",
        prepare=without_fp8_products,
        leaves="traces",
        loads_weights=True,
    ),
    Mistake(
        "settings of several GPUs on one",
        f"train {TINY} --vocab_parallel True",
        "error: …: this run has one rank: start it by torchrun, or leave it out",
    ),
    Mistake(
        "a model that is larger than the memory",
        f"train {TINY}",
        "error: the weights of … alone take … GiB in float32, and this machine has … GiB of memory: choose a smaller "
        "model or a larger machine (python -m trsd.plan --model … says what each takes)",
        prepare=memory_of(cpu=100_000),
    ),
    Mistake(
        "a model to evaluate that is larger than the memory",
        "evaluate --model tiny --data questions.jsonl",
        "error: the weights of … alone take … GiB in float32, and this machine has … GiB of memory: choose a smaller "
        "model or a larger machine (python -m trsd.plan --model … says what each takes)",
        prepare=memory_of(cpu=100_000),
    ),
    Mistake(
        "a model whose weights fit and whose training does not",
        f"train {TINY} --max_length 8",
        "warning: weights, gradients and optimizer of … take … GiB, and there are … GiB: expect to run out of memory; "
        "lower --max_tokens_per_batch (now …, at least max_length), set a small --loss_chunk_bytes, such as 67108864, "
        "--torch_compile True, --gradient_checkpointing True, --optim adamw_torch_8bit, --lora_rank 16; python -m "
        "trsd.plan with the same flags says what each saves",
        prepare=memory_of(cpu=1_000_000),
    ),
    Mistake(
        "memory that runs out in training",
        f"train {SMALL}",
        "error: out of memory (CUDA out of memory. Tried to allocate … GiB. GPU 0 has a total capacity of … GiB of "
        "which … GiB is free): lower --max_tokens_per_batch (now …, at least max_length), set a small "
        "--loss_chunk_bytes, such as 67108864, --torch_compile True, --gradient_checkpointing True, --optim "
        "adamw_torch_8bit, --lora_rank 16; python -m trsd.plan with the same flags says what each saves",
        code=1,
        prepare=raising("trsd.loop.Loop.forward", CUDA),
        leaves="traces",
        loads_weights=True,
    ),
    Mistake(
        "memory that runs out in a run that generates",
        f"train {SMALL} --data questions.jsonl {SHORT}",
        "error: out of memory (CUDA out of memory. Tried to allocate … GiB. GPU 0 has a total capacity of … GiB of "
        "which … GiB is free): lower --generation_batch_size (now …) or --max_thinking_tokens",
        code=1,
        prepare=raising("trsd.engines.hf.HFEngine.run", CUDA),
        leaves="recipe.yaml",
        loads_weights=True,
    ),
    Mistake(
        "memory that runs out in generating",
        GENERATE,
        "error: out of memory (CUDA out of memory. Tried to allocate … GiB. GPU 0 has a total capacity of … GiB of "
        "which … GiB is free): lower --batch_size (now …)",
        code=1,
        prepare=raising("trsd.engines.hf.HFEngine.run", CUDA),
        loads_weights=True,
    ),
    Mistake(
        "a loss that is not finite",
        f"train {SMALL} --max_steps 4 --learning_rate 1e30",
        "error: step …: loss …, gradient norm …: not finite; no parameter was changed. Look at the data of this step, "
        "or start a new output_dir with a lower learning_rate (the traces can be used again: --data "
        "OUTPUT_DIR/traces/train.jsonl); max_skipped_steps leaves such steps out",
        code=1,
        leaves="traces",
        loads_weights=True,
    ),
    Mistake(
        "a server that is not up",
        f"{GENERATE} --engine server --server http://127.0.0.1:9 --max_retries 0",
        "error: no endpoint answers GET /v1/models: …. Are they up, and at this port?",
    ),
    Mistake(
        "a server's address without http",
        f"{GENERATE} --engine server --server localhost:8000",
        "error: server: expected base URLs like http://host:8000, got '…'",
    ),
    Mistake(
        "LoRA without peft",
        f"train {TINY} --lora_rank 8",
        "error: lora_rank needs peft: pip install 'trsd[lora]'",
        prepare=without("peft"),
    ),
    Mistake(
        "8-bit moments without torchao",
        f"train {TINY} --optim adamw_torch_8bit",
        "error: optim … needs …: pip install 'trsd[lowbit]'",
        prepare=without("torchao", "torchao.optim"),
    ),
    Mistake(
        "parquet without pyarrow",
        f"{GENERATE} --output new.parquet",
        "error: parquet files need pyarrow: pip install 'trsd[data]'",
        prepare=without("pyarrow"),
    ),
    Mistake(
        "a data set of the hub without datasets",
        "evaluate --model tiny --data gsm8k",
        "error: … is no local file; for data sets of the hub install: pip install 'trsd[data]'",
        prepare=without("datasets"),
    ),
    Mistake(
        "a formula to grade without math-verify",
        "evaluate --model tiny --data formula.jsonl",
        "error: comparing answers with '…' needs math-verify: pip install 'trsd[eval]'",
        prepare=without("math_verify"),
    ),
    Mistake(
        "vLLM that is not there",
        f"{GENERATE} --engine vllm",
        "error: vLLM cannot be imported (…): pip install 'trsd[vllm]' on a machine with a GPU, `make vllm-venv` on one "
        "without; or use another --engine",
        prepare=without("vllm"),
    ),
]

MISTAKES = [*MODELS, *DATA, *SETTINGS, *FOLDERS, *MACHINE]
