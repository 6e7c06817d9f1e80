"""Trainers of others with weights in shards: two ranks under accelerate's FSDP2 take the steps of one process."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import REASONER, make_traces
from integration_cases import padded_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from trsd.cuts import uniform
from trsd.errors import InputError
from trsd.integrations.cut_rows import cut_rows
from trsd.integrations.hf_trainer import DistillTrainer
from trsd.methods.trsd import TRSD
from trsd.models import load_tokenizer
from trsd.thinking import ThinkFormat

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("datasets")

FSDP2 = dict(fsdp=True)
CASES = {
    "tied": dict(tie=True, **FSDP2),
    "untied": dict(tie=False, **FSDP2),
    "lean": dict(tie=True, fsdp=True, fsdp_config={"cpu_ram_efficient_loading": True}),
    "recomputed": dict(tie=False, fsdp=True, fsdp_config={"activation_checkpointing": True}),
    "bf16": dict(tie=True, bf16=True, **FSDP2),
    "adapter": dict(tie=False, adapter=True, **FSDP2),
    "trl offline": dict(tie=False, **FSDP2),
    "trl on policy": dict(tie=False, **FSDP2),
    "trl on policy by DDP": dict(tie=False),
    "trl on policy bf16": dict(tie=False, bf16=True, **FSDP2),
}
IN_ONE = {"tied": "tied", "lean": "tied", "bf16": "tied", "untied": "untied", "recomputed": "untied"}
IN_ONE |= {"trl offline": "untied", "adapter": "adapter"}
LAYERS = ["q_proj", "v_proj", "down_proj"]
NAMES = ("loss", "grad_norm", "cross_entropy", "divergence", "thinking_cross_entropy")


class Found(NamedTuple):
    """What a trainer's run came to."""

    history: list[dict]
    weights: dict[str, torch.Tensor]  # of the student, whole
    shards: dict[str, int]  # how many parameters of each model are such
    dtypes: set[torch.dtype]  # of the losses that went backward


def allow_on_cpus():
    """accelerate has FSDP on GPUs alone, and elsewhere leaves it out: let it do on CPUs what it does there."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    true = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, mixed_precision=None, **kwargs):
        true(self, *args, fsdp_plugin=fsdp_plugin, mixed_precision=mixed_precision, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(mixed_precision)

    AcceleratorState.__init__ = init


def student_of(tokenizer, tie, adapter=False):
    model = padded_model(tokenizer, seed=0, tie=tie)
    if not adapter:
        return model
    import peft

    torch.manual_seed(0)  # of the adapter's matrices
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LAYERS))


def trainer_of(case, folder, *, ranks=1, rank=0):
    """A trainer for 12 rows a step, in two micro-batches on each of ``ranks``."""
    tokenizer = load_tokenizer(REASONER)
    settings = dict(CASES[case])
    tie, adapter = settings.pop("tie"), settings.pop("adapter", False)
    if ranks == 1:
        settings = {}
    models = [student_of(tokenizer, tie, adapter), padded_model(tokenizer, seed=1, tie=tie)]
    if case == "lean" and rank:  # as transformers loads them in all processes but the first
        for parameter in (p for model in models for p in model.parameters()):
            parameter.data.zero_()
    shared = dict(
        use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant", optim="sgd", learning_rate=0.1, gradient_accumulation_steps=2,
        per_device_train_batch_size=6 // ranks, gradient_checkpointing=False,
    )  # fmt: skip
    settings = {"bf16": False} | shared | settings
    if case.startswith("trl on policy"):
        return on_policy(tokenizer, models, folder, settings | {"per_device_train_batch_size": 2})
    think = ThinkFormat.of(tokenizer)
    method = TRSD(make_traces(tokenizer, think, 6), think, uniform, seed=3, branches_per_trace=2, keep_thinking=True)
    rows, options = cut_rows(method), dict(thinking_weight=0.5, distill_options={"alpha": 0.7})
    if case == "trl offline":
        from datasets import Dataset
        from trl import SFTConfig

        from trsd.integrations.trl_trainer import CutRowTrainer

        args, data = SFTConfig(folder, **settings), Dataset.from_list(rows)
        return CutRowTrainer(*models, args, train_dataset=data, processing_class=tokenizer, **options)
    settings |= dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    return DistillTrainer(
        *models, TrainingArguments(folder, **settings), train_dataset=rows, eval_dataset=rows[:5], **options
    )


def on_policy(tokenizer, models, folder, settings):
    from datasets import Dataset
    from trl import DistillationConfig

    from trsd.integrations.trl_trainer import FusedDistillationTrainer

    questions = [{"prompt": [{"role": "user", "content": f"What is {n} and {'one more ' * n}?"}]} for n in range(8)]
    return FusedDistillationTrainer(
        model=models[0],
        teacher_model=models[1],
        args=DistillationConfig(output_dir=folder, max_completion_length=12, **settings),
        train_dataset=Dataset.from_list(questions),
        processing_class=tokenizer,
    )


def trained(trainer, folder=None):
    """Train, and tell what came of it."""
    dtypes, backward = set(), trainer.accelerator.backward

    def noted(loss, **kwargs):
        dtypes.add(loss.dtype)
        backward(loss, **kwargs)

    trainer.accelerator.backward = noted
    trainer.train()
    if folder is not None:
        trainer.save_model(folder)
    models = {"student": trainer.model}
    if isinstance(trainer, DistillTrainer):
        models["teacher"] = trainer.row_loss.teacher
    shards = {name: sum(hasattr(p, "placements") for p in model.parameters()) for name, model in models.items()}
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # evaluation leaves some gathered, in the precision of the layers
    weights = {}
    for name, p in trainer.model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        weights[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().clone()
    return Found(trainer.state.log_history, weights, shards, dtypes)


def run_rank(folder):
    os.environ["CI"] = "1"
    folder, rank = Path(folder), int(os.environ["RANK"])
    from accelerate.state import AcceleratorState

    allow_on_cpus()
    found = {}
    for case in CASES:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        AcceleratorState._reset_state()
        trainer = trainer_of(case, str(folder / "run"), ranks=2, rank=rank)
        found[case] = trained(trainer, folder / "saved" if case == "untied" else None)
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory, launch):
    """(what two ranks found of each case, the folder it was saved in)."""
    folder = tmp_path_factory.mktemp("ranks")
    launch.call(run_rank, str(folder))
    return torch.load(folder / "found.pt", weights_only=False), folder


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    """What one process found of the cases that all others are variants of."""
    return {
        case: trained(trainer_of(case, str(tmp_path_factory.mktemp("one")))) for case in ("tied", "untied", "adapter")
    }


def before(case):
    """The student's weights before the first step."""
    settings = CASES[case]
    return dict(
        student_of(load_tokenizer(REASONER), settings["tie"], settings.get("adapter", False)).named_parameters()
    )


def rows_of(history, name):
    return [row for row in history if name in row]


@pytest.mark.parametrize("case", IN_ONE)
def test_sharded_ranks_take_the_steps_of_one_process(over_ranks, in_one, case):
    history, weights, *_ = over_ranks[0][case]
    expected, wanted, *_ = in_one[IN_ONE[case]]
    bound, gradients = (2e-3, 5e-2) if case == "bf16" else (1e-5, 1e-4)
    found, steps = rows_of(history, "loss"), rows_of(expected, "loss")
    assert len(found) == len(steps) == 2
    for row, other in zip(found, steps, strict=True):
        assert [row[name] for name in NAMES] == pytest.approx([other[name] for name in NAMES], rel=bound)
    for row, other in zip(rows_of(history, "eval_loss"), rows_of(expected, "eval_loss"), strict=case != "trl offline"):
        assert row["eval_loss"] == pytest.approx(other["eval_loss"], rel=bound)
    for name, weight in wanted.items():
        moved = (weight - before(IN_ONE[case])[name]).norm()
        assert (weights[name] - weight).norm() <= gradients * moved, name


def test_layers_of_both_models_are_shards(over_ranks):
    for case in ("tied", "untied", "lean", "recomputed", "bf16", "adapter"):
        shards = over_ranks[0][case].shards
        layers = sum(1 for name in before("tied") if ".layers." in name)
        assert shards["student"] >= layers and shards["teacher"] >= layers


@pytest.mark.parametrize("case", ["bf16", "trl on policy bf16"])
def test_in_bf16_the_loss_is_not_rounded_to_bf16(over_ranks, case):
    """accelerate has FSDP2 cast what a forward returns to the layers' precision."""
    assert over_ranks[0][case].dtypes == {torch.float32}


def test_a_student_in_shards_is_saved_as_a_plain_folder(over_ranks):
    found, folder = over_ranks
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in found["untied"].weights.items())


def test_on_policy_shards_take_the_steps_of_whole_weights(over_ranks):
    found = (over_ranks[0][f"trl on policy{by}"] for by in ("", " by DDP"))
    (history, weights, *_), (expected, wanted, *_) = found
    found, steps = rows_of(history, "loss"), rows_of(expected, "loss")
    assert len(found) == len(steps) == 2 and all(math.isfinite(row["loss"]) for row in steps)
    for row, other in zip(found, steps, strict=True):
        assert [row[name] for name in NAMES[:2]] == pytest.approx([other[name] for name in NAMES[:2]], rel=1e-5)
    for name, weight in wanted.items():
        assert torch.allclose(weights[name], weight, atol=1e-6), name


def test_shards_that_accelerate_leaves_out_are_told(tmp_path, monkeypatch):
    """As it does in several processes without a GPU."""
    true = Trainer.__init__

    def unsharded(self, *args, **kwargs):
        true(self, *args, **kwargs)
        self.args.fsdp = True

    monkeypatch.setattr(Trainer, "__init__", unsharded)
    with pytest.warns(
        UserWarning, match="fsdp has no effect: accelerate spreads weights over processes that have a GPU"
    ):
        trainer_of("tied", str(tmp_path))


@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP1", "parallelism_config"])
def test_other_shards_are_refused(tmp_path: Path, monkeypatch, kind):
    true = Trainer.__init__

    def sharded(self, *args, **kwargs):
        true(self, *args, **kwargs)
        if kind == "parallelism_config":
            self.accelerator.state.parallelism_config = object()
        else:
            setattr(self, {"DeepSpeed": "is_deepspeed_enabled", "FSDP1": "is_fsdp_enabled"}[kind], True)

    monkeypatch.setattr(Trainer, "__init__", sharded)
    with pytest.raises(InputError, match=f"{kind} is not supported here: train with DDP, with FSDP2"):
        trainer_of("tied", str(tmp_path))
