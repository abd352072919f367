"""Device functions of a `WindowCache`: which slots a new token leaves visible, and its commit.

A row is one (batch entry, KV head) with its slots. The order of keys is one int64, the *rank key*:
the ordered score in the upper half, the position in the lower, `EMPTY` for an empty slot. The state
holds the threshold of every row, the ``W``-th best rank key of its slots. A token moves it by at
most one key, so that a step needs no selection: a token that beats the threshold takes the place of
the key at it, and the next threshold is the lowest rank key above the old one, the token's own
included.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))
_HIGHEST = tl.constexpr(2**63 - 1)
_NO_SLOT = tl.constexpr(2**31 - 1)

NOTES = tl.constexpr(6)
"""int64 that a split leaves for the commit: the lowest rank key above the threshold, the first free
slot, the first and the last slot that loses its key, the threshold, the tokens read before."""


@triton.jit
def rank_keys(score, position):
    """Rank keys of fp32 scores and int64 positions, -1 for an empty slot; see `order_key`."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    order = tl.where(score != score, -2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(position < 0, EMPTY, (order.to(tl.int64) << 32) + position)


@triton.jit
def load_token(ptr_new_score, ptr_real, position, i_row, i_batch):
    """The new token of a row: rank key (`EMPTY` for padding), score, and 1 if it is real."""
    score = tl.load(ptr_new_score + i_row).to(tl.float32)
    key = rank_keys(score, position)
    if ptr_real is None:
        return key, score, tl.full([], 1, tl.int64)
    else:
        real = tl.load(ptr_real + i_batch).to(tl.int64)
        return tl.where(real != 0, key, EMPTY), score, real


@triton.jit
def keeps_slots(
    key, position, token, seen_after, threshold, keep_first, keep_recent, KEEPS: tl.constexpr
):
    """Which slots hold a key that stays visible with the token, after `seen_after` real tokens."""
    kept = (key > threshold) | ((key == threshold) & (token <= threshold))
    if KEEPS:
        kept = kept | (position < keep_first) | (position >= seen_after - keep_recent)
    return kept & (position >= 0)


@triton.jit
def no_notes(BLOCK_N: tl.constexpr):
    """The notes of a split that has seen no slot, the four that differ. [BLOCK_N] each."""
    above = tl.full([BLOCK_N], _HIGHEST, tl.int64)
    none = tl.full([BLOCK_N], _NO_SLOT, tl.int32)
    return above, none, none, tl.full([BLOCK_N], -1, tl.int32)


@triton.jit
def note_slots(above, free, first_lost, last_lost, slot, inside, key, position, kept, threshold):
    """The notes with a block of slots."""
    lost = inside & (position >= 0) & ~kept
    above = tl.minimum(above, tl.where(inside & (key > threshold), key, _HIGHEST))
    free = tl.minimum(free, tl.where(inside & ~kept, slot, _NO_SLOT))
    first_lost = tl.minimum(first_lost, tl.where(lost, slot, _NO_SLOT))
    last_lost = tl.maximum(last_lost, tl.where(lost, slot, -1))
    return above, free, first_lost, last_lost


@triton.jit
def store_notes(ptr_note, above, free, first_lost, last_lost, threshold, position):
    """Leave a split's notes for the commit."""
    tl.store(ptr_note, tl.min(above, 0))
    tl.store(ptr_note + 1, tl.min(free, 0).to(tl.int64))
    tl.store(ptr_note + 2, tl.min(first_lost, 0).to(tl.int64))
    tl.store(ptr_note + 3, tl.max(last_lost, 0).to(tl.int64))
    tl.store(ptr_note + 4, threshold)
    tl.store(ptr_note + 5, position)


@triton.jit
def load_notes(ptr_note, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """The notes of all splits of a row."""
    split = tl.arange(0, SPLITS_PAD)
    mask = split < SPLITS
    ptrs = ptr_note + split * NOTES
    above = tl.min(tl.load(ptrs, mask=mask, other=_HIGHEST), 0)
    free = tl.min(tl.load(ptrs + 1, mask=mask, other=_NO_SLOT), 0)
    first_lost = tl.min(tl.load(ptrs + 2, mask=mask, other=_NO_SLOT), 0)
    last_lost = tl.max(tl.load(ptrs + 3, mask=mask, other=-1), 0)
    return above, free, first_lost, last_lost


@triton.jit
def keeps_token(token, position, threshold, keep_first, keep_recent):
    """Whether a new token is visible to its own query and stored."""
    return (token > threshold) | ((token != EMPTY) & ((position < keep_first) | (keep_recent > 0)))


@triton.jit
def commit_token(
    ptr_note, ptr_slot_score, ptr_position, ptr_threshold, ptr_seen, ptr_evicted, token, score,
    position, seen_after, threshold, stored, i_row, i_batch, i_head, capacity, window_size,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Empty the slots that lost their keys, and give the first free one to a stored token.

    Returns the token's slot, or `capacity` if it is not stored. No program of the kernel reads what
    another writes here; rows of a batch entry that evict write the same number.
    """
    above, free, first_lost, last_lost = load_notes(ptr_note, SPLITS, SPLITS_PAD)
    slot = tl.where(stored, tl.minimum(free, capacity), capacity)
    ptr_position += i_row * capacity
    evicts = last_lost >= 0
    tl.store(ptr_position + first_lost, -1, mask=evicts & (first_lost != slot))
    tl.store(ptr_position + last_lost, -1, mask=evicts & (last_lost != slot))
    tl.store(ptr_position + slot, position, mask=slot < capacity)
    tl.store(ptr_slot_score + i_row * capacity + slot, score, mask=slot < capacity)

    # Until W tokens were read there is no W-th best.
    is_full = (threshold != EMPTY) | (seen_after >= window_size)
    moves = (token > threshold) & is_full
    tl.store(ptr_threshold + i_row, tl.minimum(above, token), mask=moves)
    tl.store(ptr_seen + i_batch, seen_after, mask=i_head == 0)
    tl.store(ptr_evicted + i_batch, seen_after, mask=evicts)
    return slot
