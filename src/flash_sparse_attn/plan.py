"""What a call has to read: epochs of queries, and the keys that each epoch needs, in order.

The queries of a sequence are cut into *epochs* of ``L`` neighbours. All queries of an epoch walk
one list of key *slots*, which has two parts:

* the *old* part: keys of which a prefix is visible to every query. In a causal selection these are
  the survivors at the epoch's first position, best first: they die worst first, so that the dead
  are a suffix at any time. In the other modes they are the chosen keys by position, which only
  enter.
* the *new* part: the keys that enter during the epoch (and those kept for being recent), by
  position, each with the interval of positions that see it.

The order depends on the past only: what comes later can hide a slot, never move it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Epochs and their key slots. Immutable; a pytree of tensors; holds nothing about values.

    ``R`` is ``B * Hkv`` (packed: ``Hkv``), ``E`` the number of epochs, ``P`` the slots of an epoch,
    ``Q`` and ``K`` the queries and keys of a batch entry (packed: of all sequences).

    Attributes:
        slot_key: int32 ``[R, E, P]``, the key in each slot (packed: its row), -1 for none. Slots
            past the last block of 128 that holds a key are not written.
        slot_start: int32 ``[R, E, P]``, the first position that sees the key.
        slot_expiry: int32 ``[R, E, P]``, the first position that no longer does.
        counts: int32 ``[R, E, 2]``, the used slots of the old and of the new part.
        visible: int32 ``[R, Q]``, how many old slots, from the first on, each query sees.
        entered: int32 ``[R, Q]``, how many new slots, from the first on, it may see.
        use_end: int64 ``[R * K]`` or ``None``: the uses of key ``j`` are the entries of `use_slot`
            from ``use_end[j - 1]`` to ``use_end[j]``.
        use_slot: int32 ``[R * E * P]`` or ``None``: ``epoch * P + slot`` of every use, epochs
            rising.
        epochs: int32 ``[E, 8]`` for packed sequences, else ``None``: first query, number of
            queries, position of the first, first key and number of keys of its sequence, the first
            epoch and the number of that sequence, and 0.
        epoch_len: ``L``.
        old_slots: Slots of the old part; the new part begins there.
        query_len: ``Q``.
        key_len: ``K``.
        clamps_positions: Whether negative positions (``Q > K``) count as 0, as they do without
            causality.
    """

    slot_key: Tensor
    slot_start: Tensor
    slot_expiry: Tensor
    counts: Tensor
    visible: Tensor
    entered: Tensor
    use_end: Tensor | None
    use_slot: Tensor | None
    epochs: Tensor | None
    epoch_len: int
    old_slots: int
    query_len: int
    key_len: int
    clamps_positions: bool

    @property
    def num_epochs(self) -> int:
        """``E``; for packed sequences an upper bound."""
        return self.slot_key.shape[1]

    @property
    def num_slots(self) -> int:
        """``P``."""
        return self.slot_key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``epoch_len, old_slots, query_len, key_len``."""
        return self.epoch_len, self.old_slots, self.query_len, self.key_len

    def tensors(self) -> list[Tensor]:
        """All tensors, empty ones in place of ``None``: what an operator can take and return."""
        none = self.slot_key.new_empty(0)
        parts = (getattr(self, name) for name in _TENSORS)
        return [none if part is None else part for part in parts]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of `tensors`."""
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    @cached_property
    def facts(self) -> tuple[Any, ...]:
        """All that a kernel is told about the plan but the addresses."""
        alignments = tuple(address & 15 if address else -1 for address in self.addresses)
        return self.slot_key.shape, self.sizes, self.clamps_positions, alignments

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: the fields, not the addresses of these tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, tensors: list[Tensor], sizes: list[int], clamps_positions: bool) -> Plan:
        """The inverse of `tensors` and `sizes`."""
        facts: dict[str, Any] = dict(zip(_SIZES, (*sizes, clamps_positions), strict=True))
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            facts[name] = tensor if tensor.numel() else None
        return cls(**facts)

    def fits(self, query_len: int, is_causal: bool, for_backward: bool) -> bool:
        """Whether a call with so many queries can use this plan."""
        return (
            self.query_len == query_len
            and self.clamps_positions != is_causal
            and (self.use_end is not None or not for_backward)
        )

    def bounds(self) -> list[tuple[int, int, int]]:
        """First query, number of queries, first position of every epoch; a sync if packed."""
        if self.epochs is not None:
            return [(row[0], row[1], row[2]) for row in self.epochs.tolist()]
        starts = [e * self.epoch_len for e in range(self.num_epochs)]
        shift = self.key_len - self.query_len
        return [(q, min(self.epoch_len, self.query_len - q), q + shift) for q in starts]

    def to_dense(self) -> Tensor:
        """The mask ``[R, Q, K]`` that kernels execute, from the slots alone. For tests: O(Q K)."""
        rows = self.slot_key.shape[0]
        dense = torch.zeros(
            rows, self.query_len, self.key_len, dtype=torch.bool, device=self.slot_key.device
        )
        counts = self.counts.tolist()
        for epoch, (first, num, position) in enumerate(self.bounds()):
            positions = torch.arange(position, position + num, device=dense.device)
            if self.clamps_positions:
                positions = positions.clamp(min=0)
            for row in range(rows):
                used_old, used_new = counts[row][epoch]
                view = dense[row, first : first + num]
                for begin, used in ((0, used_old), (self.old_slots, used_new)):
                    part = slice(begin, begin + used)
                    start = self.slot_start[row, epoch, part]
                    expiry = self.slot_expiry[row, epoch, part]
                    sees = (start <= positions[:, None]) & (positions[:, None] < expiry)
                    view[:, self.slot_key[row, epoch, part].long()] |= sees
        return dense

    def __repr__(self) -> str:
        rows, epochs, slots = self.slot_key.shape
        return (
            f"Plan({rows} rows x {epochs} epochs of {self.epoch_len} queries x {slots} slots, "
            f"Q={self.query_len} K={self.key_len}{', packed' if self.epochs is not None else ''}"
            f"{', for backward' if self.use_end is not None else ''}, {self.nbytes >> 10} KiB, "
            f"device={self.slot_key.device})"
        )


_TENSORS = (
    "slot_key",
    "slot_start",
    "slot_expiry",
    "counts",
    "visible",
    "entered",
    "use_end",
    "use_slot",
    "epochs",
)
_SIZES = ("epoch_len", "old_slots", "query_len", "key_len", "clamps_positions")

_pytree.register_pytree_node(
    Plan,
    lambda plan: (
        [getattr(plan, name) for name in _TENSORS],
        tuple(getattr(plan, name) for name in _SIZES),
    ),
    lambda children, context: Plan(*children, *context),
    serialized_type_name="flash_sparse_attn.plan.Plan",
)
