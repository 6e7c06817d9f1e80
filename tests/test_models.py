import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trsd.errors import InputError
from trsd.models import (
    load_model,
    load_tokenizer,
    model_folder,
    packed_hidden_states,
    plain_attention,
    refuse_unsupported,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from trsd_kernels import cu_seqlens_of, position_ids_of

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


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "phi3", "mistral"])
def test_packed_hidden_states_equal_each_sequence_alone(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    lengths = [5, 1, 11]
    rows = [torch.randint(640, (length,)) for length in lengths]
    alone = torch.cat([model.model(row[None]).last_hidden_state[0] for row in rows])
    model.set_attn_implementation("trsd_varlen")
    packed = packed_hidden_states(model, torch.cat(rows), position_ids_of(lengths), cu_seqlens_of(lengths))
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
    logits = model.lm_head(packed)
    assert torch.equal(packed @ model.get_output_embeddings().weight.T, logits) or torch.allclose(
        packed @ model.get_output_embeddings().weight.T, logits
    )


def test_a_call_without_cu_seqlens_is_refused_instead_of_mixing_sequences(tiny_model):
    with pytest.raises(ValueError, match="cu_seqlens"):
        tiny_model(torch.tensor([[1, 2, 3]]))


def test_an_attention_mask_on_packed_rows_is_refused(tiny_model):
    with pytest.raises(ValueError, match="cu_seqlens|attention_mask"):
        tiny_model.model(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 1, 2, 2), cu_seqlens=cu_seqlens_of([2]))


def test_plain_attention_is_undone_even_after_an_error(tiny_model):
    tiny_model.train()
    with pytest.raises(KeyError), plain_attention(tiny_model):
        assert tiny_model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 640)
        assert not tiny_model.training
        raise KeyError
    assert tiny_model.training and tiny_model.config._attn_implementation == "trsd_varlen"


def test_sliding_windows_shorter_than_a_sequence_are_refused():
    config = AutoConfig.for_model("mistral", **SMALL, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("trsd_varlen")
    with pytest.raises(ValueError, match="sliding window 4"):
        packed_hidden_states(model, torch.arange(6), position_ids_of([6]), cu_seqlens_of([6]))


@pytest.mark.parametrize(
    "kind,extra,message",
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {}, "sliding_attention|softcapping"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
    ],
)
def test_models_the_loss_would_get_wrong_are_refused_by_name(kind, extra, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra))
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(model)


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
