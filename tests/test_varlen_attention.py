"""One function, several back ends: the same numbers, a choice that is said, errors that say what to do."""

import sys
import types
import warnings

import pytest
import torch
from attention_cases import ROWS, PlainKernels, draw_tensors, errors, expected, row, rows, with_gradients
from hypothesis import given

from trsd_kernels import attention_backends, choose_backend, packed_layout, varlen_attention
from trsd_kernels.attention_backends import BACKENDS, AttentionRequest
from trsd_kernels.merged_attention import Piece, merged_attention, pieces
from trsd_kernels.reference import visible_keys

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def by(backend, layout, **options):
    return lambda *qkv: varlen_attention(*qkv, layout=layout, backend=backend, **options)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_sdpa_equals_the_explicit_mask_in_float64_with_gradients(name, num_kv_heads):
    layout = row(name)
    tensors = draw_tensors(layout, num_kv_heads=num_kv_heads)
    got = with_gradients(by("sdpa", layout, softmax_scale=0.3), *tensors)
    assert max(errors(got, expected(layout, *tensors, softmax_scale=0.3))) < 1e-13


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sdpa_with_a_negative_scale(softcap):
    layout = row("sequences")
    tensors = draw_tensors(layout)
    got = with_gradients(by("sdpa", layout, softmax_scale=-0.3, softcap=softcap), *tensors)
    assert max(errors(got, expected(layout, *tensors, softmax_scale=-0.3, softcap=softcap))) < 1e-13


@pytest.mark.parametrize("window,softcap", [(1, 0.0), (4, 0.0), (50, 0.0), (0, 2.0), (6, 2.0)])
@pytest.mark.parametrize("name", ["sequences", "branches not sorted, cuts shared"])
def test_sdpa_with_windows_and_soft_caps(name, window, softcap):
    layout = row(name)
    tensors = draw_tensors(layout)
    options = dict(window_size=(window - 1, 0), softcap=softcap, softmax_scale=0.6)
    got = with_gradients(by("sdpa", layout, **options), *tensors)
    exact = expected(layout, *tensors, window=window, softcap=softcap, softmax_scale=0.6)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["one sequence", "sequences"])
def test_not_causal(name):
    layout = row(name)
    tensors = draw_tensors(layout)
    got = with_gradients(by("sdpa", layout, causal=False), *tensors)
    assert max(errors(got, expected(layout, *tensors, causal=False, softmax_scale=0.25))) < 1e-13


def test_cu_seqlens_and_layout_are_the_same_and_the_scale_has_its_default():
    query, key, value, _ = draw_tensors(row("sequences"))
    by_offsets = varlen_attention(query, key, value, packed_layout([3, 0, 40, 1, 17]).cu_seqlens)
    assert torch.equal(by_offsets, varlen_attention(query, key, value, layout=row("sequences")))
    assert torch.equal(by_offsets, varlen_attention(query, key, value, layout=row("sequences"), softmax_scale=0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_on_a_cpu(dtype):
    layout = row("branches not sorted, cuts shared")
    tensors = draw_tensors(layout, dtype=dtype)
    got = with_gradients(by("sdpa", layout, softmax_scale=0.25), *tensors)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert max(errors(got, expected(layout, *tensors, softmax_scale=0.25))) < bound


def test_other_branches_and_later_trace_tokens_leave_a_branch_bit_identical():
    layout = packed_layout([50, 30], [[(7, 20), (22, 9), (22, 3)], [(30, 1), (1, 18)]])
    query, key, value, _ = draw_tensors(layout, dtype=torch.float32)
    before = varlen_attention(query, key, value, layout=layout, backend="sdpa")
    others = torch.ones(layout.num_tokens, dtype=torch.bool)
    others[layout.sequence(2)] = False
    for tensor in (query, key, value):
        tensor[others] = 100 * torch.randn_like(tensor[others])
    after = varlen_attention(query, key, value, layout=layout, backend="sdpa")
    assert torch.equal(before[~others], after[~others]) and not torch.equal(before, after)


# Branches in pieces, on kernels that know only plain varlen attention.


@given(rows(longest=30))
def test_pieces_cover_the_mask_once(case):
    layout = packed_layout(*case)
    count = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for piece in pieces(layout):
        bounds = piece.cu_seqlens_q.tolist(), piece.cu_seqlens_k.tolist()
        queries = torch.arange(layout.num_tokens) if piece.query_rows is None else piece.query_rows
        keys = torch.arange(layout.num_tokens) if piece.key_rows is None else piece.key_rows
        assert len(queries) == bounds[0][-1] and len(keys) == bounds[1][-1]
        for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
            block = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
            count[queries[q0:q1, None], keys[None, k0:k1]] += block.tril() if piece.causal else block
            assert piece.causal or (q1 > q0 and k1 > k0)  # some kernels give +inf for the lse of nothing
    assert torch.equal(count, visible_keys(layout).long())


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("name", ROWS)
def test_merged_pieces_are_exact_in_float64_with_gradients(name, softcap):
    layout = row(name)
    tensors = draw_tensors(layout)
    options = dict(softmax_scale=0.25, softcap=softcap)
    got = with_gradients(lambda *qkv: merged_attention(*qkv, layout, PlainKernels, **options), *tensors)
    assert max(errors(got, expected(layout, *tensors, **options))) < 1e-13


def test_a_second_derivative_of_merged_pieces_is_refused():
    layout = row("one branch")
    query, key, value, _ = (x.requires_grad_() for x in draw_tensors(layout))
    out = merged_attention(query, key, value, layout, PlainKernels, softmax_scale=1.0)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


# The adapters, on stand-ins with the signatures of the real functions. On a GPU the real ones are tested below.


def whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    return Piece(None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)


def plain_function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap):
    """Differentiable varlen attention by ``PlainKernels``."""
    piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    groups, parts = q.shape[1] // k.shape[1], []
    for queries, keys in PlainKernels._sequences(piece):
        scores = PlainKernels._scores(q[queries], k[keys].repeat_interleave(groups, 1), causal, softmax_scale, softcap)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].repeat_interleave(groups, 1)))
    return torch.cat(parts)


def flash_attn_2():
    # flash-attn 2.8's names and defaults
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        assert window_size == (-1, 0 if causal else -1)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return plain_function(q, k, v, *lengths, softmax_scale, causal, softcap)

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                                   alibi_slopes=None, return_softmax=False, block_table=None):  # fmt: skip
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *PlainKernels.forward(q, k, v, piece, softmax_scale=softmax_scale, softcap=softcap), None, None

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                    window_size_right, softcap, alibi_slopes, deterministic):  # fmt: skip
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        options = dict(softmax_scale=softmax_scale, softcap=softcap)
        parts = PlainKernels.backward(dout, q, k, v, out, softmax_lse, piece, **options)
        for gradient, part in zip((dq, dk, dv), parts, strict=True):
            gradient.copy_(part)

    return locals()


def flash_attn_3():
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), softcap=0.0, num_splits=1,
                               pack_gqa=None, deterministic=False, sm_margin=0):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out = plain_function(q, k, v, *lengths, softmax_scale, causal, softcap)
        return out, None  # older releases return the lse as well

    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
                            cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
                            max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
                            rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
                            softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
                            attention_chunk=0, softcap=0.0):  # fmt: skip
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *PlainKernels.forward(q, k, v, piece, softmax_scale=softmax_scale, softcap=softcap), None, None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
                             sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
                             softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
                             softcap=0.0, deterministic=False, sm_margin=0):  # fmt: skip
        assert sequed_q is None and sequed_k is None
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal)
        options = dict(softmax_scale=softmax_scale, softcap=softcap)
        parts = PlainKernels.backward(dout, q, k, v, out, softmax_lse, piece, **options)
        for gradient, part in zip((dq, dk, dv), parts, strict=True):
            gradient.copy_(part)

    return locals()


def flash_attn_4():
    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                               max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, page_table=None,
                               softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                               softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False):  # fmt: skip
        assert window_size == (None, 0 if causal else None)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return plain_function(q, k, v, *lengths, softmax_scale, causal, softcap), None

    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
                        causal=False, softcap=None, window_size_left=None, window_size_right=None,
                        return_lse=False):  # fmt: skip
        assert return_lse
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return PlainKernels.forward(q, k, v, piece, softmax_scale=softmax_scale, softcap=softcap)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, deterministic=False):  # fmt: skip
        piece = whole(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        options = dict(softmax_scale=softmax_scale, softcap=softcap)
        return *PlainKernels.backward(dout, q, k, v, out, lse, piece, **options), None

    return locals()


STAND_INS = {"flash_attn_2": flash_attn_2, "flash_attn_3": flash_attn_3, "flash_attn_4": flash_attn_4}


@pytest.mark.parametrize("name", ["sequences", "one branch", "branches not sorted, cuts shared"])
@pytest.mark.parametrize("backend", STAND_INS)
def test_flash_adapters_call_what_the_packages_offer(backend, name, monkeypatch):
    adapter = BACKENDS[backend]
    module = types.ModuleType(adapter.module)
    vars(module).update(STAND_INS[backend]())
    monkeypatch.setitem(sys.modules, adapter.module, module)
    parents = adapter.module.split(".")[:-1]
    for depth in range(len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[: depth + 1]), types.ModuleType(parents[depth]))
    layout = row(name)
    tensors = draw_tensors(layout)
    got = with_gradients(lambda *qkv: adapter.attend(*qkv, layout, softmax_scale=0.25), *tensors)
    assert max(errors(got, expected(layout, *tensors, softmax_scale=0.25))) < 1e-13


@pytest.fixture
def varlen_ops_on_a_cpu():
    """torch's own varlen ops, whose CPU kernels do not exist, computed by ``PlainKernels``."""
    from torch.nn.attention import varlen

    # Before it could be said, torch took fewer heads of keys without a word.
    grouped_is_said = "enable_gqa" in str(torch.ops.torch_attn._varlen_attn.default._schema)

    def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
                enable_gqa=False, *rest):  # fmt: skip
        assert window_size == [-1, 0 if is_causal else -1] and not any(rest)
        assert enable_gqa == (grouped_is_said and query.shape[1] != key.shape[1])
        piece = whole(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
        no_dropout = torch.zeros(2, dtype=torch.uint64)
        return *PlainKernels.forward(query, key, value, piece, softmax_scale=scale, softcap=0.0), no_dropout

    def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state,
                 scale=None, window_size=None):  # fmt: skip
        piece = whole(cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
        return tuple(
            PlainKernels.backward(grad_out, query, key, value, out, lse, piece, softmax_scale=scale, softcap=0.0)
        )

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)


@pytest.mark.parametrize("name", ["sequences", "one branch", "branches not sorted, cuts shared"])
def test_torchs_varlen_ops_are_called_as_they_are(name, varlen_ops_on_a_cpu):
    layout = row(name)
    tensors = draw_tensors(layout)
    adapter = BACKENDS["torch"]
    got = with_gradients(lambda *qkv: adapter.attend(*qkv, layout, softmax_scale=0.25), *tensors)
    assert max(errors(got, expected(layout, *tensors, softmax_scale=0.25))) < 1e-13


def test_only_arguments_a_release_has_are_passed():
    def older(query, *, scale=None):
        """As it was before grouped queries had an argument."""

    assert attention_backends._known(older, enable_gqa=True, scale=1) == {"scale": 1}
    op = torch.ops.torch_attn._varlen_attn_backward if hasattr(torch.ops, "torch_attn") else older
    assert "enable_gqa" not in attention_backends._known(op, enable_gqa=True)


# The choice.


@pytest.fixture(autouse=True)
def a_hopper_gpu(monkeypatch):
    """The choice asks for the GPU's capability, which is to be had without one here."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention_backends, "capability", lambda device: (9, 0))


def request(device=CUDA, dtype=torch.bfloat16, head_dim=128, has_branches=False, **rest):
    return AttentionRequest(device, dtype, head_dim, has_branches, **rest)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these packages are here."""

    def pretend(*names):
        modules = {BACKENDS[name].module for name in names if name != "triton"}
        problem = lambda module: None if module in modules else "not here"  # noqa: E731
        monkeypatch.setattr(attention_backends, "import_problem", problem)
        newest = lambda max_seqlen_q: None  # noqa: E731
        monkeypatch.setattr(BACKENDS["flash_attn_4"], "function", lambda name: newest)
        find = lambda module: "here" if "triton" in names else None  # noqa: E731
        monkeypatch.setattr(attention_backends.importlib.util, "find_spec", find)

    return pretend


@pytest.mark.parametrize(
    "packages,options,wanted",
    [
        (("flash_attn_2", "flash_attn_4", "torch", "triton"), {}, "flash_attn_4"),
        (("flash_attn_2", "flash_attn_3", "torch", "triton"), {}, "flash_attn_3"),
        (("flash_attn_2", "flash_attn_4", "torch"), dict(head_dim=256), "flash_attn_2"),
        (("flash_attn_2", "flash_attn_4"), dict(softcap=30.0), "flash_attn_2"),
        (("flash_attn_2", "torch", "triton"), {}, "flash_attn_2"),
        (("torch", "triton"), {}, "torch"),
        (("triton",), {}, "triton"),
        ((), {}, "sdpa"),
        (("flash_attn_2", "torch", "triton"), dict(has_branches=True), "triton"),
        (("flash_attn_2", "torch"), dict(has_branches=True), "flash_attn_2"),
        (("torch", "triton"), dict(softcap=30.0), "triton"),
        (("torch",), dict(softcap=30.0), "sdpa"),
        (("torch",), dict(has_branches=True, window=64), "sdpa"),
        (("torch", "triton"), dict(dtype=torch.float32), "triton"),
        (("torch", "triton"), dict(dtype=torch.float64), "sdpa"),
        (("torch", "triton"), dict(dtype=torch.float32, head_dim=256), "sdpa"),
        (("torch", "triton"), dict(causal=False), "torch"),
        (("torch", "triton"), dict(head_dim=20), "triton"),
        (("torch", "triton"), dict(device=CPU), "sdpa"),
    ],
)
def test_auto_takes_the_best_that_can(packages, options, wanted, installed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    installed(*packages)
    assert choose_backend(request(**options)) == wanted


@pytest.mark.parametrize(
    "capability,wanted",
    [((7, 5), "sdpa"), ((8, 0), "flash_attn_2"), ((8, 9), "flash_attn_2"), ((9, 0), "flash_attn_4"),
     ((10, 0), "flash_attn_4"), ((12, 0), "flash_attn_2")],
)  # fmt: skip
def test_auto_takes_what_serves_the_gpu(capability, wanted, installed, monkeypatch):
    monkeypatch.setattr(attention_backends, "capability", lambda device: capability)
    installed("flash_attn_2", "flash_attn_3", "flash_attn_4", "torch", "triton")
    assert choose_backend(request()) == wanted
    assert choose_backend(request(has_branches=True)) == ("sdpa" if capability < (8, 0) else "triton")


def test_a_package_that_breaks_on_import_is_one_that_is_not_there(monkeypatch):
    def breaks(name):
        raise AttributeError("built for another torch")

    monkeypatch.setattr(attention_backends.importlib, "import_module", breaks)
    attention_backends.import_problem.cache_clear()
    with pytest.raises(ValueError, match="flash-attn >= 2.7 is needed .AttributeError: built for another torch"):
        choose_backend(request(), "flash_attn_2")
    attention_backends.import_problem.cache_clear()


def test_auto_says_once_what_it_took(monkeypatch):
    monkeypatch.setattr(sys.modules["trsd_kernels.varlen_attention"], "_SAID", set())
    query, key, value, _ = draw_tensors(row("one branch"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            varlen_attention(query, key, value, layout=row("one branch"))
        varlen_attention(query, key, value, layout=row("one branch"), backend="sdpa")
    assert [str(w.message) for w in said] == [
        "varlen_attention takes back end sdpa for rows with branches on cpu; backend= chooses"
    ]
    assert said[0].filename == __file__


@pytest.mark.parametrize(
    "backend,options,reason",
    [
        ("torch", dict(softcap=3.0), "has no softcap"),
        ("flash_attn_2", dict(has_branches=True, window=5), "no sliding window"),
        ("triton", dict(causal=False), "causal only"),
        ("sdpa", dict(has_branches=True, causal=False), "neither branches nor windows"),
    ],
)
def test_what_would_come_out_wrong_is_refused_under_torch_compile_too(backend, options, reason, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=reason):
        choose_backend(request(**options), backend)
    assert choose_backend(request(), backend) == backend


@pytest.mark.parametrize(
    "backend,options,reason",
    [
        ("flash_attn_2", {}, "flash-attn >= 2.7 is needed"),
        ("flash_attn_4", {}, "flash-attn-4 is needed"),
        ("torch", dict(device=CPU), "needs CUDA tensors, not cpu"),
        ("flash_attn_3", dict(has_branches=True), "is needed"),
        ("torch", dict(softcap=3.0), "has no softcap"),
        ("torch", dict(dtype=torch.float32), "takes bf16 and fp16, not torch.float32"),
        ("torch", dict(head_dim=260), "head_dim is a multiple of 8"),
        ("torch", dict(has_branches=True, window=5), "no sliding window"),
        ("sdpa", dict(has_branches=True, causal=False), "neither branches nor windows"),
        ("pallas", {}, "expected auto or one of flash_attn_4"),
    ],
)
def test_a_named_back_end_that_cannot_is_refused_with_the_reason(backend, options, reason):
    with pytest.raises(ValueError, match=reason):
        choose_backend(request(**options), backend)


# Input.


@pytest.mark.parametrize(
    "cu_seqlens,message",
    [
        (torch.tensor([0, 5]), "int32"),
        (torch.tensor([0, 5], dtype=torch.int32), "from 0 to 12"),
        (torch.tensor([1, 12], dtype=torch.int32), "from 0 to 12 tokens, got 1"),
        (torch.tensor([0, 8, 5, 12], dtype=torch.int32), "non-decreasing"),
        (torch.tensor([12], dtype=torch.int32), "num_seqs"),
    ],
)
def test_wrong_cu_seqlens_raise(cu_seqlens, message):
    query, key, value = torch.randn(3, 12, 2, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attention(query, key, value, cu_seqlens)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(query=torch.randn(26, 3, 8)), "num_kv_heads to divide num_heads, got 2 and 3"),
        (dict(query=torch.randn(25, 2, 8), key=torch.randn(25, 2, 8), value=torch.randn(25, 2, 8)), "26 tokens"),
        (dict(key=torch.randn(26, 2, 4)), "total_tokens, num_heads, head_dim"),
        (dict(value=torch.randn(26, 2, 8).half()), "one floating dtype"),
        (dict(value=torch.randn(26, 2, 8, device="meta")), "on one device"),
        (dict(layout=row("one branch", "meta")), "layout on cpu with the queries, got meta"),
        (dict(layout=None), "one of them"),
        (dict(cu_seqlens_q=packed_layout([26]).cu_seqlens), "one of them"),
        (dict(window_size=(3, 2)), "window_size: expected"),
        (dict(window_size=(-1, 2)), "window_size: expected"),
        (dict(window_size=(3, 0), causal=False), "causal=True"),
        (dict(softcap=-1.0), "softcap"),
        (dict(backend="tritonn"), "expected auto or one of"),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    good = dict(zip(("query", "key", "value"), torch.randn(3, 26, 2, 8), strict=True), layout=row("one branch"))
    with pytest.raises(ValueError, match=message):
        varlen_attention(**(good | change))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sequences", "branches not sorted, cuts shared"])
@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn_3", "flash_attn_2", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_back_ends_on_a_gpu_against_float64(backend, name, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layout = row(name, "cuda")
    if reason := attention_backends.refusal(
        backend, request(dtype=dtype, head_dim=64, has_branches=layout.has_branches)
    ):
        pytest.skip(reason)
    tensors = draw_tensors(layout, head_dim=64, dtype=dtype)
    got = with_gradients(by(backend, layout), *tensors)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert max(errors(got, expected(layout, *tensors, softmax_scale=0.125))) < bound
