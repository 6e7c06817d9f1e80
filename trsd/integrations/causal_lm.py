"""``forward_distill`` for any Hugging Face causal LM: the distillation loss of a batch without its logits.

``add_forward_distill(model)`` binds one method to one model. It runs the model's decoder, leaves its lm_head's product
out, and gives hidden states and head to ``trsd_kernels.fused_linear_distillation``, with the model's own logit scale
and soft cap. ``teacher_targets`` makes what a teacher brings to that call.

Who wraps the model calls it through the wrapper: ``run_through(ddp_model, model, model.forward_distill, ...)``, and
after FSDP2's ``fully_shard`` once ``register_fsdp_forward_method(model, "forward_distill")``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trsd.errors import InputError
from trsd.integrations.cut_rows import IGNORE
from trsd.models import PACKED_ATTENTION, logit_options, refuse_other_logits
from trsd_kernels import LinearDistillationOutput, fused_linear_distillation

T = TypeVar("T")


def add_forward_distill(model: PreTrainedModel, *, check: bool = True) -> PreTrainedModel:
    """Give ``model`` the method ``forward_distill``, and return it; nothing else of it, or of its class, changes.

    The method's arguments are those of ``forward_distill`` of this module, without the first.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        check: run four tokens to see that the model's logits are what the loss takes them for. Without weights, or with
            sharded ones, there is nothing to run: then False.

    Raises:
        InputError: it has no lm_head that is a linear layer, no decoder to run without it, runs packed rows, or does to
            its logits what the loss does not know.
    """
    if check:
        check_model(model)
    # A bound method could be saved with the model, and not loaded: it is looked up before it is there.
    model.forward_distill = partial(forward_distill, model)
    return model


def forward_distill(
    model: PreTrainedModel,
    input_ids: Tensor,  # [batch, length]
    labels: Tensor,  # [batch, length]
    *,
    attention_mask: Tensor | None = None,  # [batch, length]
    position_ids: Tensor | None = None,  # [batch, length]
    teacher_hidden_states: Tensor | None = None,  # [batch, length, hidden_size] or [num_labels, hidden_size]
    teacher_lm_head_weight: Tensor | None = None,  # [teacher_vocab_size, hidden_size]
    teacher_lm_head_bias: Tensor | None = None,  # [teacher_vocab_size]
    **options: Any,
) -> LinearDistillationOutput:
    """Loss of a batch: (1 - alpha) cross-entropy + alpha divergence from the teacher, without logits of either.

    Args:
        model: the student.
        input_ids: [batch, length] int64.
        labels: [batch, length] int64, unshifted as everywhere in transformers: label i is the token at place i, and
            -100 (``ignore_index``) where nothing is learnt. The first of a sequence has nothing that predicts it.
        attention_mask: [batch, length], 0 at padding.
        position_ids: [batch, length].
        teacher_hidden_states: final hidden states of the teacher. [batch, length, hidden_size], of the same tokens; or
            [num_labels, hidden_size], the rows that predict the labels, in their order, where the teacher read
            something else, such as the whole of a trace that the student sees cut. None with ``alpha`` 0.
        teacher_lm_head_weight, teacher_lm_head_bias: of the teacher. Heads that are padded to different lengths are
            compared on the tokens that both have.
        **options: anything else that ``fused_linear_distillation`` takes: alpha, divergence, temperature,
            ``num_items_in_batch`` (labels of the whole optimizer step), ``token_weights`` ([batch, length], as labels).

    Returns:
        Loss and its terms. Rows of ``per_token`` are those of [batch, length - 1], or the labels where the teacher's
        rows are.

    Raises:
        ValueError: shapes that do not fit, or a head that is sharded where this was called.
    """
    _, head = _body_and_head(model)
    hidden = hidden_states_of(model, input_ids, attention_mask, position_ids)[:, :-1].flatten(0, 1)
    labels = _shifted(labels, input_ids)
    weights = options.pop("token_weights", None)
    weights = None if weights is None else _shifted(weights, input_ids)
    if teacher_hidden_states is not None and teacher_hidden_states.dim() == 2:
        rows = labels != options.get("ignore_index", IGNORE)
        hidden, labels = hidden[rows], labels[rows]
        weights = None if weights is None else weights[rows]
        if len(labels) != len(teacher_hidden_states):
            raise ValueError(
                f"teacher_hidden_states has {len(teacher_hidden_states)} rows for {len(labels)} labels: expected one "
                "for each, in their order, of the token before it"
            )
    elif teacher_hidden_states is not None:
        if teacher_hidden_states.shape[:2] != input_ids.shape:
            raise ValueError(
                f"teacher_hidden_states: expected [{', '.join(map(str, input_ids.shape))}, hidden_size] as input_ids, "
                f"or [num_labels, hidden_size], got {list(teacher_hidden_states.shape)}"
            )
        teacher_hidden_states = teacher_hidden_states[:, :-1].flatten(0, 1)

    def loss(hidden: Tensor) -> LinearDistillationOutput:
        weight, bias, theirs, their_bias = head.weight, head.bias, teacher_lm_head_weight, teacher_lm_head_bias
        if theirs is not None and len(weight) != len(theirs):
            shared = min(len(weight), len(theirs))
            weight, bias, theirs, their_bias = (
                None if tensor is None else tensor[:shared] for tensor in (weight, bias, theirs, their_bias)
            )
        return fused_linear_distillation(
            hidden,
            weight,
            teacher_hidden_states,
            theirs,
            labels,
            student_lm_head_bias=bias,
            teacher_lm_head_bias=their_bias,
            token_weights=weights,
            **logit_options(model.config, "student") | options,
        )

    return run_head(head, loss, hidden)


@torch.no_grad()
def teacher_targets(
    teacher: PreTrainedModel,
    input_ids: Tensor,  # [batch, length]
    labels: Tensor | None = None,  # [batch, length]
    *,
    attention_mask: Tensor | None = None,  # [batch, length]
    position_ids: Tensor | None = None,  # [batch, length]
    ignore_index: int = IGNORE,
) -> dict[str, Any]:
    """What ``teacher`` brings to ``forward_distill``: hidden states, head, and what it does to its logits.

    Args:
        teacher: a causal LM; nothing of it gets a gradient.
        input_ids: [batch, length], what the teacher reads.
        labels: where it reads what the student does, None. Else [batch, length], the student's labels at the places
            they have here; only the rows that predict them are returned.
        attention_mask, position_ids: [batch, length].
        ignore_index: of ``labels``.

    Returns:
        Keyword arguments of ``forward_distill``.
    """
    _, head = _body_and_head(teacher)
    hidden = hidden_states_of(teacher, input_ids, attention_mask, position_ids)
    if labels is not None:
        hidden = hidden[:, :-1].flatten(0, 1)[_shifted(labels, input_ids) != ignore_index]
    found = {"teacher_hidden_states": hidden, "teacher_lm_head_weight": head.weight.detach()}
    if head.bias is not None:
        found["teacher_lm_head_bias"] = head.bias.detach()
    return found | logit_options(teacher.config, "teacher")


def run_through(wrapper: nn.Module, model: nn.Module, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``call(...)`` inside the ``forward`` of what wraps ``model``, such as DistributedDataParallel, or of FSDP2.

    The wrapper prepares its reductions where its ``forward`` is called, and only there.

    Args:
        wrapper: what the trainer runs; ``model`` itself where nothing wraps it, or FSDP2 does, in place.
        model: what it wraps.
        call: what to run in place of the model's own ``forward``.
        *args, **kwargs: of ``call``. Tensors in them that get gradients should be given here, not by closure.

    Returns:
        What ``call`` returns.
    """
    sharded = isinstance(wrapper, FSDPModule)
    if wrapper is model and not sharded:
        return call(*args, **kwargs)
    forward, found = model.forward, []

    def instead(*args: Any, **kwargs: Any) -> T:
        model.forward = forward
        found.append(call(*args, **kwargs))
        return found[0]

    model.forward = instead
    try:
        returned = wrapper(*args, **kwargs)
    finally:
        model.forward = forward
    return found[0] if sharded else returned


def run_head(head: nn.Linear, call: Callable[[Tensor], T], hidden_states: Tensor) -> T:
    """``call(hidden_states)`` where ``head.weight`` is whole."""
    return run_through(head, head, call, hidden_states)


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raise InputError for a model that cannot be run here, or whose logits are not what the loss takes them for."""
    name, (_, head) = type(model).__name__, _body_and_head(model)
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise InputError("an adapter of virtual tokens acts outside the body that is run: choose one of weights")
    if getattr(model.config, "_attn_implementation", None) == PACKED_ATTENTION:
        raise InputError(f'{name} runs packed rows: call its set_attn_implementation("sdpa") first')
    training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 5, device=head.weight.device)[None]
        # accelerate's mixed precision is around forward alone, and keeps what it is around under this name.
        forward = getattr(model, "_original_forward", model)
        refuse_other_logits(model, hidden_states_of(model, ids), forward(input_ids=ids, use_cache=False).logits)
    finally:
        model.train(training)


def hidden_states_of(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """What the lm_head of ``model`` would be given of a padded batch, [batch, length, hidden_size]."""
    body, _ = _body_and_head(model)
    return body(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def _body_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "get_decoder", lambda: None)()
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise InputError(
            f"{type(model).__name__} has no lm_head that is a plain linear layer, but {type(head).__name__}: expected "
            "a causal language model of transformers, and an adapter that leaves its head out"
        )
    if body is None or body is model:
        raise InputError(f"{type(model).__name__} has no decoder of its own to run without its lm_head")
    return body, head


def _shifted(values: Tensor, input_ids: Tensor) -> Tensor:
    """[batch * (length - 1)]: at each token what belongs to the next one."""
    if values.shape != input_ids.shape:
        raise ValueError(f"expected labels and weights as input_ids, {list(input_ids.shape)}, got {list(values.shape)}")
    return values[:, 1:].flatten()
