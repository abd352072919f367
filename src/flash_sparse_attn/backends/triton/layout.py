"""How large a plan is: from the shapes of a call alone, so that the host reads nothing back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import (
    FEW_EPOCH,
    FEW_EPOCHS,
    MANY_EPOCHS,
    MAX_EPOCH,
    SLOT_ALIGN,
    epoch_length,
)

_FIXED_EPOCHS = 4  # epochs of a selection whose keys never leave
_MIN_EPOCH = 16


@dataclass(frozen=True)
class Layout:
    """Sizes of a plan; the names are those of `Plan`. Works on symbolic sizes as well.

    Attributes:
        epoch_len: Queries of an epoch, a power of two.
        num_epochs: ``E``; for packed sequences an upper bound.
        old_slots: Slots of the old part.
        num_slots: ``P``.
        query_len: ``Q``.
        key_len: ``K``.
        is_sorted: Whether old keys are ordered by rank: keys of a causal selection leave.
    """

    epoch_len: int
    num_epochs: int
    old_slots: int
    num_slots: int
    query_len: int
    key_len: int
    is_sorted: bool

    @classmethod
    def of(
        cls,
        query_len: int,
        key_len: int,
        mode: str,
        window_size: int,
        keep_first: int,
        keep_recent: int,
        num_sequences: int | None,
        epoch_len: int | None = None,
    ) -> Layout:
        """The layout of a call over a selection; `num_sequences` is ``None`` unless packed."""
        ranked = mode == "causal"
        kept = key_len
        if mode != "relu":
            kept = min(key_len, window_size + keep_first + (0 if ranked else keep_recent))
        if epoch_len is None:
            epoch_len = epoch_length(kept, keep_recent)
            most = min(max(2 * epoch_len, 1024), MAX_EPOCH)
            while ranked and epoch_len < most and query_len >= MANY_EPOCHS * epoch_len:
                epoch_len *= 2
            while ranked and epoch_len > FEW_EPOCH and query_len < FEW_EPOCHS * epoch_len:
                epoch_len //= 2
            if not ranked and not keep_recent:
                while epoch_len * _FIXED_EPOCHS < query_len:
                    epoch_len *= 2
        # Comparisons instead of bit arithmetic: a compiler can keep the length symbolic.
        while epoch_len > _MIN_EPOCH and epoch_len // 2 >= query_len:
            epoch_len //= 2
        num_epochs = -(-query_len // epoch_len)
        if num_sequences is not None:
            num_epochs = query_len // epoch_len + num_sequences
        old_slots = _aligned(kept)
        num_new = epoch_len + max(keep_recent, 1) - 1 if ranked or keep_recent else 0
        return cls(
            epoch_len,
            num_epochs,
            old_slots,
            old_slots + _aligned(min(num_new, key_len)),
            query_len,
            key_len,
            # A window over everything never lets a key go: any order will do.
            ranked and kept < key_len,
        )

    def shapes(
        self, rows: int, is_packed: bool, for_backward: bool
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of the plan, in its order; empty for ``None``."""
        slots = (rows, self.num_epochs, self.num_slots)
        queries = (rows, self.query_len)
        uses = (rows * self.key_len,) if for_backward else (0,)
        used = (rows * self.num_epochs * self.num_slots,) if for_backward else (0,)
        ints = torch.int32
        return [
            (slots, ints),
            (slots, ints),
            (slots, ints),
            ((rows, self.num_epochs, 2), ints),
            (queries, ints),
            (queries, ints),
            (uses, torch.int64),
            (used, ints),
            ((self.num_epochs, 8) if is_packed else (0,), ints),
            *[((0,), ints)] * 3,  # of masks
        ]


def _aligned(size: int) -> int:
    return -(-size // SLOT_ALIGN) * SLOT_ALIGN
