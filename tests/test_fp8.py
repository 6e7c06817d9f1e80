"""A teacher in 8 bits: how far off it is, what stays, and where it is refused."""

import pytest
import torch
from conftest import losses, make_tiny_model, refusal
from torch import nn

from trsd import train
from trsd.errors import InputError
from trsd.fp8 import Fp8Linear, rows_have_products, scaled, to_fp8

needs_products = pytest.mark.skipif(not rows_have_products(), reason="this torch has no fp8 products on a CPU")


def test_rows_come_back_within_the_rounding_of_e4m3():
    tensor = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-4], [1.0], [1e3], [7.0], [0.0]]
    )
    rows, scale = scaled(tensor)
    back = rows.float() * scale
    assert rows.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    for row, wanted in zip(back, tensor, strict=True):
        assert (row - wanted).abs().max() <= wanted.abs().max() / 28  # 3 bits behind the leading one
    assert not back[4].any()


@needs_products
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_off_by_some_percent(bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias).bfloat16()
    hidden = torch.randn(2, 5, 64).bfloat16()
    wanted, got = linear(hidden).float(), Fp8Linear(linear)(hidden).float()
    assert got.shape == (2, 5, 96) and 0.005 < (got - wanted).norm() / wanted.norm() < 0.06


@needs_products
def test_the_body_changes_and_the_head_does_not(tokenizer):
    model = make_tiny_model(tokenizer, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    assert to_fp8(model) == 14  # two layers of seven
    assert model.get_output_embeddings() is head and head.weight.dtype == torch.bfloat16
    kinds = {type(module) for module in model.get_decoder().modules()}
    assert Fp8Linear in kinds and nn.Linear not in kinds


@needs_products
def test_a_model_in_fp32_is_refused(tokenizer):
    with pytest.raises(InputError, match="--bf16 True"):
        to_fp8(make_tiny_model(tokenizer))


def test_a_torch_without_products_on_a_cpu_is_refused(tokenizer, monkeypatch):
    def without(*_, **__):
        raise RuntimeError("_scaled_mm only supports per-tensor scaling for CPU backend")

    monkeypatch.setattr(torch, "_scaled_mm", without)
    with pytest.raises(InputError, match="no fp8 products on a CPU: update it"):
        to_fp8(make_tiny_model(tokenizer, dtype=torch.bfloat16))


@needs_products
def test_training_learns_from_it(run):
    exact = losses(run("exact", teacher="online", bf16=True))
    coarse = losses(run("coarse", teacher="online_fp8", bf16=True))
    assert exact != coarse
    for (_, wanted, _), (_, got, _) in zip(exact, coarse, strict=True):
        assert got == pytest.approx(wanted, rel=0.2)


@needs_products
def test_training_in_fp32_is_refused(words, capsys):
    assert "--bf16 True" in refusal(capsys, lambda: train.main(words(teacher="online_fp8", bf16=False)))
