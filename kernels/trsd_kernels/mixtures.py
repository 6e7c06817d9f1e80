"""Divergences from a mixture m = share p + (1 - share) q, and slopes dD/dq of any divergence, in plain torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trsd_kernels.options import DistillOptions


def expectation(weights: Tensor, values: Tensor, masked: bool, out: Tensor | None = None) -> Tensor:
    """sum_v weights * values over the last dimension, where an impossible token (weight 0) counts nothing."""
    if masked:
        values = torch.where(weights == 0, 0.0, values)
    return torch.mul(weights, values, out=out).sum(1)


def halves(options: DistillOptions) -> bool:
    """Both models have the same share, so that one exponential serves both."""
    return options.kind == "jsd" and options.teacher_share == 0.5


class Mixture:
    """Terms and slopes against m, of ratios, not differences of logarithms.

    So where one model is certain, tokens of equal ratio get equal slopes exactly.

    Args:
        log_p: [C, V'], taken over.
        log_q: [C, V'].
        masked: whether a token may be impossible (-inf).
        new: where a temporary's bytes come from; None for torch's own.
    """

    def __init__(
        self,
        log_p: Tensor,
        log_q: Tensor,
        options: DistillOptions,
        masked: bool,
        new: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.kind, self.share, self.masked = options.kind, options.teacher_share, masked
        self.impossible = log_q == -math.inf if masked else None
        self.gap = log_p.sub_(log_q)
        if halves(options):
            # m / max(p, q) of equal shares
            self.larger = torch.abs(self.gap, out=new()).neg_().exp_().add_(1.0).mul_(0.5)
        else:
            self.p_ratio = torch.clamp(self.gap, max=0.0, out=new()).exp_()  # p / max(p, q)
            self.q_ratio = torch.neg(self.gap, out=new()).clamp_(max=0.0).exp_()  # q / max(p, q)
            self.larger = torch.mul(self.p_ratio, self.share, out=new()).add_(self.q_ratio, alpha=1.0 - self.share)
        self.log_larger = self.larger.log_() if self.kind == "jsd" else torch.log(self.larger, out=new())
        self.work = new()
        self.log_q_over_m = None
        if self.kind != "skew_kl":
            self.log_q_over_m = torch.clamp(self.gap, min=0.0, out=new()).add_(self.log_larger).neg_()

    def value(self, p: Tensor, q: Tensor) -> Tensor:
        """D of each row."""
        total, work = 0.0, self.work
        if self.kind != "skew_reverse_kl":
            log_p_over_m = torch.clamp(self.gap, max=0.0, out=work).sub_(self.log_larger)
            total = expectation(p, log_p_over_m, self.masked, out=work) * (self.share if self.kind == "jsd" else 1.0)
        if self.kind != "skew_kl":
            from_q = expectation(q, self.log_q_over_m, self.masked, out=work)
            total += from_q * ((1.0 - self.share) if self.kind == "jsd" else 1.0)
        return total

    def slope(self) -> Tensor:
        """d = dD/dq of each token, once; 0 where q is 0 exactly."""
        if self.kind == "skew_kl":
            slope = self.p_ratio.div_(self.larger).mul_(self.share - 1.0)
        elif self.kind == "jsd":
            slope = self.log_q_over_m.mul_(1.0 - self.share)
        else:
            slope = self.log_q_over_m.add_(1.0).sub_(self.q_ratio.div_(self.larger).mul_(1.0 - self.share))
        return slope.masked_fill_(self.impossible, 0.0) if self.masked else slope


def divergence_slope(log_p: Tensor, log_q: Tensor, options: DistillOptions) -> Tensor:
    """q (d - d at the top of q), d = dD/dq, of rows of whole distributions; 0 where q is 0."""
    q = log_q.exp()
    if options.kind == "none":
        return torch.zeros_like(q)
    if options.kind == "forward_kl":
        return q - log_p.exp()  # any multiple of q may be added
    if options.kind == "reverse_kl":
        slope = log_q - log_p
    else:
        slope = Mixture(log_p.clone(), log_q, options, masked=True).slope()
    slope = slope - slope.gather(1, log_q.argmax(1, keepdim=True))
    return torch.where(q == 0, 0.0, q * slope)
