"""Floating-point operations of a training step, counted from shapes (two a multiply-add; norms and softmax left out).

    forward = 2 N_body T + 4 L H d P + 2 V h R                                                               (1)

with N_body weights of matrices outside the embeddings, T tokens, L layers of H query heads of d, P pairs of a query and
a key it sees, and R rows against a vocabulary of V at hidden size h. Backward costs twice the forward, a frozen matrix
once; recomputed activations one more forward of the body. Experts that are not chosen are counted as if they ran.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from trsd.batching import Example, PackedBatch
from trsd.nf4 import num_weights


class FlopCounter:
    """Counts for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        embeddings = {
            id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
        }
        matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
        self.body = sum(num_weights(p) for p in matrices)
        self.frozen = sum(num_weights(p) for p in matrices if not p.requires_grad)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = config.num_hidden_layers * config.num_attention_heads * head_dim
        head = model.get_output_embeddings().weight
        self.head, self.head_factor = head.numel(), 3.0 if head.requires_grad else 2.0

    def training(self, batches: Sequence[PackedBatch], *, recomputed: bool) -> float:
        """Forward and backward over packed rows; ``recomputed``: activations are made again in the backward pass."""
        tokens, pairs = sum(batch.num_tokens for batch in batches), sum(batch.num_pairs for batch in batches)
        rows = sum(len(batch.labels) + len(batch.thinking_labels) for batch in batches)
        body = (4.0 if recomputed else 3.0) * self._body(tokens, pairs) - 2.0 * self.frozen * tokens
        return body + self.head_factor * head_flops(self.head, rows)

    def reading(self, examples: Sequence[Example]) -> float:
        """The body's forward over sequences without branches."""
        lengths = [len(example.input_ids) for example in examples]
        return self._body(sum(lengths), sum(length * (length + 1) // 2 for length in lengths))

    def _body(self, num_tokens: int, num_pairs: int) -> float:
        return 2.0 * self.body * num_tokens + 4.0 * self.attention * num_pairs


def head_flops(head_numel: int, num_rows: int) -> float:
    """The product of an lm_head of ``head_numel`` weights with ``num_rows`` hidden states."""
    return 2.0 * head_numel * num_rows
