"""LoRA through peft: what is trained, what a checkpoint holds, and training that goes on bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, make_tiny_model, refusal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trsd.adapters import adapter_off, add_adapter, load_adapter, merged_state
from trsd.checkpoint import shell_of, take_snapshot, write_snapshot
from trsd.errors import InputError
from trsd.models import packed_hidden_states
from trsd.optim import build_optimizer, state_tensors
from trsd_kernels import packed_layout

peft = pytest.importorskip("peft")


def adapted(tokenizer, *, rank=4, seed=0, tie=True, dtype=torch.float32, moved=True):
    """A tiny model with an adapter that does something."""
    model = make_tiny_model(tokenizer, tie=tie, dtype=dtype)
    add_adapter(model, rank, seed=seed)
    if moved:
        torch.manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model


def save_adapted(model, folder):
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    snapshot = take_snapshot(1, model=model, optimizer=optimizer, trainer={})
    write_snapshot(snapshot, folder, shell_of(model))


def hidden_states(model, ids=(5, 6, 7, 8, 9)):
    layout = packed_layout([len(ids)], [[]])
    return packed_hidden_states(model, torch.tensor(ids), layout, backend="sdpa")


def test_the_adapter_alone_is_trained_in_fp32_on_every_linear_layer_of_the_body(tokenizer):
    model = adapted(tokenizer, dtype=torch.bfloat16, tie=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * 2 * 7  # A and B, two layers of q, k, v, o, gate, up and down
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if name not in trained)
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_an_adapter_begins_as_nothing_and_is_the_same_for_a_seed(tokenizer):
    plain = hidden_states(make_tiny_model(tokenizer))
    one, again, other = (adapted(tokenizer, seed=seed, moved=False) for seed in (3, 3, 4))
    assert torch.equal(hidden_states(one), plain)
    states = [
        {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
        for model in (one, again, other)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_adding_an_adapter_leaves_the_random_state_alone(tokenizer):
    model = make_tiny_model(tokenizer)
    state = torch.get_rng_state()
    add_adapter(model, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_with_the_adapter_off_the_model_is_the_one_it_began_as(tokenizer):
    model = adapted(tokenizer)
    with_it = hidden_states(model)
    with adapter_off(model):
        assert torch.equal(hidden_states(model), hidden_states(make_tiny_model(tokenizer)))
    assert torch.equal(hidden_states(model), with_it)
    with pytest.raises(RuntimeError, match="out of"), adapter_off(model):
        raise RuntimeError("out of memory")
    assert torch.equal(hidden_states(model), with_it)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_the_merged_model_and_the_adapter_beside_it(tokenizer, tmp_path, tie, dtype):
    model = adapted(tokenizer, tie=tie, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapted(model, tmp_path / "saved")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not list((tmp_path / "saved").glob("adapter_*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="trsd_varlen")
    assert merged.dtype == torch.float32 and not any("lora" in name for name, _ in merged.named_parameters())
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr() or not tie
    atol = 1e-4 if dtype == torch.float32 else 2e-3  # the tiny model's rotary frequencies are rounded with its weights
    torch.testing.assert_close(hidden_states(merged), hidden_states(model.float()), rtol=1e-4, atol=atol)
    base = make_tiny_model(tokenizer, tie=tie, dtype=dtype).float()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter").base_model.model
    torch.testing.assert_close(hidden_states(loaded), hidden_states(model), rtol=1e-5, atol=1e-5)


def test_small_steps_survive_the_merge_into_weights_of_half_precision(tokenizer):
    model = adapted(tokenizer, dtype=torch.bfloat16, moved=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1e-6)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    found = merged_state(model)[f"{name}.weight"] - layer.base_layer.weight.float()
    torch.testing.assert_close(found, layer.get_delta_weight("default"), rtol=0.1, atol=1e-7)


def test_an_adapter_is_loaded_bit_for_bit_and_of_another_rank_refused(tokenizer, tmp_path):
    model = adapted(tokenizer)
    save_adapted(model, tmp_path)
    other = adapted(tokenizer, seed=9)
    load_adapter(other, tmp_path)
    assert torch.equal(hidden_states(other), hidden_states(model))
    with pytest.raises(InputError, match="another model or rank"):
        load_adapter(adapted(tokenizer, rank=3), tmp_path)
    with pytest.raises(FileNotFoundError, match="not resumed"):
        load_adapter(other, tmp_path / "adapter")


FLAGS = dict(lora_rank=4, max_steps=4, save_steps=1)


@pytest.mark.parametrize("teacher", ["hidden_cache", "vector_cache", "adapter_off"])
def test_training_an_adapter_resumes_bit_for_bit(run, tmp_path, teacher):
    flags = FLAGS | dict(teacher=teacher)
    whole = run("whole", **flags)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for later in (3, 4):
        shutil.rmtree(part / f"checkpoint-{later}")
    run("part", resume_from_checkpoint="latest", **flags)
    assert losses(part) == losses(whole)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / file) for folder in (whole, part))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file
    assert (whole / "teacher").exists() == (teacher != "adapter_off")


def test_training_an_adapter_moves_the_merged_weights_and_neither_head_nor_norms(run, tiny_folder):
    folder = run(**FLAGS) / "checkpoint-4"
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert sum(t.numel() for t in load_file(folder / "state" / "optimizer.safetensors").values()) < 50_000


def test_the_adapters_state_is_all_the_optimizer_holds(tokenizer):
    model = adapted(tokenizer)
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1)
    hidden_states(model).sum().backward()
    optimizer.step()
    assert all(".lora_" in key for key in state_tensors(model, optimizer))


def test_recomputed_activations_have_the_adapter_on(run):
    """The teacher's turn, with the adapter off, is between a forward pass and the recomputation in its backward."""
    flags = dict(lora_rank=4, max_steps=3, teacher="adapter_off")
    for one, other in zip(
        losses(run("kept", **flags)), losses(run("again", gradient_checkpointing=True, **flags)), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("flags", [dict(bf16=True), dict(branches_per_trace=2), dict(method="sft")])
def test_adapters_train_with_every_option(run, flags):
    flags = (dict(teacher="adapter_off") if "method" not in flags else {}) | flags
    rows = losses(run(lora_rank=4, max_steps=2, **flags))
    assert len(rows) == 2 and all(loss > 0 and norm > 0 for _, loss, norm in rows)


def test_without_peft_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'trsd[lora]'" in refusal(capsys, lambda: run(lora_rank=4))


def test_an_adapters_training_counts_frozen_matrices_once_in_the_backward_pass(tokenizer):
    """Against what torch counts of linear layers and lm_head; attention is the same for both and left out."""
    from torch.utils.flop_counter import FlopCounterMode

    from trsd.batching import Example, pack_examples
    from trsd.flops import FlopCounter

    example = Example(trace_index=0, input_ids=[5] * 50, labels=[6] * 50)
    batches = pack_examples([example], 100, "cpu")

    def counted(model):
        # What comes first has no gradient of its input to work out; in training embeddings do not learn, all else does.
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
        with FlopCounterMode(display=False) as counter:
            hidden = hidden_states(model, example.input_ids)
            (hidden @ model.get_output_embeddings().weight.T).sum().backward()
        return sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(name))

    plain, lora = make_tiny_model(tokenizer, tie=False), adapted(tokenizer, tie=False)
    saved = FlopCounter(plain).training(batches, recomputed=False)
    saved -= FlopCounter(lora).training(batches, recomputed=False)
    assert saved == pytest.approx(counted(plain) - counted(lora), rel=0.02)


def test_a_student_that_caps_its_logits_has_no_vectors_but_trains_an_adapter(run, tokenizer, tiny_folder, capsys):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=5.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tiny_folder)
    flags = dict(lora_rank=2, max_steps=1)
    error = refusal(capsys, lambda: run("run", teacher="vector_cache", **flags))
    assert "this student caps them" in error and not (tiny_folder.parent / "run").exists()
    assert losses(run("run", teacher="adapter_off", **flags))[0][1] > 0


def trained_layers(model):
    return {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "names,count",
    [
        (("q_proj", "v_proj"), 4),
        (("mlp.up_proj",), 2),
        (("layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"), 2),
    ],
)
def test_named_layers_alone_get_an_adapter(tokenizer, names, count):
    model = make_tiny_model(tokenizer)
    add_adapter(model, 4, seed=0, target_modules=names)
    layers = trained_layers(model)
    assert len(layers) == count and all(any(layer.endswith(name) for name in names) for layer in layers)


def test_alpha_scales_what_the_adapter_adds_and_what_is_merged(tokenizer):
    found = []
    for alpha in (None, 8, 16):
        model = make_tiny_model(tokenizer)
        add_adapter(model, 4, seed=0, alpha=alpha)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        found.append(merged_state(model)["model.layers.0.mlp.up_proj.weight"])
    weight = make_tiny_model(tokenizer).get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2] - weight, 2 * (found[1] - weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qproj", "proj", "mlp", "input_layernorm", ""])
def test_a_name_that_fits_no_linear_layer_is_refused_with_those_that_do(tokenizer, name):
    with pytest.raises(InputError, match="expected some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"):
        add_adapter(make_tiny_model(tokenizer), 4, seed=0, target_modules=["q_proj", name])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_an_adapter_that_the_loss_would_not_see_is_refused(tokenizer, name, tie):
    model = make_tiny_model(tokenizer, tie=tie)
    with pytest.raises(InputError, match="the loss would not see.*leave it out"):
        add_adapter(model, 4, seed=0, target_modules=["q_proj", name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_trains_the_layers_it_names_and_resumes(run, tmp_path, tiny_folder, capsys):
    flags = FLAGS | dict(lora_target_modules="q_proj,o_proj", lora_alpha=3)
    whole = run("whole", **flags)
    config = json.loads((whole / "checkpoint-4" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj"] and config["lora_alpha"] == 3
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(whole / "checkpoint-4/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "q_proj" in name or "o_proj" in name
    }
    shutil.rmtree(whole / "checkpoint-4")
    wanted = losses(whole)
    run("whole", resume_from_checkpoint="latest", **flags)
    assert losses(whole) == wanted
    assert "lm_head is an embedding" in refusal(
        capsys, lambda: run("other", lora_rank=4, lora_target_modules="lm_head")
    )


@pytest.mark.slow
def test_an_adapters_files_are_the_same_whatever_the_hash_seed(tmp_path):
    """peft keeps target_modules in a set, whose order changes from process to process."""
    code = (
        "import sys; from conftest import make_tiny_model, REASONER; from transformers import AutoTokenizer; "
        "from pathlib import Path; from trsd.adapters import add_adapter; from test_adapters import save_adapted; "
        "model = make_tiny_model(AutoTokenizer.from_pretrained(REASONER)); add_adapter(model, 4, seed=0); "
        "save_adapted(model, Path(sys.argv[1]))"
    )
    folders = []
    for seed in ("1", "2"):
        folders.append(tmp_path / seed)
        places = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(places)}
        subprocess.run([sys.executable, "-c", code, folders[-1]], check=True, env=environment, capture_output=True)
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(files) >= 4
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    names = json.loads((folders[0] / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
