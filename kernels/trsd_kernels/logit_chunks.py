"""A head's logits a chunk of rows at a time, for what is read off them without a gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trsd_kernels.linear_ops import rows_per_chunk
from trsd_kernels.options import LogitTransform
from trsd_kernels.products import Head, accumulator_dtype, product, product_dtype
from trsd_kernels.torch_rows import even_chunk, row_chunks, transform_


def logit_chunks(
    head: Head, transform: LogitTransform, *, chunk_bytes: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [num_rows, vocab_size]) in fp32 or fp64; the caller may write over them.

    Args:
        head: hidden states, weight and bias.
        transform: what the model does to its logits.
        chunk_bytes: working memory of a chunk: its logits and a copy or two beside them.
    """
    dtype = product_dtype(head.hidden_states, head.weight, None)
    weight, num_rows = head.weight.detach().to(dtype), len(head.hidden_states)
    limit = rows_per_chunk(2 * weight.shape[0], accumulator_dtype(dtype), weight.device, chunk_bytes)
    for rows in row_chunks(num_rows, even_chunk(num_rows, limit)):
        with torch.autocast(weight.device.type, enabled=False):
            logits = product(head.hidden_states[rows].detach().to(dtype), weight.T)
        yield rows, transform_(logits, head.bias, transform)
