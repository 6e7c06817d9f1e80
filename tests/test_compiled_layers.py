"""Layers that are compiled: the same states and gradients, less that is kept, and themselves when not in use."""

import json
import shutil
import signal

import pytest
import torch
from conftest import losses, make_tiny_model
from test_models import KINDS, small_model
from torch._dynamo.utils import counters

from trsd.compiled_layers import CompilationFailed, CompiledLayers
from trsd.errors import InputError
from trsd.fused_meter import fused
from trsd.models import decoder_layers, load_model, model_folder, packed_hidden_states
from trsd.recomputation import recompute_activations
from trsd_kernels import packed_layout

LAYOUTS = (
    ([9, 1, 14], [[(4, 5), (9, 3), (0, 2)], [], [(13, 6)]]),
    ([30], None),
    ([7, 8], [[(4, 5)], []]),
    ([40, 2, 3], None),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def states_and_gradients(model, layout, ids, *, backend="sdpa"):
    hidden = packed_hidden_states(model, ids, layout, backend=backend)
    parameters = dict(model.get_decoder().named_parameters())
    # Some direction: behind a norm the sum of squares is a constant, and its gradient rounding alone.
    towards = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(hidden)
    gradients = torch.autograd.grad((hidden * towards).sum(), list(parameters.values()))
    return {"hidden": hidden.detach(), **dict(zip(parameters, gradients, strict=True))}


QUICK = ("qwen3",)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_rows_of_every_shape_and_all_layers_share_one_compilation(kind):
    extra = {"layer_types": ["sliding_attention", "full_attention"] * 3} if kind == "gemma3_text" else {}
    model = small_model(kind, num_hidden_layers=6, **extra).train()
    for parameter in model.parameters():
        parameter.data /= 5.0
    model.set_attn_implementation("trsd_varlen")
    layers, graphs = CompiledLayers([model], fused), []
    for parts in LAYOUTS:
        layout = packed_layout(*parts)
        ids = torch.randint(640, (layout.num_tokens,))
        want = states_and_gradients(model, layout, ids)
        with layers.in_use():
            got = states_and_gradients(model, layout, ids)
            with torch.no_grad():
                read = packed_hidden_states(model, ids, layout, backend="sdpa")
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(read, want["hidden"], rtol=1e-9, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 8 <= graphs[0] == graphs[-1] <= 10, graphs  # before and behind attention, of layer and attention module


@pytest.mark.parametrize(
    "kind,extra",
    [
        ("mixtral", dict(num_local_experts=4)),
        pytest.param(
            "qwen3_moe",
            dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_experts_stay_outside_like_attention(kind, extra):
    model = small_model(kind, **extra).float().train()  # grouped products are not there in float64
    for parameter in model.parameters():
        parameter.data /= 5.0
    model.set_attn_implementation("trsd_varlen")
    layers = CompiledLayers([model], fused)
    for lengths in ([9, 14], [30], [7, 3, 20]):
        layout = packed_layout(lengths)
        ids = torch.randint(640, (layout.num_tokens,))
        want = states_and_gradients(model, layout, ids)
        with layers.in_use():
            got = states_and_gradients(model, layout, ids)
        for name, tensor in want.items():
            assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    assert counters["stats"]["unique_graphs"] <= 10
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"]), counters["graph_break"]


def test_layers_are_themselves_when_not_in_use_whatever_happens_inside(tiny_model):
    layers, own = CompiledLayers([tiny_model, tiny_model], fused), decoder_layers(tiny_model, "torch_compile")
    with pytest.raises(RuntimeError, match="stop"), layers.in_use():
        assert all("forward" in layer.__dict__ for layer in own)
        raise RuntimeError("stop")
    assert len(own) > 1 and not any("forward" in layer.__dict__ for layer in own)
    with CompiledLayers([]).in_use():
        assert not any("forward" in layer.__dict__ for layer in own)


@pytest.mark.slow
def test_a_forward_that_somebody_else_put_there_is_compiled_and_put_back(tiny_model):
    layer, calls = decoder_layers(tiny_model, "torch_compile")[0], []
    inner = layer.forward

    def forward(*args, **kwargs):
        calls.append(len(args))
        return inner(*args, **kwargs)

    layer.forward = forward
    with CompiledLayers([tiny_model], fused).in_use(), torch.no_grad():
        packed_hidden_states(tiny_model, torch.arange(5), packed_layout([5]), backend="sdpa")
    assert layer.forward is forward and len(calls) == 1


def test_hooks_of_a_layer_run_around_it(tiny_model):
    seen = []
    for layer in decoder_layers(tiny_model, "torch_compile"):
        layer.register_forward_pre_hook(lambda module, args: seen.append(module))
    with CompiledLayers([tiny_model], fused).in_use(), torch.no_grad():
        packed_hidden_states(tiny_model, torch.arange(5), packed_layout([5]), backend="sdpa")
    assert seen == decoder_layers(tiny_model, "torch_compile")


@pytest.mark.slow
def test_the_checkpoint_of_recomputed_layers_stays_around_what_is_compiled():
    model = small_model("qwen3").train()
    for parameter in model.parameters():
        parameter.data /= 5.0
    model.set_attn_implementation("trsd_varlen")
    recompute_activations(model, "full")
    layout = packed_layout([9, 14])
    ids = torch.randint(640, (layout.num_tokens,))
    want = states_and_gradients(model, layout, ids)
    counters.clear()
    with CompiledLayers([model], fused).in_use():
        got = states_and_gradients(model, layout, ids)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    assert 4 <= counters["stats"]["unique_graphs"] <= 10
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"]), counters["graph_break"]


def kept(model, ids, layout):
    """Bytes of the tensors that a forward pass keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = packed_hidden_states(model, ids, layout, backend="sdpa")
    hidden.sum().backward()
    return sum(storages.values())


@pytest.mark.slow
def test_torchs_compiler_keeps_what_the_meter_says_and_a_third_less_than_layers_that_are_not_compiled(tokenizer):
    model = make_tiny_model(tokenizer).train()
    layout = packed_layout([200, 150])
    ids = torch.randint(len(tokenizer), (layout.num_tokens,))
    found = [kept(model, ids, layout)]
    for backend in (fused, "inductor"):
        torch.compiler.reset()
        with CompiledLayers([model], backend).in_use():
            found.append(kept(model, ids, layout))
    plain, counted, compiled = found
    assert compiled == pytest.approx(counted, rel=0.01) and compiled < 0.67 * plain, found


def test_a_run_with_compiled_layers_learns_the_same(run, capfd):
    plain = run("plain", teacher="online", validation_samples=2, save_steps=3)
    capfd.readouterr()
    flags = dict(teacher="online", validation_samples=2, save_steps=3, torch_compile=True)
    compiled = run("compiled", **flags)
    out, err = capfd.readouterr()
    assert "layers: compiled" in out and "torch" not in err, err
    for one, other in zip(losses(plain), losses(compiled), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    best = [json.loads((folder / "best.json").read_text())["validation_loss"] for folder in (plain, compiled)]
    assert best[1] == pytest.approx(best[0], rel=1e-4)
    shutil.rmtree(compiled / "checkpoint-6")
    run("compiled", resume_from_checkpoint="latest", **flags)
    for one, other in zip(losses(plain), losses(compiled), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(gradient_checkpointing=True, branches_per_trace=2),
        dict(lora_rank=4, teacher="adapter_off"),
        dict(method="sft", train_batch_size=8),
    ],
    ids=str,
)
def test_every_kind_of_step_learns_the_same_compiled(run, flags):
    plain, compiled = run("plain", **flags), run("compiled", torch_compile=True, **flags)
    for one, other in zip(losses(plain), losses(compiled), strict=True):
        assert other == pytest.approx(one, rel=2e-4)


@pytest.mark.slow
def test_a_base_in_4_bits_learns_as_well_compiled(run):
    flags = dict(lora_rank=4, lora_base="nf4", bf16=True)
    plain, compiled = run("plain", **flags), run("compiled", torch_compile=True, **flags)
    for one, other in zip(losses(plain), losses(compiled), strict=True):
        assert other == pytest.approx(one, rel=0.05)


@pytest.mark.slow
def test_in_bf16_what_is_fused_is_rounded_less():
    folder = model_folder("bundled:reasoner")
    layout = packed_layout([120, 80])
    ids = torch.randint(300, (layout.num_tokens,), generator=torch.Generator().manual_seed(0))

    def states(dtype, *, compiled=False):
        model = load_model(folder, dtype=dtype, device="cpu")
        with CompiledLayers([model] if compiled else []).in_use(), torch.no_grad():
            return packed_hidden_states(model, ids, layout, backend="sdpa").double()

    exact = states(torch.float64)
    plain, compiled = ((states(torch.bfloat16, compiled=c) - exact).norm() / exact.norm() for c in (False, True))
    assert compiled < 0.9 * plain < 0.05, (compiled, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_a_gpu_compiled_layers_are_as_near_to_float64_as_others(backend):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=4)
    model = small_model("qwen3", **sizes).train()
    for parameter in model.parameters():
        parameter.data /= 5.0
    model.set_attn_implementation("trsd_varlen")
    low = small_model("qwen3", **sizes).to(torch.bfloat16).cuda().train()
    low.load_state_dict(model.state_dict())
    low.set_attn_implementation("trsd_varlen")
    layers, graphs = CompiledLayers([low], "inductor"), []
    for parts in (([300, 77, 200], [[(100, 30), (250, 9)], [], []]), ([600], None), ([513, 8], [[(40, 3)], []])):
        if backend == "torch" and parts[1]:
            parts = (parts[0], None)
        layout = packed_layout(*parts)
        ids = torch.randint(640, (layout.num_tokens,))
        exact = states_and_gradients(model, layout, ids)
        errors = {}
        for compiled in (False, True):
            with CompiledLayers([]).in_use() if not compiled else layers.in_use():
                got = states_and_gradients(low, layout.to("cuda"), ids.cuda(), backend=backend)
            errors[compiled] = {
                name: float((tensor.cpu().double() - exact[name]).norm() / exact[name].norm())
                for name, tensor in got.items()
            }
        for name, error in errors[True].items():
            assert error <= 1.3 * errors[False][name] + 2e-3, (name, error, errors[False][name])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] <= 10, graphs


def broken(graph, inputs):
    raise RuntimeError("In file included from main.cpp\nmain.cpp:1:10: fatal error: Python.h: no such file\n1 error")


def run_layers(model, backend):
    with CompiledLayers([model], backend).in_use(), torch.no_grad():
        packed_hidden_states(model, torch.arange(5), packed_layout([5]), backend="sdpa")


def test_layers_that_cannot_be_compiled_are_said_in_a_line(tiny_model):
    with pytest.raises(CompilationFailed, match=r"here \(RuntimeError: main.cpp:1:10: fatal error: Python.h.*: leave"):
        run_layers(tiny_model, broken)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(tiny_model, "torch_compile"))


def test_memory_that_runs_out_in_a_compiler_is_memory_that_runs_out(tiny_model):
    def out_of_memory(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        run_layers(tiny_model, out_of_memory)


def test_a_model_whose_layers_are_not_to_be_seen_is_refused(tiny_model):
    class Held(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.held = layers

    tiny_model.model.layers = Held(tiny_model.model.layers)
    with pytest.raises(InputError, match="torch_compile: Qwen3ForCausalLM has no list of layers"):
        CompiledLayers([tiny_model])


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_whose_layers_cannot_be_compiled_ends_in_a_line(run, monkeypatch, capsys, interrupted):
    """Where a signal came, which a terminal gives to the compiler as well, as interrupted."""

    def compiler(self):
        def backend(graph, inputs):
            if interrupted:
                signal.raise_signal(signal.SIGTERM)
            return broken(graph, inputs)

        return backend

    monkeypatch.setattr("trsd.placement.Placement.compiler", property(compiler))
    with pytest.raises(SystemExit) as exit_:
        run("broken", torch_compile=True)
    if interrupted:
        assert exit_.value.code == 143 and "ended by SIGTERM; --resume_from_checkpoint" in capsys.readouterr().err
    else:
        assert str(exit_.value.code).startswith("error: torch_compile: torch cannot compile these layers here (")
