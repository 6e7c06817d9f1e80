"""Our attention kernels against the oracle: in the interpreter (fp32, fp16) or on a GPU (also bf16)."""

import os
import random

import pytest
import torch
from attention_cases import ROWS, draw_tensors, errors, expected, row, rows, with_gradients
from conftest import make_tiny_model
from hypothesis import HealthCheck, given, settings

from trsd.models import packed_hidden_states
from trsd_kernels import packed_layout, varlen_attention
from trsd_kernels.attention_tiles import Tiling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
SLOW = pytest.mark.slow  # in the interpreter
# Tiles of 16 make every row a case of many tiles; the shipped ones are for a GPU.
SMALL = (Tiling(32, 16, 4, 1), Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def attend(layout, *, blocks=SMALL, **options):
    from trsd_kernels.branch_attention import triton_attention

    return lambda *qkv: triton_attention(*qkv, layout, blocks=blocks, **options)


def check(layout, tensors, bound, *, blocks=SMALL, **options):
    got = with_gradients(attend(layout, blocks=blocks, **options), *tensors)
    exact = expected(layout, *tensors, **options)
    assert all(x.dtype == tensors[0].dtype for x in got)
    assert max(errors(got, exact)) <= bound, errors(got, exact)


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_explicit_mask_in_float64_with_gradients(name, device):
    layout = row(name, device)
    check(layout, draw_tensors(layout, dtype=torch.float32), 1e-5, softmax_scale=0.25)


@settings(max_examples=5 if INTERPRETED else 50, suppress_health_check=list(HealthCheck))
@given(rows(longest=40))
def test_any_row_equals_the_explicit_mask(device, case):
    layout = packed_layout(*case, device=device)
    check(
        layout,
        draw_tensors(layout, head_dim=8, num_heads=2, num_kv_heads=1, dtype=torch.float32),
        1e-5,
        softmax_scale=0.5,
    )


@pytest.mark.parametrize(
    "window,softcap",
    [(5, 2.0), *(pytest.param(*each, marks=SLOW) for each in [(2, 0.0), (2, 2.0), (5, 0.0), (40, 0.0), (40, 2.0)])],
)
def test_sliding_windows_and_soft_caps(window, softcap, device):
    layout = row("branches not sorted, cuts shared", device)
    check(layout, draw_tensors(layout, dtype=torch.float32), 1e-5, softmax_scale=0.7, window=window, softcap=softcap)
    check(layout, draw_tensors(layout, dtype=torch.float32), 1e-5, softmax_scale=0.7, softcap=softcap)


@pytest.mark.parametrize(
    "head_dim,num_heads,num_kv_heads",
    [
        (24, 6, 2),
        (96, 2, 1),
        *(pytest.param(*each, marks=SLOW) for each in [(8, 6, 2), (24, 1, 1), (64, 6, 2), (128, 6, 2)]),
    ],
)
def test_head_dims_and_groups(head_dim, num_heads, num_kv_heads, device):
    layout = row("cuts at both ends", device)
    sizes = dict(head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(layout, draw_tensors(layout, dtype=torch.float32, **sizes), 1e-5, softmax_scale=head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_half_precision_with_the_shipped_tiles(head_dim, device):
    layout = packed_layout([200, 90], [[(199, 20), (64, 70), (3, 1)], []], device=device)
    for dtype in (torch.float16, torch.bfloat16):
        tensors = draw_tensors(layout, head_dim=head_dim, num_heads=2, num_kv_heads=1, dtype=dtype)
        bound = 5e-4 if dtype == torch.float16 else 4e-3  # the output is rounded once, and p and ds before it
        check(layout, tensors, bound, blocks=None, softmax_scale=head_dim**-0.5)


def test_fp32_with_the_shipped_tiles(device):
    layout = packed_layout([150, 40], [[(149, 20), (64, 33), (0, 1)], []], device=device)
    for head_dim in (64, 128):
        tensors = draw_tensors(layout, head_dim=head_dim, num_heads=2, num_kv_heads=1, dtype=torch.float32)
        check(layout, tensors, 1e-5, blocks=None, softmax_scale=head_dim**-0.5)


def test_saturated_scores_stay_finite(device):
    layout = row("branches not sorted, cuts shared", device)
    query, key, value, grad_out = draw_tensors(layout, dtype=torch.float32)
    check(layout, (30 * query, 30 * key, value, grad_out), 1e-4, softmax_scale=0.25)


def test_other_branches_and_later_trace_tokens_leave_a_branch_bit_identical(device):
    lengths, branches = [50, 30], [[(7, 20), (22, 9), (22, 3)], [(30, 1), (1, 18)]]
    layout = packed_layout(lengths, branches, device=device)
    start, length, trunk, cut = layout.segments()[2]  # the branch cut at 22
    seen = layout.sequence(2).to(device)
    query, key, value, grad_out = draw_tensors(layout, dtype=torch.float32)
    run = attend(layout, softmax_scale=0.25)
    before = with_gradients(run, query, key, value, grad_out)
    others = torch.ones(layout.num_tokens, dtype=torch.bool, device=device)
    others[seen] = False
    for tensor in (query, key, value, grad_out):
        tensor[others] = 100 * torch.randn_like(tensor[others])
    after = with_gradients(run, query, key, value, grad_out)
    own = slice(start, start + length)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[own], b[own])
    assert (trunk, cut) == (0, 22) and not torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[0][:22], after[0][:22])  # and the trunk's outputs before the cut
    # A trunk's keys are also seen by the others: a change there must reach their gradients.
    assert not torch.equal(before[2][:22], after[2][:22])


def test_the_same_inputs_give_the_same_bits(device):
    layout = row("traces with and without branches", device)
    tensors = draw_tensors(layout, dtype=torch.float32)
    run = attend(layout, softmax_scale=0.25)
    for a, b in zip(with_gradients(run, *tensors), with_gradients(run, *tensors), strict=True):
        assert torch.equal(a, b)


def test_strided_views_are_taken_as_they_are(device):
    layout = row("one branch", device)
    query, key, value, grad_out = draw_tensors(layout, dtype=torch.float32)
    together = torch.cat([query, key, value], 1)  # one projection, split by heads
    views = [*together.split([4, 2, 2], 1), grad_out]
    assert not any(view.is_contiguous() for view in views[:3])
    check(layout, views, 1e-5, softmax_scale=0.25)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, grad_out)]
    check(layout, swapped, 1e-5, softmax_scale=0.25)


def test_an_empty_row_gives_empty_results(device):
    layout = packed_layout([0], device=device)
    got = with_gradients(attend(layout, softmax_scale=1.0), *draw_tensors(layout, dtype=torch.float32))
    assert all(x.shape[0] == 0 for x in got)


def test_a_second_derivative_is_refused(device):
    layout = row("one sequence", device)
    query, key, value, _ = (x.requires_grad_() for x in draw_tensors(layout, dtype=torch.float32))
    out = attend(layout, softmax_scale=0.25)(query, key, value)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


def test_the_op_passes_torchs_own_checks(device):
    from trsd_kernels.attention_tiles import key_tiles, positions, prefix_ends, query_tiles
    from trsd_kernels.branch_attention import branch_attention_op

    layout = row("one branch", device)
    query, key, value, _ = draw_tensors(layout, dtype=torch.float32)
    blocks = [part for tiling in SMALL for part in tiling]
    tiles = (query_tiles(layout, 32), query_tiles(layout, 16), key_tiles(layout, 32, 0))
    arguments = (*tiles, prefix_ends(layout), positions(layout), blocks, 0.25, 0.0, 0)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(branch_attention_op, (*inputs, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_compiled_whole_with_new_layouts_without_graph_breaks(device, monkeypatch):
    torch.compiler.reset()
    graphs = []

    def through(query, key, value, layout):
        out = varlen_attention(2 * query, key, value, layout=layout, softmax_scale=0.25, backend="triton")
        return out.square().sum()

    def counting(graph, example):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    compiled = torch.compile(through, fullgraph=True, backend=counting if INTERPRETED else "inductor", dynamic=True)
    for n in range(6):  # more than that limit
        layout = packed_layout([12, 5 + n], [[(3, n + 1)] * (n % 3 + 1), []], device=device)
        tensors = draw_tensors(layout, dtype=torch.float32)
        inputs = [x.clone().requires_grad_() for x in tensors[:3]]
        plain = [x.clone().requires_grad_() for x in tensors[:3]]
        varlen_attention(*plain, layout=layout, backend="triton")  # makes the tile lists
        got = torch.autograd.grad(compiled(*inputs, layout), inputs)
        want = torch.autograd.grad(through(*plain, layout), plain)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert not INTERPRETED or 1 <= len(graphs) <= 3
    torch.compiler.reset()


def test_what_the_kernels_cannot_do_is_said(device):
    layout = row("one sequence", device)
    wide = draw_tensors(layout, head_dim=264, dtype=torch.float16)[:3]
    with pytest.raises(ValueError, match="head_dim is at most 256"):
        varlen_attention(*wide, layout=layout, backend="triton")
    wide = draw_tensors(layout, head_dim=192, dtype=torch.float32)[:3]
    with pytest.raises(ValueError, match="head_dim is at most 128"):
        varlen_attention(*wide, layout=layout, backend="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        varlen_attention(*draw_tensors(layout)[:3], layout=layout, backend="triton")
    with pytest.raises(ValueError, match="causal only"):
        tensors = draw_tensors(layout, dtype=torch.float16)[:3]
        varlen_attention(*tensors, layout=layout, causal=False, backend="triton")


def random_traces(rng):
    """(lengths, branches) of several traces of 1 to 300 tokens, each cut anywhere, at the ends too, or not at all."""
    lengths = [rng.choice([1, 2, rng.randint(3, 60), rng.randint(61, 300)]) for _ in range(rng.randint(2, 4))]
    branches = [
        [
            (rng.choice([0, length, rng.randint(0, length)]), rng.choice([1, rng.randint(2, 40)]))
            for _ in range(rng.randint(0, 4))
        ]
        for length in lengths
    ]
    return lengths, branches


def gradients_of(model, layout, ids, upstream, backend):
    """Gradients of every parameter, where each token of the row passes back its own random vector."""
    hidden = packed_hidden_states(model, ids, layout, backend=backend)
    return torch.autograd.grad((hidden * upstream.to(hidden)).sum(), list(model.model.parameters()))


def separate_gradients(model, layout, ids, upstream):
    """The same, each sequence run alone and only its own segment passing back."""
    total = [torch.zeros_like(p) for p in model.model.parameters()]
    for segment, (_, length, _, _) in enumerate(layout.segments()):
        places = layout.sequence(segment).to(ids.device)
        own = torch.zeros(len(places), 1, device=ids.device)
        own[len(places) - length :] = 1.0
        alone = packed_layout([len(places)], device=ids.device)
        for sum_, part in zip(
            total, gradients_of(model, alone, ids[places], own * upstream[places], "sdpa"), strict=True
        ):
            sum_ += part
    return total


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=SLOW) for n in range(2, 6))])
def test_every_gradient_of_a_small_qwen3_equals_the_separate_sequences(seed, device, tokenizer, monkeypatch):
    rng = random.Random(seed)
    layout = packed_layout(*random_traces(rng), device=device)
    torch.manual_seed(seed)
    ids = torch.randint(600, (layout.num_tokens,)).to(device)
    upstream = torch.randn(layout.num_tokens, 64, dtype=torch.float64).to(device)
    exact = separate_gradients(make_tiny_model(tokenizer, dtype=torch.float64).to(device), layout, ids, upstream)
    if INTERPRETED:  # whose time is per tile
        large = (Tiling(128, 128, 4, 1),) * 3
        monkeypatch.setattr("trsd_kernels.branch_attention.tilings", lambda *_: large)
    model = make_tiny_model(tokenizer, dtype=torch.float32).to(device)
    assert max(errors(gradients_of(model, layout, ids, upstream, "triton"), exact)) <= 1e-5
    if device == "cuda":
        model = model.bfloat16()
        ours = errors(gradients_of(model, layout, ids, upstream, "triton"), exact)
        theirs = errors(separate_gradients(model, layout, ids, upstream), exact)
        assert all(a <= 1.5 * b + 1e-3 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
