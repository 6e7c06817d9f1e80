"""From every token's terms to what a loss function returns: weights, denominator, reduction."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trsd_kernels.options import DistillOptions
from trsd_kernels.row_state import TokenTerms

REDUCTIONS = ("mean", "sum", "none")


class LinearDistillationOutput(NamedTuple):
    """What the distillation losses return, on the device of the inputs."""

    loss: Tensor
    """Nats per item; differentiable. [num_tokens] with reduction "none", else a scalar."""
    cross_entropy: Tensor
    """w_t CE_t, reduced like the loss, detached; 0 when alpha is 1."""
    divergence: Tensor
    """w_t D_t before alpha and T^2, reduced like the loss, detached; 0 when alpha is 0."""
    num_items: Tensor
    """The denominator used."""
    per_token: TokenTerms
    """Unweighted terms of every token, detached."""


def check_reduction(reduction: str, num_items_in_batch: Tensor | float | None) -> None:
    """A known reduction, and a denominator only where there is one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if reduction != "mean" and num_items_in_batch is not None:
        raise ValueError(f'num_items_in_batch is the denominator of reduction="mean", got reduction={reduction!r}')
    if isinstance(num_items_in_batch, int | float) and not 0 <= num_items_in_batch < math.inf:
        raise ValueError(f"num_items_in_batch: expected 0 or more, got {num_items_in_batch}")


def weights_and_items(
    labels: Tensor,
    token_weights: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    reduction: str,
    *,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Each row's weight in the loss, divided by the denominator and 0 for ignored rows, and the denominator."""
    weights = (labels != ignore_index).to(dtype)
    if token_weights is not None:
        # An ignored row may carry any weight, NaN too.
        weights = torch.where(labels != ignore_index, token_weights.detach().to(dtype), 0.0)
    if reduction != "mean":
        return weights, torch.ones((), dtype=dtype, device=weights.device)
    num_items = weights.sum() if num_items_in_batch is None else _scalar(num_items_in_batch, dtype, weights.device)
    return torch.where(num_items == 0, 0.0, weights / num_items), num_items  # no items: 0 everywhere, not NaN


def _scalar(number: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number as a tensor on the device, without waiting for it."""
    if not isinstance(number, Tensor):
        return torch.full((), number, dtype=dtype, device=device)
    if number.numel() != 1:
        raise ValueError(
            f"num_items_in_batch: expected one number for the whole batch, got a tensor of shape {tuple(number.shape)}"
        )
    return number.detach().reshape(()).to(device=device, dtype=dtype, non_blocking=True)


def weighted(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """weights * values, reduced; a row without weight counts nothing, whatever it holds."""
    values = torch.where(weights == 0, 0.0, weights * values)
    return values if reduction == "none" else values.sum()


def reduced_output(
    terms: TokenTerms,
    weights: Tensor,
    num_items: Tensor,
    options: DistillOptions,
    reduction: str,
    loss: Tensor | None = None,
) -> LinearDistillationOutput:
    """The output for a ``loss`` that carries gradients; left out, for terms whose two parts of it do."""
    cross_entropy = weighted(terms.cross_entropy, weights, reduction)
    divergence = weighted(terms.divergence, weights, reduction)
    if loss is None:
        loss = (1.0 - options.alpha) * cross_entropy + options.divergence_scale * divergence
    per_token = TokenTerms(*(term.detach() for term in terms))
    return LinearDistillationOutput(loss, cross_entropy.detach(), divergence.detach(), num_items, per_token)
