"""Trainers of TRL with our losses: the same numbers as TRL's own and as this package's trainer, and TRL's faults."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation_cases import exact_loss, gradient_errors, make_case
from integration_cases import assert_same_gradients, own_loss, padded_model
from safetensors.torch import load_file

from trsd.cuts import uniform
from trsd.errors import InputError
from trsd.integrations.cut_rows import CutRowCollator, cut_rows
from trsd.methods.trsd import TRSD

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402

from trsd.integrations.trl_trainer import CutRowTrainer, FusedDistillationTrainer  # noqa: E402
from trsd_kernels import fused_linear_distillation  # noqa: E402

SHARED = dict(
    use_cpu=True,
    bf16=False,
    report_to=[],
    disable_tqdm=True,
    max_steps=2,
    save_strategy="no",
    logging_steps=1,
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
)
QUESTIONS = [{"prompt": [{"role": "user", "content": f"What is {n} and {'one more ' * n}?"}]} for n in range(1, 9)]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")  # under which TRL sends none


def on_policy(kind, tokenizer, folder, *, options=None, **settings):
    defaults = dict(per_device_train_batch_size=4, max_completion_length=12)
    args = trl.DistillationConfig(output_dir=str(folder), **(SHARED | defaults | settings))
    return kind(
        model=padded_model(tokenizer, seed=0),
        teacher_model=padded_model(tokenizer, seed=1),
        args=args,
        train_dataset=datasets.Dataset.from_list(QUESTIONS),
        processing_class=tokenizer,
        **({} if options is None else {"distill_options": options}),
    )


def micro_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(QUESTIONS[:4])


def loss_and_gradients(trainer, inputs):
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("beta,temperature", [(0.0, 1.0), (1.0, 1.0), (0.3, 1.0), (1.0, 2.0), (0.5, 0.7)])
def test_on_policy_loss_and_gradients_are_trls(tokenizer, tmp_path, beta, temperature):
    settings = dict(beta=beta, temperature=temperature)
    theirs, ours = (
        on_policy(kind, tokenizer, tmp_path, **settings) for kind in (trl.DistillationTrainer, FusedDistillationTrainer)
    )
    inputs = micro_batch(theirs)
    wanted, gradients = loss_and_gradients(theirs, inputs)
    found, _ = loss_and_gradients(ours, inputs)
    assert found == pytest.approx(wanted, rel=1e-6) and wanted > 0.05
    assert_same_gradients(ours.model, gradients)
    assert ours._metrics["train"]["entropy"] == pytest.approx(theirs._metrics["train"]["entropy"], rel=1e-5)


def test_on_policy_training_takes_trls_steps(tokenizer, tmp_path):
    """Generation, two micro-batches a step and the optimizer included."""
    # SGD, for AdamW makes a step of full size of a gradient that is nothing but rounding.
    settings = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, optim="sgd", learning_rate=0.1)
    histories, weights = [], []
    for kind in (trl.DistillationTrainer, FusedDistillationTrainer):
        trainer = on_policy(kind, tokenizer, tmp_path, **settings)
        trainer.train()
        histories.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
        weights.append(trainer.model.state_dict())
    assert len(histories[0]) == 2
    for theirs, ours in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, wanted in weights[0].items():
        assert torch.allclose(weights[1][name], wanted, atol=1e-5), name


def test_a_compiled_student_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments set
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    with pytest.raises(InputError, match="torch_compile compiles the model's forward"):
        on_policy(FusedDistillationTrainer, tokenizer, tmp_path, torch_compile=True, torch_compile_backend="eager")


def test_trl_leaves_out_the_square_of_the_temperature(tokenizer, tmp_path):
    theirs, ours = (
        on_policy(trl.DistillationTrainer, tokenizer, tmp_path, temperature=2.0),
        on_policy(
            FusedDistillationTrainer, tokenizer, tmp_path, temperature=2.0, options={"temperature_squared": True}
        ),
    )
    inputs = micro_batch(theirs)
    assert loss_and_gradients(ours, inputs)[0] == pytest.approx(4 * loss_and_gradients(theirs, inputs)[0], rel=1e-6)


def test_trls_jsd_gradient_is_coarse_where_the_student_is_certain():
    errors = {}
    for which in ("theirs", "ours"):
        case = make_case(64, 501, 32, dtype=torch.float32, regime="saturated")
        exact = case.double()
        exact_loss(exact, alpha=1.0, divergence="jsd", beta=0.5).backward()
        tensors = case.student_hidden_states, case.student_lm_head_weight
        teacher = case.teacher_hidden_states, case.teacher_lm_head_weight
        if which == "theirs":
            ChunkedDivergenceFunction.apply(*tensors, None, *teacher, None, 0.5)[0].mean().backward()
        else:
            options = dict(alpha=1.0, divergence="jsd", beta=0.5)
            fused_linear_distillation(*tensors, *teacher, case.labels, **options).loss.backward()
        errors[which] = gradient_errors(case, exact)["student_hidden_states"]
    assert errors["ours"] < 1e-5 < 5e-5 < errors["theirs"]


def gpt2(tokenizer, seed):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3, **tokens
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind,moves", [("theirs", True), ("ours", False)])
def test_learnt_positions_make_trls_loss_depend_on_the_padding(tokenizer, tmp_path, kind, moves):
    trainer = (trl.DistillationTrainer if kind == "theirs" else FusedDistillationTrainer)(
        model=gpt2(tokenizer, 0),
        teacher_model=gpt2(tokenizer, 1),
        args=trl.DistillationConfig(output_dir=str(tmp_path), **SHARED),
        train_dataset=datasets.Dataset.from_list(QUESTIONS),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    losses = []
    for padding in (0, 7):
        prompt, answer = torch.arange(5, 9)[None], torch.arange(20, 25)[None]
        pads = torch.full((1, padding), tokenizer.pad_token_id)
        inputs = dict(
            prompt_ids=torch.cat([pads, prompt], 1),
            prompt_mask=torch.cat([torch.zeros_like(pads), torch.ones_like(prompt)], 1),
            completion_ids=answer,
            completion_mask=torch.ones_like(answer),
        )
        losses.append(trainer.compute_loss(trainer.model, inputs).item())
    assert (abs(losses[1] - losses[0]) > 0.01) if moves else losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_trls_gkd_divides_what_was_generated_by_the_number_of_given_labels(tokenizer, tmp_path):
    """On-policy, a data set whose own answers are longer makes a step's loss smaller, the generated tokens alike."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    losses = []
    for answer in ("4", "4 " * 60):
        rows = [{"messages": [*row["prompt"], {"role": "assistant", "content": answer}]} for row in QUESTIONS]
        args = GKDConfig(
            output_dir=str(tmp_path), lmbda=1.0, per_device_train_batch_size=4, max_new_tokens=12, max_length=512,
            **(SHARED | dict(max_steps=1, learning_rate=0.0)),
        )  # fmt: skip
        trainer = GKDTrainer(
            model=padded_model(tokenizer, seed=0),
            teacher_model=padded_model(tokenizer, seed=1),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] > 5 * losses[1]


def test_shares_of_cross_entropy_and_skew_divergences_are_there(tokenizer, tmp_path):
    options = dict(alpha=0.5, divergence="skew_kl", skew=0.2)
    trainer = on_policy(FusedDistillationTrainer, tokenizer, tmp_path, options=options)
    inputs = micro_batch(trainer)
    loss, _ = loss_and_gradients(trainer, inputs)
    ids, mask = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    length = inputs["completion_ids"].shape[1]
    kept = inputs["completion_mask"] != 0
    student, teacher = (
        model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1][kept].double()
        for model in (trainer.model, trainer.teacher_model)
    )
    p, q = teacher.softmax(-1), student.softmax(-1)
    skew = (p * (p.log() - (0.2 * p + 0.8 * q).log())).sum(-1)
    wanted = 0.5 * torch.nn.functional.cross_entropy(student, inputs["completion_ids"][kept]) + 0.5 * skew.mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


@pytest.fixture
def method(traces, think):
    return TRSD(traces, think, uniform, seed=3, branches_per_trace=2, keep_thinking=True)


def offline(tokenizer, folder, rows, *, options=None, teacher=True, eval_rows=None, weight=0.5, **settings):
    defaults = dict(max_steps=1, per_device_train_batch_size=14, eval_strategy="steps" if eval_rows else "no")
    args = trl.SFTConfig(output_dir=str(folder), **(SHARED | defaults | settings))
    return CutRowTrainer(
        padded_model(tokenizer, seed=0),
        padded_model(tokenizer, seed=1) if teacher else None,
        args,
        thinking_weight=weight,
        distill_options=options,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
    )


def train_keeping_gradients(trainer):
    """Train, and return the gradients of the last step before they are clipped."""
    found = {}
    clip = trainer.accelerator.clip_grad_norm_

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return clip(*args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = keep
    trainer.train()
    return found


@pytest.mark.parametrize(
    "options", [{}, dict(alpha=0.6, divergence="jsd", beta=0.3, temperature=2.0)], ids=["forward_kl", "jsd"]
)
@pytest.mark.parametrize("accumulated", [1, 7])
def test_offline_step_is_the_step_of_our_trainer(tokenizer, tmp_path, traces, method, options, accumulated):
    """One batch of 14 rows, or 7 micro-batches of 2 with unequal numbers of tokens."""
    members = [(0, index) for index in range(len(traces))]
    students = padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)
    loss, terms, wanted = own_loss(*students, method, members, thinking_weight=0.5, **options)
    settings = dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=14 // accumulated)
    trainer = offline(tokenizer, tmp_path, cut_rows(method), options=options, **settings)
    gradients = train_keeping_gradients(trainer)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    names = ("cross_entropy", "divergence", "thinking_cross_entropy")
    assert [logged[name] for name in names] == pytest.approx(terms[1:].tolist(), rel=1e-6, abs=1e-7)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_rows_alone_train_trls_own_trainer_by_cross_entropy(tokenizer, tmp_path, traces, think):
    """``input_ids`` and ``labels`` are what SFTTrainer and its collator take, with no part of ours."""
    method = TRSD(traces, think, uniform, seed=3)
    args = trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=7, **(SHARED | dict(max_steps=1)))
    rows = datasets.Dataset.from_list(cut_rows(method))
    trainer = trl.SFTTrainer(padded_model(tokenizer, seed=0), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    models = padded_model(tokenizer, seed=0), padded_model(tokenizer, seed=1)
    loss, _, _ = own_loss(*models, method, [(0, index) for index in range(7)], alpha=0.0, thinking_weight=0.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_offline_training_learns_and_evaluates(tokenizer, tmp_path, method):
    rows = cut_rows(method)
    trainer = offline(
        tokenizer, tmp_path, rows[4:], eval_rows=rows[:4], max_steps=8, eval_steps=8, learning_rate=3e-3,
        per_device_train_batch_size=5, per_device_eval_batch_size=4, gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    evaluated = next(row for row in history if "eval_loss" in row)
    wanted = trainer.row_loss(trainer.model, CutRowCollator()(rows[:4]))
    assert evaluated["eval_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert evaluated["eval_divergence"] == pytest.approx(wanted.divergence.item(), rel=1e-5)


def test_a_checkpoint_is_the_student_alone(tokenizer, tmp_path, method):
    trainer = offline(tokenizer, tmp_path, cut_rows(method), save_strategy="steps", save_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == {name for name in trainer.model.state_dict() if name != "lm_head.weight"}


def test_trls_preparation_would_cut_the_answer_and_the_collator_says_so(tokenizer, tmp_path, traces, think):
    rows = cut_rows(TRSD(traces, think, uniform, seed=3))
    shortest = min(len(row["input_ids"]) for row in rows)
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=shortest - 3, remove_unused_columns=False, **SHARED)
    trainer = trl.SFTTrainer(
        padded_model(tokenizer, seed=0),
        args,
        data_collator=CutRowCollator(),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    with pytest.raises(InputError, match="was it cut to a length by the trainer"):
        trainer.train()


def test_rows_longer_than_max_length_are_refused(tokenizer, tmp_path, method):
    trainer = offline(tokenizer, tmp_path, cut_rows(method), max_length=30)
    with pytest.raises(InputError, match="more than max_length 30"):
        trainer.train()


REFUSED = {
    "packing": True,
    "eval_packing": True,
    "padding_free": True,
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "shuffle_dataset": True,
    "completion_only_loss": True,
    "assistant_only_loss": True,
    "truncation_mode": "keep_end",
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_without_effect_are_refused(tokenizer, tmp_path, method, name):
    with pytest.raises(InputError, match=name):
        offline(tokenizer, tmp_path, cut_rows(method), **{name: REFUSED[name]})


def test_without_a_teacher_alpha_must_be_0(tokenizer, tmp_path, method):
    with pytest.raises(InputError, match="alpha=0"):
        offline(tokenizer, tmp_path, cut_rows(method), teacher=False)
    offline(tokenizer, tmp_path, cut_rows(method), teacher=False, options={"alpha": 0.0}).train()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in ["trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "trsd.integrations.trl_trainer")
    with pytest.raises(ImportError, match=r"pip install 'trsd\[trl\]'"):
        importlib.import_module("trsd.integrations.trl_trainer")


ON_RANKS = """
import sys, torch
from safetensors.torch import save_file
from conftest import REASONER, make_traces
from test_integrations_trl import cut_rows, offline
from trsd.cuts import uniform
from trsd.methods.trsd import TRSD
from trsd.models import load_tokenizer
from trsd.thinking import ThinkFormat

torch.set_num_threads(1)
folder, batch_size = sys.argv[1], int(sys.argv[2])
tokenizer = load_tokenizer(REASONER)
think = ThinkFormat.of(tokenizer)
traces = make_traces(tokenizer, think, 6)
rows = cut_rows(TRSD(traces, think, uniform, seed=3, branches_per_trace=2, keep_thinking=True))
settings = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, max_steps=2)
trainer = offline(tokenizer, folder, rows, optim="sgd", learning_rate=0.1, **settings)
trainer.train()
if trainer.accelerator.is_main_process:
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    save_file(weights, folder + "/weights.safetensors")
    for row in trainer.state.log_history[:2]:
        print("logged", *(row[name] for name in ("cross_entropy", "divergence", "thinking_cross_entropy", "grad_norm")))
"""


@pytest.mark.slow
def test_two_ranks_take_the_offline_steps_of_one(tmp_path):
    """12 rows a step, in two micro-batches on each rank; the ranks' tokens differ."""
    tests = Path(__file__).parent
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent, tests.parent / "kernels")))}
    (tmp_path / "ranks.py").write_text(ON_RANKS)
    logged, weights = [], []
    for number in (1, 2):
        folder = tmp_path / str(number)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if number == 2 else []
        command = [sys.executable, *launcher, str(tmp_path / "ranks.py"), str(folder), str(6 // number)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
        assert result.returncode == 0, result.stderr[-3000:]
        lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("logged")]
        logged.append([float(word) for line in lines for word in line])
        weights.append(load_file(folder / "weights.safetensors"))
    assert len(logged[0]) == 8 and logged[1] == pytest.approx(logged[0], rel=1e-4)
    for name, wanted in weights[0].items():
        assert torch.allclose(weights[1][name], wanted, atol=1e-6), name


def test_lengths_are_rounded_up_as_trls_setting_says(tokenizer, tmp_path, method):
    rows = cut_rows(method)
    trainer = offline(tokenizer, tmp_path, rows, pad_to_multiple_of=64)
    assert {column.shape[1] % 64 for column in trainer.data_collator(rows[:3]).values()} == {0}


@pytest.mark.parametrize("bf16", [True, False])
def test_on_policy_mixed_precision_is_that_of_the_arguments(tokenizer, tmp_path, bf16):
    """TRL's default is True, and its own trainer runs fp32 weights in fp32 under it."""
    trainer = on_policy(FusedDistillationTrainer, tokenizer, tmp_path, bf16=bf16)
    inputs, seen = micro_batch(trainer), set()
    for model in (trainer.model, trainer.accelerator.unwrap_model(trainer.teacher_model)):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert loss > 0 and {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["on policy", "offline"])
def test_a_teacher_that_the_students_adapter_is_put_into_is_refused(tokenizer, tmp_path, method, kind):
    peft = pytest.importorskip("peft")
    model, adapter = padded_model(tokenizer, seed=0), peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="before an adapter is added"):
        if kind == "offline":
            rows = datasets.Dataset.from_list(cut_rows(method))
            args = trl.SFTConfig(output_dir=str(tmp_path), **SHARED)
            CutRowTrainer(model, model, args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
        else:
            FusedDistillationTrainer(
                model=model,
                teacher_model=model,
                args=trl.DistillationConfig(output_dir=str(tmp_path), **SHARED),
                train_dataset=datasets.Dataset.from_list(QUESTIONS),
                processing_class=tokenizer,
                peft_config=adapter,
            )


def granite(tokenizer, seed, scale):
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(seed)
    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, logits_scaling=scale, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return GraniteForCausalLM(config).eval()


def test_both_models_own_scales_and_tool_masks_are_in_the_loss(tokenizer, tmp_path):
    trainer = FusedDistillationTrainer(
        model=granite(tokenizer, 0, 2.0),
        teacher_model=granite(tokenizer, 1, 4.0),
        args=trl.DistillationConfig(output_dir=str(tmp_path), beta=0.0, **SHARED),
        train_dataset=datasets.Dataset.from_list(QUESTIONS),
        processing_class=tokenizer,
    )
    prompt, answer = torch.arange(5, 9)[None], torch.arange(20, 26)[None]
    tools = torch.tensor([[1, 0, 0, 1, 1, 1]])
    inputs = dict(prompt_ids=prompt, completion_ids=answer, tool_mask=tools)
    inputs |= {f"{name}_mask": torch.ones_like(inputs[f"{name}_ids"]) for name in ("prompt", "completion")}
    found = trainer.compute_loss(trainer.model.eval(), inputs).item()
    ids = torch.cat([prompt, answer], 1)
    q, p = (
        m(input_ids=ids).logits[:, 3:-1].log_softmax(-1)[tools != 0] for m in (trainer.model, trainer.teacher_model)
    )
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
