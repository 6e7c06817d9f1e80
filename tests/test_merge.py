"""Averages of models: exact, streamed, loadable, and refused where there is no mean."""

import json

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trsd.errors import InputError
from trsd.merge import main, merge
from trsd.models import load_model


@pytest.fixture
def folders(tokenizer, tmp_path):
    """Three models of one shape, the second in several shards."""
    found = []
    for seed, shard in enumerate(("5GB", "100KB", "5GB")):
        folder = tmp_path / f"model{seed}"
        make_tiny_model(tokenizer, seed=seed).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        found.append(folder)
    return found


def tensors(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("weights", [(), (1, 1, 1), (2.0, 1.0, 5.0), (1, 0, 0)])
def test_the_mean_is_exact_to_rounding_and_loads(folders, weights, tmp_path):
    merge(folders, tmp_path / "out", weights=weights)
    parts, given = [tensors(folder) for folder in folders], weights or (1, 1, 1)
    for name, tensor in tensors(tmp_path / "out").items():
        exact = sum(w * part[name].double() for w, part in zip(given, parts, strict=True)) / sum(given)
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
    load_model(tmp_path / "out", dtype=torch.float32, device="cpu")


def test_the_shards_are_the_first_models(folders, tmp_path):
    merge([folders[1], folders[0]], tmp_path / "out")
    names = sorted(path.name for path in folders[1].glob("*.safetensors"))
    assert len(names) > 1 and names == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    load_model(tmp_path / "out", dtype=torch.float32, device="cpu")


def test_bf16_weights_are_summed_before_they_are_rounded(folders, tokenizer, tmp_path):
    for seed, folder in enumerate(folders[:2]):
        make_tiny_model(tokenizer, seed=seed, dtype=torch.bfloat16).save_pretrained(folder)
    merge([folders[0], folders[0], folders[0]], tmp_path / "out")
    one, out = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "out"))
    assert all(out[name].dtype == torch.bfloat16 and torch.equal(out[name], one[name]) for name in one)


def test_whole_numbers_must_agree(folders, tmp_path):
    def add(folder, value):
        path = folder / "model.safetensors"
        save_file({**load_file(path), "counter": torch.tensor([value])}, path)

    for folder in (folders[0], folders[2]):
        add(folder, 7)
    merge([folders[0], folders[2]], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["counter"].tolist() == [7]
    add(folders[2], 8)
    with pytest.raises(InputError, match="counter holds whole numbers that differ"):
        merge([folders[0], folders[2]], tmp_path / "again")


def test_models_that_are_not_alike_are_refused_by_what_differs(folders, tokenizer, tmp_path):
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="rms_norm_eps is 0.1 and 1e-06"):
        merge(folders, tmp_path / "out")
    (folders[1] / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere", "use_cache": False}))
    path = folders[2] / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"model.norm.weight has shape \[3\] and \[64\]"):
        merge(folders, tmp_path / "out")
    save_file({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}, path)
    with pytest.raises(InputError, match="only one of them holds model.norm.weight"):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_another_tokenizer_is_refused(folders, tokenizer, tmp_path):
    other = type(tokenizer).from_pretrained(folders[1])
    other.add_tokens(["<extra>"])
    other.save_pretrained(folders[1])
    with pytest.raises(InputError, match="different tokenizers"):
        merge(folders, tmp_path / "out")


@pytest.mark.parametrize(
    "words,message",
    [
        (["--weights", "1,2"], "expected one per model, got 2 for 3"),
        (["--weights", "1,-1,0"], "numbers of 0 or more"),
        (["--weights", "1e308,1e308,1e308"], "numbers of 0 or more"),
        (["--weights", "0,0,0"], "do not sum to 0"),
        (["--models", "/no/such/folder,/nor/this"], "no model folder at"),
    ],
)
def test_the_command_line_refuses_with_exit_code_2(folders, words, message, tmp_path, capsys):
    models = [] if "--models" in words else ["--models", ",".join(map(str, folders))]
    with pytest.raises(SystemExit) as exit_:
        main([*models, "--output", str(tmp_path / "out"), *words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_writes_a_model_once(folders, tmp_path, capsys):
    words = ["--models", ",".join(map(str, folders[:2])), "--output", str(tmp_path / "out")]
    main(words)
    assert (tmp_path / "out" / "config.json").exists() and "0.5 x" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(words)
    assert "exists already" in capsys.readouterr().err


def test_a_config_that_is_no_json_is_named(folders, tmp_path):
    (folders[1] / "config.json").write_text("{broken")
    with pytest.raises(InputError, match="model1/config.json is not JSON"):
        merge(folders, tmp_path / "out")
