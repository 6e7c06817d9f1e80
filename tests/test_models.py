from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trsd import models
from trsd.errors import InputError
from trsd.models import (
    load_model,
    load_tokenizer,
    logit_options,
    model_folder,
    packed_attention_backend,
    packed_hidden_states,
    refuse_unsupported,
    tokenizer_fingerprint,
    weights_fingerprint,
    with_attention,
)
from trsd.recomputation import recompute_activations
from trsd_kernels import packed_layout

SMALL = dict(
    vocab_size=640,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)


# What each kind needs beside the sizes; Gemma's windows are shorter than the sequences.
KINDS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": dict(sliding_window=6),
    "phi3": dict(sliding_window=7),
    "phi4-mini": dict(
        model_type="phi3",
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.3],
            long_factor=[2.0, 3.0, 4.0],
            original_max_position_embeddings=64,
        ),
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    ),
    "gemma2": dict(sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3_text": dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8),
}


def small_model(kind, **extra):
    torch.manual_seed(0)
    settings = SMALL | KINDS.get(kind, {}) | extra
    config = AutoConfig.for_model(settings.pop("model_type", kind), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data *= 5.0  # far from uniform attention, so that what is wrong shows
    return model


def alone(model, sequence, monkeypatch):
    """Final hidden states of one sequence by transformers' own attention, softmax in float64."""
    softmax = torch.nn.functional.softmax
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        return model.model(sequence[None], use_cache=False).last_hidden_state[0]


def check_each_sequence_alone(model, layout, monkeypatch):
    """Packed, every sequence has the hidden states it has by itself; returns the packed ones."""
    ids = torch.randint(640, (layout.num_tokens,))
    places = [layout.sequence(segment) for segment in range(layout.num_segments)]
    separate = [alone(model, ids[place], monkeypatch) for place in places]
    model.set_attn_implementation("trsd_varlen")
    packed = packed_hidden_states(model, ids, layout)
    for place, hidden in zip(places, separate, strict=True):
        torch.testing.assert_close(packed[place], hidden, rtol=1e-5, atol=1e-5)
    return packed


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_each_sequence_alone(kind, monkeypatch):
    model = small_model(kind)
    layout = packed_layout([9, 1, 14], [[(4, 5), (9, 3), (0, 2)], [], [(13, 6)]])
    packed = check_each_sequence_alone(model, layout, monkeypatch)
    torch.testing.assert_close(packed @ model.get_output_embeddings().weight.T, model.lm_head(packed))


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_packed_rows_survive_gradient_checkpointing(kind):
    model = small_model(kind)
    model.set_attn_implementation("trsd_varlen")
    layout = packed_layout([9], [[(4, 5)]])
    ids = torch.randint(640, (layout.num_tokens,))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            recompute_activations(model, "full")
        model.train()
        loss = packed_hidden_states(model, ids, layout).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.model.layers.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_call_without_a_layout_is_refused_instead_of_mixing_sequences(tiny_model):
    with pytest.raises(ValueError, match="its layout"):
        tiny_model(torch.tensor([[1, 2, 3]]))


def test_an_attention_mask_on_packed_rows_is_refused(tiny_model):
    with pytest.raises(ValueError, match="attention_mask"):
        tiny_model.model(
            torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 1, 2, 2), packed_layout=packed_layout([2])
        )


def test_dropout_inside_attention_is_refused():
    model = small_model("qwen3", attention_dropout=0.1).train()
    model.set_attn_implementation("trsd_varlen")
    with pytest.raises(InputError, match="attention_dropout to 0"):
        packed_hidden_states(model, torch.arange(4), packed_layout([4]))


@pytest.mark.parametrize("kind,longest", [("longrope", 17), ("dynamic", 33)])
def test_rotary_factors_that_change_with_the_length_are_not_mixed(kind, longest):
    rope = dict(rope_type=kind, rope_theta=1e4, factor=2.0, original_max_position_embeddings=16)
    if kind == "longrope":
        rope |= dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    else:
        rope.pop("original_max_position_embeddings")
    extra = dict(rope_parameters=rope, max_position_embeddings=32, original_max_position_embeddings=16)
    model = small_model("phi3" if kind == "longrope" else "llama", sliding_window=None, **extra)
    model.set_attn_implementation("trsd_varlen")

    def run(*lengths):
        layout = packed_layout(lengths)
        return packed_hidden_states(model, torch.zeros(layout.num_tokens, dtype=torch.int64), layout)

    run(longest - 1, 5)
    with pytest.raises(InputError, match=f"{kind} rotary .* sequences of 5 to {longest}: lower max_length to"):
        run(longest, 5)
    if kind == "longrope":
        run(longest, longest + 3)
    with pytest.raises(InputError, match=f"{kind} rotary"):  # a branch can be what is long
        packed_hidden_states(
            model, torch.zeros(longest + 2, dtype=torch.int64), packed_layout([longest - 3], [[(longest - 5, 5)]])
        )


@pytest.mark.parametrize("lengths,branches", [([7], None), ([5], [[(4, 3)]]), ([3, 6], None)])
def test_windows_begin_to_matter_one_token_after_their_length(lengths, branches, monkeypatch):
    check_each_sequence_alone(small_model("mistral"), packed_layout(lengths, branches), monkeypatch)  # a window of 6


def test_a_layer_that_is_not_causal_is_refused():
    model = small_model("qwen3")
    model.set_attn_implementation("trsd_varlen")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(InputError, match="not causal"):
        packed_hidden_states(model, torch.arange(4), packed_layout([4]))


def test_a_window_matters_to_the_choice_only_where_a_sequence_reaches_it():
    config = small_model("mistral").config  # which has no layer_types
    here = dict(device="cuda", dtype=torch.bfloat16, branches=True)
    seen = []

    def choose(request, wanted):
        seen.append(request.window)
        return wanted

    for max_length in (None, 7, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "choose_backend", choose)
            packed_attention_backend(config, "torch", **here, max_length=max_length)
    assert seen == [6, 6, 0]


def test_with_attention_is_undone_even_after_an_error(tiny_model):
    tiny_model.train()
    with pytest.raises(KeyError), with_attention(tiny_model, "sdpa"):
        assert tiny_model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 640)
        assert not tiny_model.training
        raise KeyError
    assert tiny_model.training and tiny_model.config._attn_implementation == "trsd_varlen"


@pytest.mark.parametrize(
    "kind,extra,message",
    [
        ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("qwen3_next", {}, "linear_attention.*recurrent state"),
        ("lfm2", dict(layer_types=["conv", "full_attention"]), "conv.*recurrent state"),
        ("qwen3_moe", dict(expert_capacity=4), "expert_capacity.*drop tokens"),
        ("phi", {}, "lm_head without bias"),
    ],
)
def test_models_that_packed_rows_would_get_wrong_are_refused_by_name(kind, extra, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra))
    with pytest.raises(InputError, match=message):
        refuse_unsupported(model)


@pytest.mark.parametrize(
    "kind,extra,options",
    [
        ("qwen3", {}, {}),
        ("gemma2", dict(final_logit_softcapping=30.0), dict(student_logit_softcap=30.0)),
        ("granite", dict(logits_scaling=8.0), dict(student_logit_scale=0.125)),
        ("cohere", dict(logit_scale=0.0625), dict(student_logit_scale=0.0625)),
    ],
)
def test_what_a_model_does_to_its_logits_becomes_an_option_of_the_loss(kind, extra, options):
    model = small_model(kind, **extra)
    assert logit_options(model.config, "student") == options
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    nothing = dict.fromkeys(["past_key_values", "cache", "hidden_states", "attentions"])
    model.model.forward = lambda *_, **__: SimpleNamespace(last_hidden_state=hidden, **nothing)
    plain = hidden @ model.get_output_embeddings().weight.T
    scaled = plain * options.get("student_logit_scale", 1.0)
    if cap := options.get("student_logit_softcap"):
        scaled = cap * torch.tanh(scaled / cap)
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, scaled)


def test_a_back_end_that_cannot_serve_the_model_is_refused_with_the_reason(tiny_model):
    here = dict(device="cpu", dtype=torch.float32, branches=True)
    assert packed_attention_backend(tiny_model.config, "auto", **here) == "sdpa"
    with pytest.raises(InputError, match="attn_implementation: .*triton cannot serve rows with branches: .*CUDA"):
        packed_attention_backend(tiny_model.config, "triton", **here)
    gemma = small_model("gemma2").config
    with pytest.raises(InputError, match="no softcap|needs CUDA"):
        packed_attention_backend(gemma, "torch", **here)


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "nowhere", "bundled:nothing"])
def test_missing_model_says_what_was_looked_for(name):
    with pytest.raises(FileNotFoundError, match="no model folder at|nothing is bundled"):
        model_folder(name)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        model_folder(str(tmp_path))


def test_fingerprints_follow_content(tokenizer, tiny_folder, tmp_path):
    one = weights_fingerprint(tiny_folder)
    assert one == weights_fingerprint(tiny_folder)
    make_tiny_model(tokenizer, seed=1).save_pretrained(tiny_folder)
    assert weights_fingerprint(tiny_folder) != one
    assert tokenizer_fingerprint(load_tokenizer(tiny_folder)) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        weights_fingerprint(tmp_path)


def test_loaded_model_is_the_saved_one(tokenizer, tiny_folder):
    model = load_model(tiny_folder, dtype=torch.float32, device="cpu")
    saved = make_tiny_model(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "granite", "gemma2"])
def test_kinds_that_can_pass_what_loading_checks(kind, dtype, tmp_path):
    """Experts without a capacity, logits scaled and capped."""
    extra = dict(
        qwen3_moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        granite=dict(logits_scaling=8.0),
        gemma2=dict(final_logit_softcapping=1.0),
    )
    small_model(kind, **extra.get(kind, {})).float().save_pretrained(tmp_path)
    load_model(tmp_path, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind,extra,message",
    [
        ("hyperclovax", dict(logits_scaling=0.125), "its logits are not its hidden states times the lm_head"),
        ("stablelm", {}, "StableLmForCausalLM cannot run packed rows, choose another architecture"),
        ("recurrent_gemma", {}, "RecurrentGemmaForCausalLM"),
        (
            "deepseek_v3",
            dict(
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                first_k_dense_replace=2,
            ),
            "DeepseekV3ForCausalLM cannot run packed rows",
        ),
    ],
)
def test_kinds_that_fail_what_loading_checks_are_refused_by_name(kind, extra, message, dtype, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", ["the whole trunk", "nothing of the trunk"])
def test_branches_that_see_too_much_or_too_little_are_found_when_loading(seen, dtype, tiny_folder, monkeypatch):
    true = models.varlen_attention

    def wrong(*tensors, layout, **options):
        if layout.has_branches:
            cut = 4 if seen == "the whole trunk" else 0
            layout = packed_layout([3, 4], [[], [(cut, 3)]])
        return true(*tensors, layout=layout, **options)

    monkeypatch.setattr(models, "varlen_attention", wrong)
    with pytest.raises(InputError, match="do not keep packed sequences apart"):
        load_model(tiny_folder, dtype=dtype, device="cpu")


def test_models_that_mix_packed_sequences_are_refused_by_name(tmp_path, tokenizer):
    config = AutoConfig.for_model("bloom", vocab_size=640, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BloomForCausalLM"):
        load_model(tmp_path, dtype=torch.float32, device="cpu")


def test_incomplete_weights_are_refused_instead_of_drawn_at_random(tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="incomplete, 1 tensors .*up_proj"):
        load_model(tiny_folder, dtype=torch.float32, device="cpu")


def test_truncated_weights_are_refused(tiny_folder):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tiny_folder, dtype=torch.float32, device="cpu")


def test_the_folder_of_a_run_is_told_its_last_checkpoint(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"its last checkpoint is .*checkpoint-10$"):
        model_folder(str(tmp_path))


def test_a_model_of_the_hub_comes_with_its_card(monkeypatch, tmp_path):
    """Which says how it is to be asked."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(kw) or str(tmp_path))
    assert model_folder("owner/model") == tmp_path
    wanted = {"README.md", "config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"}
    assert wanted == {name for name in wanted if any(fnmatch(name, each) for each in asked[0]["allow_patterns"])}
