"""Averages of models and merged adapters: exact, streamed, loadable, and refused where there is no mean or no fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from test_adapters import save_adapted
from transformers import AutoModelForCausalLM

from trsd.adapters import add_adapter
from trsd.errors import InputError
from trsd.merge import main
from trsd.merging import merge, merge_adapter
from trsd.model_card import front_matter, serving_facts
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
    (folders[0] / "manifest.json").write_text("{}")  # of the first model's files
    main(words)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "out" / "config.json").exists() and "0.5 x" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(words)
    assert "exists already" in capsys.readouterr().err


FACTS = dict(
    method="trsd", closer="\n</think>\n", open_tag="<think>", close_tag="</think>", budgets=[0, 64, 256],
    max_thinking_tokens=300, max_answer_tokens=20,
)  # fmt: skip


def cards(folders, *changes):
    for folder, change in zip(folders, changes, strict=True):
        (folder / "README.md").write_text(front_matter({"trsd": FACTS | change}) + "\n")


def test_the_means_card_keeps_what_its_models_say_alike_and_no_path(folders, tmp_path, capsys):
    cards(folders[:2], {}, dict(method="lsp", budgets=[0, 256]))
    merge(folders[:2], tmp_path / "out")
    found = serving_facts(tmp_path / "out")
    assert found == FACTS | dict(method="trsd + lsp", budgets=[0, 256]) and not capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "change,said", [(dict(closer="\nSo\n</think>\n"), "differ in closer"), (None, "do not all have a card")]
)
def test_models_that_are_asked_in_several_ways_have_a_mean_that_says_none(folders, tmp_path, capsys, change, said):
    cards(folders[:2], {}, change or {})
    if change is None:
        (folders[1] / "README.md").unlink()
    merge(folders[:2], tmp_path / "out")
    assert serving_facts(tmp_path / "out") is None and said in capsys.readouterr().out


def test_a_config_that_is_no_json_is_named(folders, tmp_path):
    (folders[1] / "config.json").write_text("{broken")
    with pytest.raises(InputError, match="model1/config.json is not JSON"):
        merge(folders, tmp_path / "out")


@pytest.fixture
def adapter(tokenizer, tmp_path):
    """(base folder, checkpoint folder with an adapter/ that does something)."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    model = make_tiny_model(tokenizer)
    model.save_pretrained(base, max_shard_size="100KB")
    tokenizer.save_pretrained(base)
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    add_adapter(model, 4, seed=0, alpha=6, target_modules=["q_proj", "up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapted(model, tmp_path / "checkpoint-1")
    return base, tmp_path / "checkpoint-1"


def test_a_merged_adapter_is_the_checkpoint_bit_for_bit(adapter, tmp_path, capsys):
    base, checkpoint = adapter
    main(["--adapter", str(checkpoint / "adapter"), "--model", str(base), "--output", str(tmp_path / "out")])
    assert "out" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "with the adapter" in card and "checkpoint-1/adapter" in card
    wanted, got = tensors(checkpoint), tensors(tmp_path / "out")
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    before = tensors(base)
    moved = {name for name in before if not torch.equal(before[name], got[name])}
    assert moved and all("q_proj" in name or "up_proj" in name for name in moved)
    assert not list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / "tokenizer.json").exists()
    merge_adapter(checkpoint, base, tmp_path / "again")  # the checkpoint names its adapter as well
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    load_model(tmp_path / "out", dtype=torch.float32, device="cpu")


def test_an_adapter_of_a_half_precision_base_is_merged_into_fp32_with_its_small_steps(adapter, tokenizer, tmp_path):
    base, checkpoint = adapter
    make_tiny_model(tokenizer, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    save_file({key: 1e-5 * value for key, value in weights.items()}, checkpoint / "adapter/adapter_model.safetensors")
    merge_adapter(checkpoint / "adapter", tmp_path / "half", tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = load_file(tmp_path / "half/model.safetensors")[name], load_file(tmp_path / "out/model.safetensors")
    assert after[name].dtype == torch.float32 and 0 < (after[name] - before.float()).abs().max() < 1e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


def test_the_index_of_shards_says_their_new_size(adapter, tmp_path):
    base, checkpoint = adapter
    merge_adapter(checkpoint, base, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and index["metadata"]["total_size"] == size


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_is_merged_as_peft_merges_it(adapter, tmp_path, rslora):
    import peft

    base, _ = adapter
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"], use_rslora=rslora, init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "theirs")
    merge_adapter(tmp_path / "theirs", base, tmp_path / "out")
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensors(tmp_path / "out")[name], tensor, rtol=1e-6, atol=1e-6)


def rewritten(folder, change, rename=None):
    path = folder / "adapter_model.safetensors"
    save_file({(rename or str)(key): change(key, value) for key, value in load_file(path).items()}, path)


def test_fault_15_an_adapter_of_another_model_is_refused_by_what_does_not_fit(adapter, tmp_path):
    base, checkpoint = adapter
    folder = checkpoint / "adapter"

    def refused(match):
        with pytest.raises(InputError, match=match):
            merge_adapter(folder, base, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    weights = (folder / "adapter_model.safetensors").read_bytes()
    rewritten(folder, lambda key, value: value[:, :-1].contiguous() if "lora_A" in key else value)
    refused(r"another model: model.layers.0.mlp.up_proj.weight is \[96, 64\].*and B A of \[96, 4\] and \[4, 63\]")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    rewritten(folder, lambda _, value: value, lambda key: key.replace("layers.1", "layers.7"))
    refused("holds no model.layers.7")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    rewritten(folder, lambda _, value: value, lambda key: key.replace("lora_B", "lora_magnitude_vector"))
    refused("is no matrix of a plain LoRA")
    (folder / "adapter_model.safetensors").write_bytes(weights[:-50])
    refused("cannot be read")


@pytest.mark.parametrize(
    "change,match",
    [
        ({"use_dora": True}, "sets use_dora"),
        ({"bias": "all"}, "sets bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "sets alpha_pattern"),
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"lora_alpha": "much"}, "no LoRA adapter's config"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(adapter, tmp_path, change, match):
    base, checkpoint = adapter
    path = checkpoint / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=match):
        merge_adapter(checkpoint, base, tmp_path / "out")


def test_fault_27_an_adapter_in_a_pickle_is_refused_and_never_opened(adapter, tmp_path):
    base, checkpoint = adapter
    folder, touched = checkpoint / "adapter", tmp_path / "touched"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (touched,)

    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no adapter_model.safetensors"):
        merge_adapter(folder, base, tmp_path / "out")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match="adapter_model.bin is a pickle"):
        merge_adapter(folder, base, tmp_path / "out")
    assert not touched.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--adapter", "a"], "model: expected beside --adapter"),
        (["--model", "b"], "adapter: expected beside --model"),
        (["--adapter", "a", "--model", "b", "--models", "c,d"], "leave out one or the other"),
        ([], "expected two or more to average, or --adapter and --model"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
