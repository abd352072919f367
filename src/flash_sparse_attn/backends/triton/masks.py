"""How a call without a selection is planned: from shapes alone, so that the host reads nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...plan import ListSizes
from .config import (
    DENSE_PROGRAMS,
    DIRECT_KEYS,
    SHOWN_PROGRAMS,
    SLOT_ALIGN,
    Tiles,
    dense_epoch_length,
    mask_epoch_length,
)


@dataclass(frozen=True)
class MaskLayout:
    """Sizes of the plan of a call with a bool mask or none; the names are those of `Plan`.

    Attributes:
        kind: ``"keys"``: slots are the keys, and the kernels read the mask themselves. ``"shown"``:
            a list of the keys that a mask over keys shows. ``"bits"``: bits of the columns that any
            query of an epoch sees.
        row_batches, row_heads: Batch entries and KV heads with slots of their own.
        members: Heads of a KV head with bits of their own.
        epoch_len: Queries of an epoch.
        num_epochs: ``E``.
        num_slots: ``P``, all of them in the old part.
        query_len, key_len: ``Q`` and ``K``.
        reads_pairs: Whether the call has a bias that depends on the query.
        lists: The lists of blocks and tiles that the plan holds ready.
    """

    kind: str
    row_batches: int
    row_heads: int
    members: int
    epoch_len: int
    num_epochs: int
    num_slots: int
    query_len: int
    key_len: int
    reads_pairs: bool = False
    lists: tuple[ListSizes, ...] = ()

    @classmethod
    def of(
        cls,
        mask_shape: tuple[int, ...] | None,
        query_len: int,
        key_len: int,
        num_heads: int,
        heads_kv: int,
        batch: int,
        kind: str | None = None,
        epoch_len: int | None = None,
        *,
        reads_pairs: bool = False,
    ) -> MaskLayout:
        """The layout of a call; `kind` and `epoch_len` are chosen unless they are given."""
        batches, heads, queries, _ = mask_shape or (1, 1, 1, 1)
        row_heads = 1 if heads == 1 else heads_kv
        members = num_heads // heads_kv if heads == num_heads else 1
        if kind is None:
            kind = "keys"
            if mask_shape is not None and key_len > DIRECT_KEYS:
                kind = "shown" if queries == 1 and members == 1 else "bits"
        if epoch_len is None and kind == "bits":
            epoch_len = mask_epoch_length(query_len, reads_pairs)
        elif epoch_len is None:
            blocks, programs = batch * heads_kv * key_len // 64, DENSE_PROGRAMS
            if kind == "shown":
                blocks, programs = batches * row_heads * key_len // 1024, SHOWN_PROGRAMS
            epoch_len = dense_epoch_length(query_len, blocks, programs)
        return cls(
            kind,
            batches,
            row_heads,
            members,
            epoch_len,
            -(-query_len // epoch_len),
            -(-key_len // SLOT_ALIGN) * SLOT_ALIGN,
            query_len,
            key_len,
            reads_pairs,
        )

    def with_lists(
        self, tiles: Tiles, group: int, num_rows: int, *, for_backward: bool
    ) -> MaskLayout:
        """The layout with the lists that the kernels of these sizes read; without bits the same.

        Args:
            tiles: Of the call.
            group: ``H / Hkv``.
            num_rows: (query, head) pairs of the call.
            for_backward: Also those of the backward pass. Where that gathers a bias of pairs it
                makes them itself: before forward they would take 7 of 500 microseconds, there they
                are lost among 1300.
        """
        if self.kind != "bits":
            return self
        readers = [(True, tiles.forward_of("gathered", num_rows))]
        if for_backward and not self.reads_pairs:
            readers += [(True, tiles.grad_query), (False, tiles.grad_key)]
        lists = (ListSizes(of, group, each.block_m, each.block_n) for of, each in readers)
        return replace(self, lists=tuple(dict.fromkeys(lists)))  # one serves those of equal sizes

    @property
    def rows(self) -> tuple[int, int]:
        return self.row_batches, self.row_heads

    @property
    def sizes(self) -> list[int]:
        """`Plan.sizes`."""
        own = [self.epoch_len, self.num_slots, self.query_len, self.key_len]
        return own + [int(size) for sizes in self.lists for size in sizes]

    def shapes(self, for_backward: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of a plan that is not of the keys; empty for ``None``."""
        is_shown = self.kind == "shown"
        lists = (*self.rows, 1 if is_shown else self.num_epochs)
        slots = (*lists, self.num_slots)
        interval = slots if is_shown else (0,)
        queries = (*self.rows, self.query_len) if is_shown else (0,)
        words = (*lists, self.members, self.epoch_len // 32)
        bits = ((0,), (0,)) if is_shown else (
            (*words, self.num_slots), (*words, self.num_slots // 32, 2),
        )  # fmt: skip
        used = (*lists, self.key_len) if for_backward else (0,)
        all_shapes = (
            slots, interval, interval, (*lists, 2), queries, queries, (0,), used, (0,), *bits, (0,),
            *((*lists, *each.shape(self.epoch_len, self.num_slots)) for each in self.lists),
        )  # fmt: skip
        return [(shape, torch.int32) for shape in all_shapes]

    def empty(self, device: torch.device, for_backward: bool) -> list[torch.Tensor | None]:
        """The tensors of `shapes`, to be filled; ``None`` for those that the plan has not."""
        return [
            torch.empty(shape, dtype=dtype, device=device) if shape != (0,) else None
            for shape, dtype in self.shapes(for_backward)
        ]
