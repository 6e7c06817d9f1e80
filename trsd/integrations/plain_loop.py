"""The loss in a training loop of one's own: FSDP2, ``torch.compile(fullgraph=True)``, and nothing of our trainer.

    python -m trsd.integrations.plain_loop
    torchrun --nproc_per_node 2 -m trsd.integrations.plain_loop

distils the bundled reasoner into the bundled student, on text of the bundled questions. Copy it and put your models and
rows in. What matters for the loss:

- Body and lm_head are called in one ``forward`` (``StudentLoss``), for FSDP2 gathers a weight only there.
- ``num_items`` counts the labels of all ranks, and FSDP2 averages gradients over them: hence the factor.
- One process compiles forward and loss as one graph. Over several, layers and loss are compiled each by itself, before
  they are sharded, so that the exchanges of weights stay between the graphs.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trsd.paths import resolve_bundled
from trsd.traces import read_rows
from trsd_kernels import FusedLinearDistillation


class StudentLoss(nn.Module):
    """A student and its loss against a teacher's hidden states, as one module to shard."""

    def __init__(self, student: PreTrainedModel, teacher_head: Tensor) -> None:
        super().__init__()
        self.student, self.teacher_head = student, teacher_head
        self.distill = FusedLinearDistillation(alpha=0.5, divergence="forward_kl")

    def forward(self, input_ids: Tensor, labels: Tensor, teacher_hidden: Tensor, num_items: Tensor) -> Tensor:
        hidden = self.student.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.distill(
            hidden[:, :-1].flatten(0, 1),  # the token before a label predicts it
            self.student.lm_head.weight,
            teacher_hidden[:, :-1].flatten(0, 1),
            self.teacher_head,
            labels[:, 1:].flatten(),
            num_items_in_batch=num_items,
        ).loss


def batches(
    tokenizer: PreTrainedTokenizerBase, *, rank: int, ranks: int, batch_size: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of this rank, each [batch_size, length], for ever; padding is no label."""
    texts = [row["question"] for _, row in read_rows(Path(resolve_bundled("bundled:questions/train.jsonl")))]
    step = 0
    while True:
        first = (step * ranks + rank) * batch_size
        rows = [tokenizer(texts[(first + index) % len(texts)]).input_ids[:length] for index in range(batch_size)]
        ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (length - len(row))] for row in rows])
        kept = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
        yield ids, torch.where(kept, ids, -100)
        step += 1


def main(argv: list[str] | None = None) -> None:
    """Train for ``--steps`` steps; a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="bundled:student", help="a model folder")
    parser.add_argument("--teacher", default="bundled:reasoner", help="a model folder with the student's tokenizer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a rank")
    parser.add_argument("--length", type=int, default=96, help="tokens of a sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--compile", type=int, choices=(0, 1), default=0, help="1: torch.compile(fullgraph=True)")
    parser.add_argument("--compile_backend", default="inductor")
    args = parser.parse_args(argv)

    ranks, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)  # on which NCCL and FSDP's mesh work
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank() if ranks > 1 else 0

    folder = resolve_bundled(args.student)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    teacher = AutoModelForCausalLM.from_pretrained(resolve_bundled(args.teacher), dtype=torch.float32).to(device).eval()
    loss_of = StudentLoss(student, teacher.lm_head.weight.detach())
    if args.compile:
        for part in [*student.model.layers, loss_of.distill] if ranks > 1 else [loss_of]:
            part.compile(fullgraph=True, backend=args.compile_backend)
    if ranks > 1:
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(loss_of)
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=args.learning_rate)

    rows = batches(tokenizer, rank=rank, ranks=ranks, batch_size=args.batch_size, length=args.length)
    for step in range(1, args.steps + 1):
        input_ids, labels = (tensor.to(device) for tensor in next(rows))
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids=input_ids, use_cache=False).last_hidden_state
        num_items = (labels[:, 1:] != -100).sum()
        if ranks > 1:
            dist.all_reduce(num_items)
        loss = loss_of(input_ids, labels, teacher_hidden, num_items / ranks)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(shown)
            norm = norm.full_tensor()
        if rank == 0:
            print(f"step {step:4d}  loss {shown.item():.6f}  grad_norm {norm.item():.4f}", flush=True)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
