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

Three kinds of slots serve all calls, see `Plan.slots`. A selection of keys has intervals, and its
slots are *copied* to be read as blocks. A bool mask has one bit for each query and slot, and its
slots are *gathered* from the keys, since nothing bounds their number. Where all keys are needed the
slots are the *keys* themselves and the plan holds no lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class ListSizes(NamedTuple):
    """What a list of blocks or tiles is for: a kernel with tiles of these sizes.

    Attributes:
        of_tiles: Whether it has the blocks of slots of every query tile, or else the query tiles of
            every block.
        group: ``H / Hkv``.
        block_m: Rows, (query, head of a KV head) pairs, of a tile.
        block_n: Slots of a block.
    """

    of_tiles: bool
    group: int
    block_m: int
    block_n: int

    def shape(self, epoch_len: int, num_slots: int) -> tuple[int, int]:
        """Tiles or blocks that have a list in an epoch, and its length: entries after 3 or 2."""
        num_tiles = -(-epoch_len * self.group // self.block_m)
        num_blocks = num_slots // self.block_n
        return (num_tiles, 3 + num_blocks) if self.of_tiles else (num_blocks, 2 + num_tiles)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Epochs and their key slots. Immutable; a pytree of tensors; holds nothing about values.

    ``R`` is ``B * Hkv`` (packed: ``Hkv``), ``E`` the number of epochs, ``P`` the slots of an epoch,
    ``Q`` and ``K`` the queries and keys of a batch entry (packed: of all sequences). Plans of masks
    have ``[{1|B}, {1|Hkv}]`` in the place of ``[R]``, and share what is the same for all. Instead
    of ``E`` a list may have 1: the same slots serve all epochs.

    Attributes:
        slot_key: int32 ``[R, E, P]``, the key in each slot (packed: its row), -1 for none. Slots
            past the last block of 128 that holds a key are not written. ``None`` if the slots are
            the keys in order.
        slot_start: int32 ``[R, E, P]``, the first position that sees the key.
        slot_expiry: int32 ``[R, E, P]``, the first position that no longer does.
        counts: int32 ``[R, E, 2]``, the used slots of the old and of the new part.
        visible: int32 ``[R, Q]``, how many old slots, from the first on, each query sees.
        entered: int32 ``[R, Q]``, how many new slots, from the first on, it may see.
        use_end: int64 ``[R * K]`` or ``None``: the uses of key ``j`` are the entries of `use_slot`
            from ``use_end[j - 1]`` to ``use_end[j]``.
        use_slot: int32 ``[R * E * P]`` or ``None``: ``epoch * P + slot`` of every use, epochs
            rising. Without `use_end` it is ``[R, E, K]``: the slot of every key, -1 for none.
        epochs: int32 ``[E, 8]`` for packed sequences, else ``None``: first query, number of
            queries, position of the first, first key and number of keys of its sequence, the first
            epoch and the number of that sequence, and 0.
        slot_bits: int32 ``[R, E, members, L / 32, P]`` or ``None``, instead of intervals: bit ``i``
            of word ``w`` says whether query ``32 w + i`` of the epoch sees the slot, for each head
            of a KV head if they differ.
        block_bits: int32 ``[R, E, members, L / 32, P / 32, 2]``: whether each query sees any, and
            all, of 32 slots.
        mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})`` or ``None``, read by the kernels themselves
            where the slots are the keys.
        lists: int32 ``[rows, E, tiles, 3 + blocks]`` or ``[rows, E, blocks, 2 + tiles]`` for each
            of `list_sizes`, beside `block_bits`: how many entries are visible whole, how many are
            visible at all, for tiles the first key of the epoch if its keys lie side by side, else
            -1, and the entries, whole ones first. A kernel of other sizes makes its own.
        list_sizes: What `lists` are for.
        epoch_len: ``L``.
        old_slots: Slots of the old part; the new part begins there.
        query_len: ``Q``.
        key_len: ``K``.
        clamps_positions: Whether negative positions (``Q > K``) count as 0, as they do without
            causality.
    """

    slot_key: Tensor | None
    slot_start: Tensor | None
    slot_expiry: Tensor | None
    counts: Tensor | None
    visible: Tensor | None
    entered: Tensor | None
    use_end: Tensor | None
    use_slot: Tensor | None
    epochs: Tensor | None
    epoch_len: int
    old_slots: int
    query_len: int
    key_len: int
    clamps_positions: bool
    slot_bits: Tensor | None = None
    block_bits: Tensor | None = None
    mask: Tensor | None = None
    lists: tuple[Tensor, ...] = ()
    list_sizes: tuple[ListSizes, ...] = ()

    @property
    def slots(self) -> str:
        """``"copied"``, ``"gathered"`` or ``"keys"``; see the module."""
        if self.slot_key is None:
            return "keys"
        return "copied" if self.slot_bits is None else "gathered"

    @property
    def is_selection(self) -> bool:
        """Whether it was made from a selection: every row and epoch has a list of its own."""
        return self.slot_key is not None and self.slot_key.dim() == 3

    @property
    def num_epochs(self) -> int:
        """``E``; for packed sequences an upper bound."""
        if self.epochs is not None:
            return self.epochs.shape[0]
        return -(-self.query_len // self.epoch_len)

    @property
    def num_lists(self) -> int:
        """Slot lists of a row: ``E``, or 1 for all epochs."""
        return 1 if self.slot_key is None else self.slot_key.shape[-2]

    @property
    def num_slots(self) -> int:
        """``P``."""
        return self.old_slots if self.slot_key is None else self.slot_key.shape[-1]

    @property
    def members(self) -> int:
        """Heads of a KV head that `slot_bits` tells apart."""
        return 1 if self.slot_bits is None else self.slot_bits.shape[-3]

    def row_strides(self, heads_kv: int) -> tuple[int, int]:
        """From one batch entry, and one KV head, to the next among the rows of the plan."""
        if self.slot_key is None or self.is_selection:
            return heads_kv, 1
        batches, heads = self.slot_key.shape[:2]
        return (heads if batches > 1 else 0), (1 if heads > 1 else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in self.parts if part is not None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """``epoch_len, old_slots, query_len, key_len``, then `list_sizes` one after the other."""
        own = self.epoch_len, self.old_slots, self.query_len, self.key_len
        return (*own, *(int(size) for sizes in self.list_sizes for size in sizes))

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """All tensors in order, ``None`` for those it does not have."""
        return (
            self.slot_key,
            self.slot_start,
            self.slot_expiry,
            self.counts,
            self.visible,
            self.entered,
            self.use_end,
            self.use_slot,
            self.epochs,
            self.slot_bits,
            self.block_bits,
            self.mask,
            *self.lists,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, empty ones in place of ``None``: what an operator can take and return."""
        parts = self.parts
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return []
        # Not one for all: what an operator returns may not share memory.
        return [some.new_empty(0, dtype=torch.int32) if p is None else p for p in parts]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of `parts`, 0 for ``None``."""
        return tuple(0 if part is None else part.data_ptr() for part in self.parts)

    @cached_property
    def facts(self) -> tuple[Any, ...]:
        """All that a kernel is told about the plan but the addresses."""
        alignments = tuple(address & 15 for address in self.addresses)
        forms = tuple(None if part is None else (part.shape, part.stride()) for part in self.parts)
        return forms, self.sizes, self.clamps_positions, alignments

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: the fields, not the addresses of these tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor | None], sizes: Sequence[int], clamps_positions: bool
    ) -> Plan:
        """The inverse of `tensors` and `sizes`; no tensors at all are as good as empty ones."""
        given = tensors or [None] * len(_TENSORS)
        return cls._of(
            [tensor if tensor is not None and tensor.numel() else None for tensor in given],
            (*sizes, clamps_positions),
        )

    @classmethod
    def _of(cls, parts: Sequence[Any], facts: Sequence[int]) -> Plan:
        """From `parts`, or what a tree map put in their place, and `sizes` with the last field."""
        *sizes, clamps_positions = facts
        own, rest = sizes[: len(_SIZES)], sizes[len(_SIZES) :]
        values: dict[str, Any] = dict(zip(_TENSORS, parts[: len(_TENSORS)], strict=True))
        values |= zip(_SIZES, own, strict=True)
        count = len(ListSizes._fields)
        lists = (rest[i : i + count] for i in range(0, len(rest), count))
        return cls(
            **values,
            clamps_positions=bool(clamps_positions),
            lists=tuple(parts[len(_TENSORS) :]),
            list_sizes=tuple(ListSizes(bool(of_tiles), *numbers) for of_tiles, *numbers in lists),
        )

    def fits(self, query_len: int, is_causal: bool, for_backward: bool) -> bool:
        """Whether a call with so many queries can use this plan."""
        return (
            self.query_len == query_len
            and self.clamps_positions != is_causal
            and (self.use_slot is not None or not for_backward)
        )

    def lists_for(self, sizes: ListSizes) -> Tensor | None:
        """The list for a kernel of these sizes, if there is one."""
        return dict(zip(self.list_sizes, self.lists, strict=True)).get(sizes)

    def bounds(self) -> list[tuple[int, int, int]]:
        """First query, number of queries, first position of every epoch; a sync if packed."""
        if self.epochs is not None:
            return [(row[0], row[1], row[2]) for row in self.epochs.tolist()]
        starts = [e * self.epoch_len for e in range(self.num_epochs)]
        shift = self.key_len - self.query_len
        return [(q, min(self.epoch_len, self.query_len - q), q + shift) for q in starts]

    def to_dense(self) -> Tensor:
        """The mask ``[R, Q, K]`` that kernels execute, from the slots alone. For tests: O(Q K)."""
        assert self.slot_key is not None and self.counts is not None
        rows, shape = self.slot_key.shape[:-2].numel(), (self.query_len, self.key_len)
        dense = torch.zeros(rows, *shape, dtype=torch.bool, device=self.slot_key.device)
        slot_key = self.slot_key.flatten(0, -3)
        counts = self.counts.view(rows, -1, 2).tolist()
        for epoch, (first, num, position) in enumerate(self.bounds()):
            positions = torch.arange(position, position + num, device=dense.device)
            if self.clamps_positions:
                positions = positions.clamp(min=0)
            index = epoch if self.num_lists > 1 else 0
            for row in range(rows):
                used_old, used_new = counts[row][index]
                view = dense[row, first : first + num]
                for begin, used in ((0, used_old), (self.old_slots, used_new)):
                    part = slice(begin, begin + used)
                    key = slot_key[row, index, part].long()
                    view[:, key] |= self._sees(row, index, part, positions)
        return dense

    def _sees(self, row: int, index: int, part: slice, positions: Tensor) -> Tensor:
        """Which positions of an epoch see which slots; of heads told apart, whether any does."""
        if self.slot_bits is not None:
            words = self.slot_bits.flatten(0, 1)[row, index, :, :, part]
            query = torch.arange(len(positions), device=words.device)
            return ((words[:, query // 32] >> (query % 32)[:, None]) & 1).bool().any(0)
        assert self.slot_start is not None and self.slot_expiry is not None
        start = self.slot_start.flatten(0, -3)[row, index, part]
        expiry = self.slot_expiry.flatten(0, -3)[row, index, part]
        return (start <= positions[:, None]) & (positions[:, None] < expiry)

    def __repr__(self) -> str:
        rows = 1 if self.slot_key is None else self.slot_key.shape[:-2].numel()
        device = "" if self.slot_key is None else f", device={self.slot_key.device}"
        return (
            f"Plan({rows} rows x {self.num_epochs} epochs of {self.epoch_len} queries x "
            f"{self.num_slots} slots, {self.slots}, Q={self.query_len} K={self.key_len}"
            f"{', packed' if self.epochs is not None else ''}"
            f"{', for backward' if self.use_slot is not None else ''}, {self.nbytes >> 10} KiB"
            f"{device})"
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
    "slot_bits",
    "block_bits",
    "mask",
)
_SIZES = ("epoch_len", "old_slots", "query_len", "key_len")

_pytree.register_pytree_node(
    Plan,
    lambda plan: (list(plan.parts), (*plan.sizes, plan.clamps_positions)),
    lambda children, context: Plan._of(list(children), context),
    serialized_type_name="flash_sparse_attn.plan.Plan",
)
