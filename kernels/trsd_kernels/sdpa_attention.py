"""Packed attention by torch's scaled-dot-product attention, one call a segment: every device, dtype and layout.

A branch's call takes the keys of its trunk's first ``cut`` tokens and its own. Plain rows need O(tokens * heads) of
memory beside the output. A branch needs a copy of the keys it sees and a mask of its queries by its keys, a window such
a mask, a soft cap the scores of every head: of one segment at a time in the forward, never tokens^2 of the row.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trsd_kernels.layout import PackedLayout


@torch.compiler.disable  # a call a segment: a graph would hold for one layout
def sdpa_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    layout: PackedLayout,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of every segment to its sequence, [num_tokens, num_heads, head_dim]; checked by the caller."""
    if softmax_scale < 0:  # torch's function takes the root of it
        query, softmax_scale = -query, -softmax_scale
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Split, not sliced: the gradient of a slice is as large as the whole row.
    lengths = layout.lengths.tolist()
    queries, keys, values = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value))  # [1, H, n, D]
    outputs = []
    for q, k, v, trunk, cut in zip(queries, keys, values, layout.trunks.tolist(), layout.cuts.tolist(), strict=True):
        length = q.shape[2]
        if not length:
            continue
        if cut:
            k, v = (torch.cat([of[trunk][:, :, :cut], own], dim=2) for of, own in ((keys, k), (values, v)))
        mask = None
        if causal and (cut or softcap or 0 < window < length):
            mask = _visible(length, cut, window, query.device)
        if softcap:
            outputs.append(_capped_attention(q, k, v, mask, softmax_scale, softcap))
        else:
            is_causal = causal and mask is None
            outputs.append(
                scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=softmax_scale)
            )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1) if outputs else query.clone()


def _visible(length: int, cut: int, window: int, device: torch.device) -> Tensor:
    """Whether each of ``length`` queries after ``cut`` earlier tokens sees each key: bool [length, cut + length]."""
    mask = torch.ones(length, cut + length, dtype=torch.bool, device=device).tril(cut)
    return mask.triu(cut - window + 1) if window else mask


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """What torch's function cannot do: scores through a soft cap, softmax in fp32 or wider."""
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
