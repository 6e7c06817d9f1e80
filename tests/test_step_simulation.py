"""A step without content against the step itself: bytes, operations, and what has no room."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.in_sight import ops_in_sight
from trsd.ceilings import Ceilings
from trsd.errors import InputError
from trsd.fused_meter import fused
from trsd.live_bytes import LiveBytes
from trsd.loop import Loop
from trsd.loop_meter import ACTIVATIONS, GRADIENTS, LOSS_WORK
from trsd.methods import TeacherExamples
from trsd.model_shapes import config_of
from trsd.models import PACKED_ATTENTION
from trsd.placement import Placement
from trsd.planning import planned_method, planned_traces
from trsd.recipe import Recipe, with_method_defaults
from trsd.recomputation import recompute_activations
from trsd.step_meter import OPTIMIZER
from trsd.step_meter import TEACHER as READING
from trsd.step_simulation import COPIES, STATE, TEACHER_WEIGHTS, WEIGHTS, MetaPlacement, _Simulation, simulate_step
from trsd.teachers import OnlineTeacher

CPU = Ceilings(name="CPU", products=1e11, copies=1e10, memory=None)
GPU = Ceilings(name="H100", products=8e14, copies=3e12, memory=80 * 2**30)


def config(hidden_size, num_layers):
    return Qwen3Config(
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        tie_word_embeddings=True,
        use_cache=False,
    )


STUDENT, TEACHER = config(128, 3), config(192, 4)


def make_recipe(**changes):
    defaults = dict(max_tokens_per_batch=2048, max_length=1024, train_batch_size=4, teacher="online", alpha=None)
    if changes.get("method") == "lsp":
        defaults["teacher_model_name_or_path"] = "a larger one"
    return with_method_defaults(Recipe(**(defaults | changes)))


LENGTHS = (10, 150, 30)


def method_of(recipe, lengths=LENGTHS):
    return planned_method(recipe, planned_traces(recipe.train_batch_size, lengths))


def simulated(recipe, *, target="cpu", ceilings=CPU, student=STUDENT, lengths=LENGTHS):
    placement = MetaPlacement(recipe, student, TEACHER if recipe.method == "lsp" else student, target=target)
    return simulate_step(placement, method_of(recipe, lengths), ceilings)


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model


class CountedPlacement(Placement):
    """Layers that are compiled are run in such a way that what they hold can be seen."""

    compiler = staticmethod(fused)


def measured(recipe):
    """(peak bytes of a real step, the loop's metrics)."""
    teacher_config = TEACHER if recipe.method == "lsp" else STUDENT
    method = method_of(recipe)
    student, teacher = build(STUDENT), None
    if recipe.gradient_checkpointing:
        recompute_activations(student, "full")
    if recipe.alpha:
        teacher = OnlineTeacher(
            build(teacher_config), TeacherExamples(method), max_tokens_per_batch=recipe.max_tokens_per_batch
        )
    loop = Loop(CountedPlacement(recipe, STUDENT, teacher_config, device="cpu"), student, teacher, method)
    loop.stream.step = lambda step: [(0, index) for index in range(len(method.traces))]
    loop.step(0)  # the optimizer has its state afterwards
    models = [student] + ([teacher.model] if teacher else [])
    held = sum(p.nbytes for model in models for p in model.parameters())
    held += sum(x.nbytes for state in loop.optimizer.state.values() for x in state.values() if x.ndim)
    with ops_in_sight(), LiveBytes() as memory:
        metrics = loop.step(1)
    return held + memory.peak, metrics


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="lsp"),
        dict(method="lsp", gradient_checkpointing=True),
        dict(method="lsp", keep_fraction=1.0, loss_sections="a"),
        dict(method="sft"),
        dict(),
        dict(branches_per_trace=4),
        dict(thinking_weight=0.0),
        dict(max_tokens_per_batch=256, max_length=256),
        dict(loss_chunk_bytes=2**18),
        dict(divergence="jsd"),
        pytest.param(dict(torch_compile=True), marks=pytest.mark.slow, id="compiled"),
        pytest.param(
            dict(method="lsp", torch_compile=True, gradient_checkpointing=True), marks=pytest.mark.slow, id="recomputed"
        ),
    ],
    ids=str,
)
def test_peak_and_operations_are_those_of_the_step(changes):
    recipe = make_recipe(**changes)
    peak, metrics = measured(recipe)
    cost = simulated(recipe)
    assert cost.peak_bytes == pytest.approx(peak, rel=0.1)
    assert (cost.num_tokens, cost.supervised_tokens) == (metrics["tokens"], metrics["supervised_tokens"])
    # The loop counts what every pair and token asks for; what attention's and the small loss's backward recompute comes
    # on top here.
    flops = sum(cost.flops.values())
    assert flops == pytest.approx(1e12 * metrics["teraflops"], rel=0.05 if recipe.loss_chunk_bytes is None else 0.2)
    assert 0 < sum(cost.flops.values()) / CPU.products < sum(cost.seconds.values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="sft"),
        dict(method="lsp", bf16=True, gradient_checkpointing=True),
        dict(method="lsp", teacher="hidden_cache", bf16=True, lora_rank=4),
    ],
)
def test_of_rows_of_one_shape_one_is_run_and_its_cost_is_that_of_all(monkeypatch, changes):
    backwards, true = [], Loop._backward
    monkeypatch.setattr(Loop, "_backward", lambda *a, **k: backwards.append(0) or true(*a, **k))
    recipe = make_recipe(train_batch_size=8, max_tokens_per_batch=256, max_length=256, **changes)
    one = simulated(recipe, target="cuda", ceilings=GPU)
    assert len(backwards) == 1 and one.num_rows > 1
    monkeypatch.setattr(_Simulation, "_shape", lambda self, batch: object())
    two = simulated(recipe, target="cuda", ceilings=GPU)
    assert len(backwards) == 3
    assert one.peak_bytes == two.peak_bytes and one.held == two.held and one.flops == pytest.approx(two.flops)
    # The first row alone adds its gradients to none; of many rows, that is nearly none of them.
    assert sum(two.seconds.values()) <= sum(one.seconds.values()) <= 1.1 * sum(two.seconds.values())


@pytest.mark.parametrize("sizes", [dict(train_batch_size=3, max_tokens_per_batch=400), dict(train_batch_size=1)])
def test_rows_of_two_shapes_are_both_run_and_a_single_one_meets_no_gradients(monkeypatch, sizes):
    backwards, true = [], Loop._backward

    def backward(self, batch, rows):
        backwards.append((batch.num_tokens, any(p.grad is not None for p in self.model.parameters())))
        return true(self, batch, rows)

    monkeypatch.setattr(Loop, "_backward", backward)
    simulated(make_recipe(method="sft", **sizes))
    one = sum(LENGTHS) - 1  # the last token predicts nothing
    assert backwards == ([(one, False), (2 * one, True)] if sizes["train_batch_size"] == 3 else [(one, False)])


def test_weights_gradients_and_state_are_counted_by_their_parts():
    recipe = make_recipe(max_tokens_per_batch=256, max_length=256)
    held = simulated(recipe).held
    parameters = sum(p.numel() for p in build(STUDENT).parameters())
    assert held[WEIGHTS] == held[TEACHER_WEIGHTS] == 4 * parameters and held[STATE] == 8 * parameters
    assert held[GRADIENTS] == 4 * parameters  # of the first row, while the second runs


@pytest.mark.parametrize("teacher", ["hidden_cache", "top_k_cache", "online", "online_fp8"])
def test_a_cached_teacher_is_not_in_memory(teacher):
    held = simulated(make_recipe(method="lsp", teacher=teacher), target="cuda", ceilings=GPU).held
    body = sum(p.numel() for p in build(TEACHER).parameters())
    head = 2048 * 192
    assert body > 2 * head
    wanted = {"hidden_cache": 2 * head, "top_k_cache": 0, "online": 2 * body, "online_fp8": body + head}[teacher]
    assert held[TEACHER_WEIGHTS] == pytest.approx(wanted, rel=0.01)  # norms are not in 8 bits


def test_a_teacher_that_runs_beside_is_compiled_too():
    plain, compiled = (simulated(make_recipe(method="lsp", torch_compile=c)).seconds[READING] for c in (False, True))
    assert compiled < 0.9 * plain


@pytest.mark.parametrize("teacher", ["vector_cache", "adapter_off"])
def test_an_adapter_leaves_little_to_learn(teacher):
    held = simulated(make_recipe(teacher=teacher, lora_rank=4), target="cuda", ceilings=GPU).held
    parameters = sum(p.numel() for p in build(STUDENT).parameters())
    assert 2 * parameters < held[WEIGHTS] < 2.5 * parameters and 0 < held[STATE] < 0.2 * held[WEIGHTS]
    assert held[TEACHER_WEIGHTS] == 0


@pytest.mark.parametrize("num_layers", [12, pytest.param(36, marks=pytest.mark.slow)])
def test_a_qwen_holds_what_was_counted_by_hand(num_layers):
    """In bf16 170 kB more for each token and layer at Qwen3-4B's shape, compiled 86, and 12 to 14 bytes a parameter."""
    student = config_of("Qwen3-4B")
    student.num_hidden_layers, student.layer_types = num_layers, student.layer_types[:num_layers]

    def cost(num_traces, **changes):
        recipe = make_recipe(method="sft", max_tokens_per_batch=16384, train_batch_size=num_traces, **changes)
        return simulated(recipe, target="cuda", ceilings=GPU, student=student, lengths=(50, 800, 150))

    longer, shorter = cost(8), cost(7)  # so many that a step holds most before its gradients are there
    head = 151936 * 2560  # shared with the embeddings, and the one weight without a copy
    parameters = head + num_layers * 100_930_816 + 2560
    assert num_layers < 36 or parameters == 4_022_468_096
    assert longer.held[WEIGHTS] + longer.held[STATE] == 12 * parameters
    assert longer.held[COPIES] == 2 * (parameters - head)

    def added(longer, shorter):
        tokens = longer.num_tokens - shorter.num_tokens
        return (longer.held[ACTIVATIONS] - shorter.held[ACTIVATIONS]) / tokens / num_layers

    assert added(longer, shorter) == pytest.approx(170e3, rel=0.05)
    # More tokens, or the fullest moment is at the end, when all gradients are there and the activations are gone.
    compiled = (cost(count, torch_compile=True) for count in (16, 12))
    assert added(*compiled) == pytest.approx(85.8e3, rel=0.05)
    times_less = 5 if num_layers == 36 else 2  # one layer is there whole
    assert cost(8, gradient_checkpointing=True).held[ACTIVATIONS] < longer.held[ACTIVATIONS] / times_less


def test_a_smaller_chunk_of_logits_is_seen():
    large, small = (
        simulated(make_recipe(method="sft", loss_chunk_bytes=size), target="cuda", ceilings=GPU).peak_bytes
        for size in (2**29, 2**22)
    )
    assert small < large


def test_a_fused_optimizer_reads_and_writes_everything_once():
    cost = simulated(make_recipe(method="sft"), target="cuda", ceilings=GPU)
    moved = 7 * cost.held[WEIGHTS] + 3 * cost.held[COPIES]
    assert cost.seconds[OPTIMIZER] == pytest.approx(moved / GPU.copies)


@pytest.mark.parametrize("teacher", ["top_k_cache", "hidden_cache"])
def test_the_loss_holds_a_chunk_of_logits(teacher):
    recipe = make_recipe(method="lsp", teacher=teacher, loss_chunk_bytes=2**22, gradient_checkpointing=True)
    small = simulated(recipe, target="cuda", ceilings=GPU).held
    large = simulated(replace(recipe, loss_chunk_bytes=2**24), target="cuda", ceilings=GPU).held
    assert max(small.get(LOSS_WORK, 0), large[LOSS_WORK]) > 2**20 and sum(large.values()) > sum(small.values())


def test_a_torch_that_shows_nothing_of_what_it_compiles_is_said(monkeypatch):
    monkeypatch.setattr("trsd.live_bytes.LiveBytes.ignore_compile_internals", classmethod(lambda cls: False))
    torch.compiler.reset()
    with pytest.raises(InputError, match="torch_compile: torch .* does not show what it compiles"):
        simulated(make_recipe(method="sft", torch_compile=True))
    torch.compiler.reset()  # which remembers what it was not allowed to compile
