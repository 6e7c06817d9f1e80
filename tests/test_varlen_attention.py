import pytest
import torch

from trsd_kernels import cu_seqlens_of, varlen_attention


def masked_attention(query, key, value, lengths, causal, scale):
    """One softmax over the whole row under an explicit block mask, float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner[None]
    if causal:
        mask &= torch.ones_like(mask).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 9], [4, 0, 5, 0]])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_equals_explicit_mask_in_float64_with_gradients(causal, lengths, num_kv_heads):
    torch.manual_seed(0)
    total = sum(lengths)
    tensors = [torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, num_kv_heads, num_kv_heads)]
    ours, plain = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out = varlen_attention(*ours, cu_seqlens_of(lengths), causal=causal, softmax_scale=0.3)
    exact = masked_attention(*plain, lengths, causal, 0.3)
    torch.testing.assert_close(out, exact)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, ours, upstream), torch.autograd.grad(exact, plain, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_changing_one_sequence_leaves_the_others_bit_identical():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 12, 2, 8)
    before = varlen_attention(query, key, value, cu_seqlens_of([5, 7]))
    key[:5], value[:5] = 1e3, -1e3
    assert torch.equal(varlen_attention(query, key, value, cu_seqlens_of([5, 7]))[5:], before[5:])


@pytest.mark.parametrize(
    "cu_seqlens,message",
    [
        (torch.tensor([0, 5]), "int32"),
        (torch.tensor([0, 5], dtype=torch.int32), "from 0 to 12"),
        (torch.tensor([0, 8, 5, 12], dtype=torch.int32), "non-decreasing"),
        (torch.tensor([12], dtype=torch.int32), "num_seqs"),
        (torch.tensor([0, 12], dtype=torch.int32, device="meta"), "expected on cpu"),
    ],
)
def test_wrong_cu_seqlens_raise(cu_seqlens, message):
    query, key, value = torch.randn(3, 12, 2, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attention(query, key, value, cu_seqlens)


def test_heads_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="divide"):
        varlen_attention(torch.randn(4, 3, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8), cu_seqlens_of([4]))
