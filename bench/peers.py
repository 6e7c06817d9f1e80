"""Other packages' losses behind one face: each adapter computes what ours does, or says in what it differs.

Read and checked against trl 1.16.0, liger-kernel 0.8.5, fla-core 0.6.0, cut-cross-entropy 25.1.1 and quack-kernels
0.6.5. A ``step`` takes inputs and loss and returns a function that makes the scalar loss; a package that is missing
raises ImportError there, before anything is computed.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from bench.shapes import Inputs, Loss

Forward = Callable[[], Tensor]


def _trl_kernel() -> type:
    """TRL's autograd function.

    Its module takes one context manager, null without DeepSpeed, from ``trl.trainer.utils``, which imports the whole
    trainer's packages. Where those are missing a stand-in provides that one name.
    """
    try:
        return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    except ImportError as error:
        if error.name == "trl":
            raise
    stand_in = types.ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
    sys.modules[stand_in.__name__] = stand_in
    try:
        return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    finally:
        del sys.modules[stand_in.__name__]


def trl_chunked_divergence(inputs: Inputs, loss: Loss) -> Forward:
    """``trl/kernels/chunked_divergence.py``: fp32 logits and dW; repeats the logits in backward.

    No cross-entropy (alpha 1 only), no temperature^2 (multiplied here), no labels: the mean is over every row. Like
    ours it also gives per-token entropies.
    """
    function = _trl_kernel()
    student_h, student_w, teacher_h, teacher_w, _ = inputs.positional()

    def forward() -> Tensor:
        per_token, _ = function.apply(
            student_h, student_w, None, teacher_h, teacher_w, None, loss.beta, loss.temperature
        )
        return per_token.mean() * loss.temperature**2

    return forward


def _liger_fused(inputs: Inputs, loss: Loss, accum_dtype: torch.dtype | None) -> Forward:
    """``LigerFusedLinearJSD``: fp32 logits, gradients made in the forward over short chunks of rows.

    No cross-entropy (alpha 1 only), no temperature^2 (multiplied here). Its mean is over the labels not ignored, as
    ours is. Its rows are Triton's, or on a Hopper and later CuTe's or cuTile's where those packages are installed.
    """
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=loss.beta, temperature=loss.temperature, accum_dtype=accum_dtype)
    # Its backward leaves the gradients as they are when the upstream gradient is 1, else it scales them in place.
    if loss.temperature == 1.0:
        return lambda: module(*inputs.positional())
    return lambda: module(*inputs.positional()) * loss.temperature**2


def liger_fused_jsd(inputs: Inputs, loss: Loss) -> Forward:
    """As shipped: dW is summed in the weight's own dtype, so in bf16 its figures are of a rougher gradient."""
    return _liger_fused(inputs, loss, None)


def liger_fused_jsd_fp32(inputs: Inputs, loss: Loss) -> Forward:
    """dW summed in fp32, as ours is."""
    return _liger_fused(inputs, loss, torch.float32)


def _fla_fused_kl(inputs: Inputs, loss: Loss, *, fp32_gradient: bool) -> Forward:
    """``fla.modules.FusedKLDivLoss``: gradients made in the forward, over at most eight chunks of rows.

    Forward KL alone: no cross-entropy, no temperature (hidden states divided by it here, and the loss multiplied by its
    square) and no labels, so that no row can be ignored. Logits of both models and their gradient are rounded to the
    inputs' dtype; a frozen head's dW is left out.
    """
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss(accumulate_grad_in_fp32=fp32_gradient)
    student_h, student_w, teacher_h, teacher_w, _ = inputs.positional()
    temperature = loss.temperature
    # Its backward leaves the gradients as they are when the upstream gradient is 1, else it scales them in place.
    if temperature == 1.0:
        return lambda: module(student_h, teacher_h, student_w, teacher_w)
    return lambda: module(student_h / temperature, teacher_h / temperature, student_w, teacher_w) * temperature**2


def fla_fused_kl(inputs: Inputs, loss: Loss) -> Forward:
    """As shipped: bf16 operands of dW are copied to fp32 and multiplied there, which is exact and slow."""
    return _fla_fused_kl(inputs, loss, fp32_gradient=True)


def fla_fused_kl_rounded(inputs: Inputs, loss: Loss) -> Forward:
    """dW summed in the weight's own dtype: faster, and in bf16 a rougher gradient than ours."""
    return _fla_fused_kl(inputs, loss, fp32_gradient=False)


def liger_chunked_jsd(inputs: Inputs, loss: Loss) -> Forward:
    """``liger_kernel.chunked_loss``: cross-entropy and divergence from torch operations, compiled on a GPU.

    Logits and the sum of dW are rounded to the inputs' dtype, and a frozen head's dW is made all the same.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.compiler.reset()  # it compiles a new closure in every call, and Dynamo counts those up to a limit
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0 - loss.alpha,
        weight_soft_loss=loss.alpha * loss.temperature**2,  # it divides logits by the temperature and leaves it there
        beta=loss.beta,
        temperature=loss.temperature,
        compiled=inputs.labels.is_cuda,
    )
    return lambda: module(*inputs.positional())


def _liger_cross_entropy(inputs: Inputs, accum_dtype: torch.dtype | None) -> Forward:
    """``LigerFusedLinearCrossEntropyLoss``: gradients made in the forward, over chunks as small as hidden states.

    Logits and their gradient are rounded to the inputs' dtype. Its mean is over the labels not ignored, as ours is, but
    the host waits for their number. A frozen head's dW is left out.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)
    hidden_states, weight, *_, labels = inputs.positional()
    return lambda: module(weight, hidden_states, labels)


def liger_cross_entropy(inputs: Inputs, loss: Loss) -> Forward:
    """As shipped: dW is summed in the weight's own dtype, so in bf16 its figures are of a rougher gradient."""
    return _liger_cross_entropy(inputs, None)


def liger_cross_entropy_fp32(inputs: Inputs, loss: Loss) -> Forward:
    """dW summed in fp32, as ours is."""
    return _liger_cross_entropy(inputs, torch.float32)


def cut_cross_entropy(inputs: Inputs, loss: Loss) -> Forward:
    """CCE as PyPI has it: logits stay in a tile and are made again in the backward, which takes half precision alone.

    dH and dW are summed tile by tile in the inputs' dtype, in an order that differs from run to run, and the label's
    logit is a sum of products rounded to it. Its filter skips tiles whose gradients are all below a 32nd of that
    dtype's resolution: there are none among random logits, and more the surer a model is.
    """
    from cut_cross_entropy import linear_cross_entropy

    hidden_states, weight, *_, labels = inputs.positional()
    return lambda: linear_cross_entropy(hidden_states, weight, labels)


def quack_cross_entropy(inputs: Inputs, loss: Loss) -> Forward:
    """QuACK's ``chunked_linear_cross_entropy``: gradients made in the forward, 4,096 rows at a time, dW summed in fp32.

    Its kernels, in CuTe, need a GPU and were checked by reading alone. On Hopper in bf16, with a vocabulary divisible
    by 128, the probabilities are rounded to bf16 and the label's logit is not; else the logits and their gradient are
    rounded, and rows must come in eights. A frozen head's dW is left out.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden_states, weight, *_, labels = inputs.positional()
    return lambda: chunked_linear_cross_entropy(hidden_states, weight, labels)
