"""Named model shapes: the published parameter counts, and what a name may be."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trsd.errors import InputError
from trsd.model_shapes import SHAPES, config_of
from trsd.models import refuse_unsupported

PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen2.5-7B": 7_615_616_512,
    "Phi-4-mini": 3_836_021_760,
    "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_sizes(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    refuse_unsupported(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_names_may_carry_an_owner_and_a_suffix():
    wanted = config_of("Qwen3-4B").to_dict()
    assert config_of("Qwen/Qwen3-4B-Base").to_dict() == wanted


def test_bundled_models_and_folders_have_configs_too(tiny_folder):
    assert config_of("bundled:reasoner").model_type == "qwen3"
    assert config_of(str(tiny_folder)).hidden_size == 64


def test_an_unknown_name_says_which_are_known():
    with pytest.raises(InputError, match=r"Qwen3-4B.*no model folder at ./nothing"):
        config_of("./nothing")
