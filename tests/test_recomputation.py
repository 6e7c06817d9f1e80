"""Activations that are computed again in the backward pass: the same gradients, for less memory."""

import pytest
import torch
from conftest import make_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from trsd.live_bytes import LiveBytes
from trsd.metrics import read_metrics
from trsd.models import decoder_layers, packed_hidden_states
from trsd.recomputation import Recomputed, keep_activations, recompute_activations, recomputes
from trsd_kernels import packed_layout

POLICIES = (None, "selective", "full")


def measured(tokenizer, policy):
    """(gradients, operations, most bytes that were live) of a forward and backward pass."""
    model = make_tiny_model(tokenizer).train()
    if policy:
        recompute_activations(model, policy)
    layout = packed_layout([200, 150], [[(120, 30)], []])
    ids = torch.randint(0, len(tokenizer), (layout.num_tokens,), generator=torch.Generator().manual_seed(0))

    def step():
        packed_hidden_states(model, ids, layout, backend="sdpa").square().sum().backward()

    with LiveBytes() as live:
        step()
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        step()
    return {name: p.grad for name, p in model.named_parameters()}, counter.get_total_flops(), live.peak


def test_selective_recomputation_runs_no_product_twice_and_lies_between_in_memory(tokenizer):
    (none, flops, most), (some, same, between), (all_, more, least) = (measured(tokenizer, p) for p in POLICIES)
    for name, gradient in none.items():
        assert torch.equal(gradient, some[name]) and torch.equal(gradient, all_[name]), name
    assert flops == same < more
    assert least < 0.9 * between and between < 0.9 * most, (least, between, most)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_runs_twice_in_training_and_its_hooks_once(tiny_model, training):
    tiny_model.train(training)
    recompute_activations(tiny_model, "full")
    hooked, run = [], []
    for layer in decoder_layers(tiny_model, "gradient_checkpointing"):
        layer.register_forward_pre_hook(lambda module, args: hooked.append(module))
        layer.mlp.register_forward_pre_hook(lambda module, args: run.append(module))
    packed_hidden_states(tiny_model, torch.arange(5), packed_layout([5]), backend="sdpa").sum().backward()
    assert len(hooked) == 2 and len(run) == 2 + 2 * training


def test_recomputation_can_be_undone_and_set_again(tiny_model):
    first, *_ = layers = decoder_layers(tiny_model, "gradient_checkpointing")
    own = first.forward
    first.forward = marked = lambda *args, **kwargs: own(*args, **kwargs)
    for policy in ("full", "selective"):
        recompute_activations(tiny_model, policy)
        assert recomputes(tiny_model) and not isinstance(first.forward.inner, Recomputed)
    keep_activations(tiny_model)
    assert first.forward is marked and not recomputes(tiny_model)
    assert not any("forward" in layer.__dict__ for layer in layers[1:])


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_the_recipes_policy_changes_no_loss_and_counts_its_operations(run, policy):
    plain = read_metrics(run("plain", max_steps=2) / "metrics.jsonl")
    flags = dict(max_steps=2, gradient_checkpointing=True, gradient_checkpointing_policy=policy)
    again = read_metrics(run("again", **flags) / "metrics.jsonl")
    assert [row["loss"] for row in plain] == [row["loss"] for row in again]
    assert (plain[0]["teraflops"] == again[0]["teraflops"]) == (policy == "selective")
