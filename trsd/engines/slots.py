"""Keys and values of rows that run together, each at its own position: what ``hf.py`` decodes with.

A transformers model is run on ``input_ids`` [num_rows, num_new] whose row i continues slot ``rows[i]`` at
``positions[i]``. The cache writes the new keys and values into their slots and hands all of a slot's to the attention
below, which lets a token see its own slot up to itself. So rows start, end and go back independently: a slot's keys
and values before a position stay right whatever was written after it.

Memory: 2 · num_layers · num_key_value_heads · head_dim numbers for each of num_slots · length places. Both grow in
steps, slots by doubling up to the batch size, length by a half when a row is longer than all before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache

from trsd.errors import InputError

SLOT_ATTENTION = "trsd_slots"
LENGTH_STEP = 128  # places that the cache grows by at least
WHOLE_SCORES = 16  # new tokens a row up to which grouped queries attend by plain products, without copies of the keys


class Slots(Cache):
    """The keys and values of every layer, [num_slots, num_heads, length, head_dim], grown on demand."""

    def __init__(self, most_slots: int) -> None:
        """Begin empty; more than ``most_slots`` will not be asked for."""
        super().__init__(layers=[])
        self.most_slots = most_slots
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_slots = self.length = 0
        self.rows: Tensor | None = None
        self.positions = torch.empty(0, 0, dtype=torch.long)
        self.seen = 0
        self._masks: dict[int, Tensor] = {}

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for so many slots of so many places; what is held stays."""
        if num_slots > self.num_slots or length > self.length:
            if num_slots > self.num_slots:
                self.num_slots = min(max(num_slots, 2 * self.num_slots), max(num_slots, self.most_slots))
            if length > self.length:
                self.length = max(length, self.length + self.length // 2, LENGTH_STEP)
            for held in (self.keys, self.values):
                for layer, old in enumerate(held):
                    held[layer] = self._empty(old)
                    held[layer][: old.shape[0], :, : old.shape[2]] = old

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros, since a place that is masked still takes part in a product, and no number times infinity is none.
        return like.new_zeros(self.num_slots, like.shape[1], self.length, like.shape[3])

    def begin(self, rows: Tensor | None, positions: Tensor, seen: int) -> None:
        """Say what the coming forward pass runs.

        Args:
            rows: slot of each row, [num_rows]; None for the first num_rows slots.
            positions: place of each new token in its slot, [num_rows, num_new].
            seen: places that any of them looks at; all of them begin at 0 when it equals num_new.
        """
        self.rows, self.positions, self.seen = rows, positions, seen
        self._masks = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values, [num_rows, num_heads, num_new, head_dim]; returns all that the rows may see."""
        if torch.is_autocast_enabled(key.device.type):  # attention would cast all that is kept, at every token
            dtype = torch.get_autocast_dtype(key.device.type)
            key, value = key.to(dtype), value.to(dtype)
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key))
            self.values.append(self._empty(value))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        num_rows = key.shape[0]
        rows = torch.arange(num_rows, device=key.device) if self.rows is None else self.rows
        keys[rows[:, None], :, self.positions] = key.transpose(1, 2)
        values[rows[:, None], :, self.positions] = value.transpose(1, 2)
        if self.seen == key.shape[2]:
            return key, value
        taken = slice(num_rows) if self.rows is None else self.rows
        return keys[taken, :, : self.seen], values[taken, :, : self.seen]

    def mask(self, window: int | None) -> Tensor:
        """What each new token may see, [num_rows, 1, num_new, seen] bool; within ``window`` places of it."""
        key = window or 0
        if key not in self._masks:
            place = torch.arange(self.seen, device=self.positions.device)
            at = self.positions[:, None, :, None]
            self._masks[key] = (place <= at) & (place > at - key) if key else place <= at
        return self._masks[key]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` places of a slot."""
        for held in (*self.keys, *self.values):
            held[target, :, :length] = held[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given with every call


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,  # [num_rows, num_heads, num_new, head_dim]
    key: Tensor,  # [num_rows, num_kv_heads, seen, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slots: Slots | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over ``Slots``; [num_rows, num_new, num_heads, head_dim]."""
    if slots is None:
        raise InputError("a model with this attention needs slots: decode with trsd.engines.hf.HFEngine")
    if s_aux is not None:
        raise InputError("slots have no sink logits: choose another architecture")
    mask = slots.mask(sliding_window)
    num_rows, num_heads, num_new, head_dim = query.shape
    num_kv_heads = key.shape[1]
    scale = head_dim**-0.5 if scaling is None else scaling
    if num_new > WHOLE_SCORES and not softcap:
        group = num_heads // num_kv_heads
        key, value = (t if group == 1 else t.repeat_interleave(group, 1) for t in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return output.transpose(1, 2), None
    grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim) * scale  # [.., group · num_new, head_dim]
    scores = (grouped @ key.transpose(2, 3)).float().view(num_rows, num_kv_heads, -1, num_new, key.shape[2])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill_(~mask[:, None], -torch.inf).softmax(-1).to(value.dtype)
    output = weights.flatten(2, 3) @ value
    return output.view(num_rows, num_heads, num_new, head_dim).transpose(1, 2), None


AttentionInterface.register(SLOT_ATTENTION, _slot_attention)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two lists share."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # one[:low] == other[:low] and the lists differ before or at high
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
