"""What a model folder's weight files are said to hold, by their headers."""

import json
import shutil

import pytest
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

from trsd.errors import InputError
from trsd.weight_files import INDEX, count_weights


def test_weights_are_counted_as_the_model_has_them(tiny_folder, tokenizer):
    assert count_weights(tiny_folder) == sum(weight.numel() for weight in make_tiny_model(tokenizer).parameters())


def test_shards_are_counted_together_and_what_the_index_does_not_name_is_not(tiny_folder):
    whole, tensors = count_weights(tiny_folder), load_file(tiny_folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tiny_folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tiny_folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert count_weights(tiny_folder) == whole


def test_a_second_copy_of_another_name_is_not_counted(tiny_folder):
    whole = count_weights(tiny_folder)
    shutil.copy(tiny_folder / "model.safetensors", tiny_folder / "consolidated.safetensors")
    assert count_weights(tiny_folder) == whole


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tiny_folder, text):
    (tiny_folder / INDEX).write_text(text)
    with pytest.raises(InputError, match="is no index of weight files"):
        count_weights(tiny_folder)


def test_a_file_that_lacks_its_last_bytes_is_refused(tiny_folder):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="not whole"):
        count_weights(tiny_folder)
