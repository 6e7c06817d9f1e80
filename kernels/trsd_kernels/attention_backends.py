"""The attention back ends: what each needs, what it can do, and how it is called.

``sdpa`` runs everywhere, ``triton`` is ours and alone computes branches in one kernel; ``torch``, ``flash_attn_2``,
``flash_attn_3`` and ``flash_attn_4`` know plain varlen attention and get branches in pieces (``merged_attention``).
Nothing is imported before it is asked for.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trsd_kernels.layout import PackedLayout
from trsd_kernels.merged_attention import Piece, merged_attention
from trsd_kernels.sdpa_attention import sdpa_attention

HALF = (torch.bfloat16, torch.float16)


class AttentionRequest(NamedTuple):
    """What is asked of a back end."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_branches: bool
    causal: bool = True
    window: int = 0
    """A token sees itself and the ``window - 1`` before it; 0: all."""
    softcap: float = 0.0

    @property
    def kind(self) -> str:
        """For messages."""
        return "rows with branches" if self.has_branches else "plain rows"


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


@functools.cache
def import_problem(module: str) -> str | None:
    """Why ``module`` cannot be imported, if it cannot; asked once a process."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in many ways
        return f"{type(error).__name__}: {error}"
    return None


class Sdpa:
    """torch's scaled-dot-product attention, a call per segment."""

    @staticmethod
    def absence(request: AttentionRequest) -> str | None:
        """Why this back end is not to be had here; None when it is."""
        return None

    @staticmethod
    def limit(request: AttentionRequest) -> str | None:
        """What of ``request`` this back end could only get wrong, wherever it runs; None when nothing."""
        if not request.causal and (request.has_branches or request.window):
            return "without causal=True there are neither branches nor windows"
        return None

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, **options: Any) -> Tensor:
        """Attention over the row, [num_tokens, num_heads, head_dim]."""
        return sdpa_attention(query, key, value, layout, **options)


class Triton:
    """Our kernels."""

    @staticmethod
    def absence(request: AttentionRequest) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if request.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs CUDA tensors, not {request.device.type}"
        if request.device.type == "cuda" and capability(request.device) < (8, 0):
            return f"it needs a GPU of compute capability 8.0, not {'.'.join(map(str, capability(request.device)))}"
        return None

    @staticmethod
    def limit(request: AttentionRequest) -> str | None:
        from trsd_kernels.branch_attention import DTYPES, max_head_dim

        if not request.causal:
            return "it is causal only"
        if request.dtype not in DTYPES:
            return f"it takes bf16, fp16 and fp32, not {request.dtype}"
        if request.head_dim > max_head_dim(request.dtype):
            return f"in {request.dtype} its head_dim is at most {max_head_dim(request.dtype)}, not {request.head_dim}"
        return None

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, *, causal: bool, **options) -> Tensor:
        from trsd_kernels.branch_attention import triton_attention

        return triton_attention(query, key, value, layout, **options)


class Flash:
    """What torch's and flash-attn's varlen functions have in common; subclasses know one interface each."""

    module: str
    install: str
    softcaps = True
    capabilities: tuple[int, ...] = (8, 9, 10, 11, 12)
    """Major compute capabilities whose forward and backward it has."""
    max_head_dim = 256

    @classmethod
    def absence(cls, request: AttentionRequest) -> str | None:
        if request.device.type != "cuda":
            return f"it needs CUDA tensors, not {request.device.type}"
        if problem := import_problem(cls.module):
            return f"{cls.install} is needed ({problem})"
        if (major := capability(request.device)[0]) not in cls.capabilities:
            return f"it serves GPUs of compute capability {cls.capabilities}.x, not {major}.x"
        return None

    @classmethod
    def limit(cls, request: AttentionRequest) -> str | None:
        if request.dtype not in HALF:
            return f"it takes bf16 and fp16, not {request.dtype}"
        if request.head_dim > cls.max_head_dim or request.head_dim % 8:
            return f"its head_dim is a multiple of 8 up to {cls.max_head_dim}, not {request.head_dim}"
        if request.softcap and not cls.softcaps:
            return "it has no softcap"
        if request.has_branches and (request.window or not request.causal):
            return "branches in pieces are causal and have no sliding window"
        return None

    @classmethod
    def attend(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        *,
        softmax_scale: float,
        causal: bool = True,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        if layout.has_branches:
            return merged_attention(query, key, value, layout, cls, softmax_scale=softmax_scale, softcap=softcap)
        return cls.plain(
            *(query, key, value, layout.cu_seqlens, layout.max_seqlen),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=(window - 1 if window else -1, 0 if causal else -1),
            softcap=softcap,
        )

    @classmethod
    def function(cls, name: str) -> Callable[..., Any]:
        """A function of the back end's module."""
        return getattr(importlib.import_module(cls.module), name)

    @classmethod
    def plain(cls, query, key, value, cu_seqlens, max_seqlen, *, softmax_scale, causal, window_size, softcap) -> Tensor:
        out = cls.function("flash_attn_varlen_func")(
            *(query, key, value),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out


class TorchVarlen(Flash):
    """``torch.nn.attention.varlen``: FlashAttention-2 inside, or what torch was told to use."""

    module, install, softcaps = "torch.nn.attention.varlen", "torch >= 2.11", False

    @classmethod
    def plain(cls, query, key, value, cu_seqlens, max_seqlen, *, softmax_scale, causal, window_size, softcap) -> Tensor:
        return cls.function("varlen_attn")(
            *(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            scale=softmax_scale,
            window_size=window_size,
            **_known(cls.function("varlen_attn"), enable_gqa=query.shape[1] != key.shape[1]),
        )

    @classmethod
    def forward(cls, query, key, value, piece: Piece, *, softmax_scale: float, softcap: float):
        op = torch.ops.torch_attn._varlen_attn
        out, lse, _ = op(
            *(query, key, value, piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k),
            piece.causal,
            scale=softmax_scale,
            **_known(op, window_size=_window(piece), enable_gqa=query.shape[1] != key.shape[1]),
        )
        return out, lse

    @classmethod
    def backward(cls, grad_out, query, key, value, out, lse, piece: Piece, *, softmax_scale: float, softcap: float):
        op = torch.ops.torch_attn._varlen_attn_backward
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return op(
            *(grad_out, query, key, value, out, lse, piece.cu_seqlens_q, piece.cu_seqlens_k),
            *(piece.max_seqlen_q, piece.max_seqlen_k, piece.causal, no_dropout),
            scale=softmax_scale,
            **_known(op, window_size=_window(piece)),
        )


class FlashAttn2(Flash):
    """flash-attn 2.7 or newer."""

    module, install = "flash_attn.flash_attn_interface", "flash-attn >= 2.7"

    @classmethod
    def forward(cls, query, key, value, piece: Piece, *, softmax_scale: float, softcap: float):
        out, lse, *_ = cls.function("_flash_attn_varlen_forward")(
            *(query, key, value, piece.cu_seqlens_q, piece.cu_seqlens_k, piece.max_seqlen_q, piece.max_seqlen_k),
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=piece.causal,
            softcap=softcap,
        )
        return out, lse

    @classmethod
    def backward(cls, grad_out, query, key, value, out, lse, piece: Piece, *, softmax_scale: float, softcap: float):
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        cls.function("_flash_attn_varlen_backward")(
            *(grad_out, query, key, value, out, lse, *gradients, piece.cu_seqlens_q, piece.cu_seqlens_k),
            *(piece.max_seqlen_q, piece.max_seqlen_k),
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=piece.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=softcap,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


class FlashAttn3(Flash):
    """FlashAttention-3 (``hopper/`` of its repository), for Hopper GPUs."""

    module, install = "flash_attn_interface", "FlashAttention-3 (flash_attn_interface)"
    capabilities = (9,)

    @classmethod
    def forward(cls, query, key, value, piece: Piece, *, softmax_scale: float, softcap: float):
        out, lse, *_ = cls.function("_flash_attn_forward")(
            *(query, key, value),
            **_lengths(piece),
            softmax_scale=softmax_scale,
            causal=piece.causal,
            softcap=softcap,
        )
        return out, lse

    @classmethod
    def backward(cls, grad_out, query, key, value, out, lse, piece: Piece, *, softmax_scale: float, softcap: float):
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        # By position up to causal: its name changed between releases.
        cls.function("_flash_attn_backward")(
            *(grad_out, query, key, value, out, lse, piece.cu_seqlens_q, piece.cu_seqlens_k, None, None),
            *(piece.max_seqlen_q, piece.max_seqlen_k, *gradients, softmax_scale, piece.causal),
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


class FlashAttn4(Flash):
    """flash-attn-4 (CuTe), for Hopper and Blackwell GPUs."""

    module, install = "flash_attn.cute.interface", "flash-attn-4"
    capabilities, max_head_dim = (9, 10), 128
    softcaps = False  # not in every release's backward

    @classmethod
    def absence(cls, request: AttentionRequest) -> str | None:
        reason = super().absence(request)
        if reason is None and "max_seqlen_q" not in inspect.signature(cls.function("_flash_attn_bwd")).parameters:
            reason = "this release of flash-attn-4 is too old"
        return reason

    @classmethod
    def plain(cls, query, key, value, cu_seqlens, max_seqlen, *, window_size, **options) -> Tensor:
        window = tuple(None if side < 0 else side for side in window_size)
        return super().plain(query, key, value, cu_seqlens, max_seqlen, window_size=window, **options)

    @classmethod
    def forward(cls, query, key, value, piece: Piece, *, softmax_scale: float, softcap: float):
        out, lse, *_ = cls.function("_flash_attn_fwd")(
            *(query, key, value),
            **_lengths(piece),
            softmax_scale=softmax_scale,
            causal=piece.causal,
            softcap=softcap,
            return_lse=True,
        )
        return out, lse

    @classmethod
    def backward(cls, grad_out, query, key, value, out, lse, piece: Piece, *, softmax_scale: float, softcap: float):
        return cls.function("_flash_attn_bwd")(
            *(query, key, value, out, grad_out, lse),
            softmax_scale=softmax_scale,
            causal=piece.causal,
            softcap=softcap,
            **_lengths(piece),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )[:3]


def _lengths(piece: Piece) -> dict[str, Any]:
    """flash-attn's names for what a piece's sequences are."""
    return dict(
        cu_seqlens_q=piece.cu_seqlens_q,
        cu_seqlens_k=piece.cu_seqlens_k,
        max_seqlen_q=piece.max_seqlen_q,
        max_seqlen_k=piece.max_seqlen_k,
    )


def _window(piece: Piece) -> list[int]:
    return [-1, 0 if piece.causal else -1]


def _known(function: Callable[..., Any], **optional: Any) -> dict[str, Any]:
    """The optional arguments that this release's ``function`` has."""
    if hasattr(function, "default"):
        names = {argument.name for argument in function.default._schema.arguments}
    else:
        names = set(inspect.signature(function).parameters)
    return {name: value for name, value in optional.items() if name in names}


BACKENDS: dict[str, Any] = {
    "flash_attn_4": FlashAttn4,
    "flash_attn_3": FlashAttn3,
    "flash_attn_2": FlashAttn2,
    "torch": TorchVarlen,
    "triton": Triton,
    "sdpa": Sdpa,
}


def refusal(name: str, request: AttentionRequest) -> str | None:
    """Why the back end ``name`` cannot serve ``request`` here; None when it can."""
    backend = BACKENDS[name]
    # torch.compile need not trace imports: what is absent says so when it runs. What would come out wrong does not.
    absent = None if torch.compiler.is_compiling() else backend.absence(request)
    return absent or backend.limit(request)


def choose_backend(request: AttentionRequest, backend: str = "auto") -> str:
    """The back end for ``request``: the named one if it can, or the best that can.

    ``auto`` takes, for branches, ours before the others in pieces; for plain rows flash-attn's newest, then torch's,
    then ours; sdpa where nothing else serves, and always on a CPU.

    Raises:
        ValueError: an unknown back end, or a named one that cannot serve the request, with the reason.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
        if reason := refusal(backend, request):
            raise ValueError(f"attention back end {backend} cannot serve {request.kind}: {reason}")
        return backend
    names = list(BACKENDS)
    if request.device.type != "cuda":
        names = ["sdpa"]
    elif request.has_branches:
        names.sort(key=lambda name: name != "triton")
    for name in names:
        if refusal(name, request) is None:
            return name
    raise ValueError(f"no attention back end serves {request.kind}: {refusal('sdpa', request)}")
