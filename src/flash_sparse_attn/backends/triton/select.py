"""Key selection on the GPU: start and expiry of every key from its score.

Key ``j`` expires at the first position at which ``W`` better keys exist. For any ``K`` and ``W``,
with work that depends on shapes only:

1. `_encode_kernel` turns scores into bit planes: word ``w`` of plane ``b`` holds bit ``b`` of the
   order keys of 32 neighbouring keys. The k-th best key of a set is then found bit by bit, with an
   AND and a population count for 32 keys.
2. `_node_kernel` cuts every sequence into nodes. Within a node of length ``L`` at most ``L`` keys
   can die, so only the ``L`` worst survivors at its start matter besides its own keys, whatever
   ``W`` is. They are listed by position, with planes of their own, level by level: the lists of
   long nodes are what the lists of short ones are chosen from.
3. `_chunk_kernel` finds the survivors that may die within one chunk and compares them, and the
   chunk's keys, with the chunk's keys: a key expires where its last missing rival arrives.

Symbols: ``R`` rows (batch x KV heads), ``K`` keys of a row, a *word* is 32 keys. A *set* is a list
followed by keys of the row; its words are those of the list, then those of the row's planes.
Positions count from the start of the row until they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...intervals import NEVER

_NEVER = tl.constexpr(NEVER)
_PADDING = tl.constexpr(-(2**31))
_NAN = tl.constexpr(-(2**31) + 1)
_NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _popcount(x):
    """Set bits of int32 words, by plain arithmetic: no intrinsic exists on every target."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _nth_bit(word, n):
    """Index of the set bit of an int32 word that has `n` set bits below it."""
    word = word.to(tl.uint32, bitcast=True)
    at = n * 0
    for level in tl.static_range(5):
        part = (word >> at.to(tl.uint32)) & ((1 << (16 >> level)) - 1)
        count = _popcount(part.to(tl.int32, bitcast=True))
        above = n >= count
        at += tl.where(above, 16 >> level, 0)
        n -= tl.where(above, count, 0)
    return at


@triton.jit
def _low_bits(n):
    """An int32 word with the lowest `n` bits set, ``0 <= n <= 32``."""
    return tl.where(n < 32, (1 << (n & 31)) - 1, -1)


@triton.jit
def _bits_within(first, low, high):
    """The bits of words that begin at `first` whose positions lie in ``[low, high)``."""
    below_low = tl.minimum(tl.maximum(low - first, 0), 32)
    below_high = tl.minimum(tl.maximum(high - first, 0), 32)
    return _low_bits(below_high) & ~_low_bits(below_low)


@triton.jit
def _order_keys(score_ptr, mask_ptr, index, live, HAS_MASK: tl.constexpr):
    """Canonical int32 order keys: larger is better. Padding and lanes that are not live are lowest."""
    bits = tl.load(score_ptr + index, mask=live, other=0.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(magnitude > 0x7F800000, _NAN, order)
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + index, mask=live, other=0) != 0)
    return tl.where(live, order, _PADDING)


@triton.jit
def _plane(order, b):
    """Words of bit `b` of order keys ``[WORDS, 32]``, as unsigned numbers of the same order."""
    bits = ((order ^ _PADDING) >> b) & 1
    return tl.sum(bits << tl.arange(0, 32)[None, :], 1)


@triton.jit
def _sequence_of(cu_ptr, n_seqs, index, length, NODES: tl.constexpr):
    """The last sequence that begins at or before `index`, which counts keys or nodes.

    Node ``m`` of sequence ``q`` has the number ``cu[q] // length + q + m``. These rise, so neither
    a table nor a look at the lengths is needed on the host.
    """
    seq = index * 0
    size = n_seqs
    while size > 1:
        half = size // 2
        first = tl.load(cu_ptr + seq + half)
        if NODES:
            first = first // length + seq + half
        seq = tl.where(first <= index, seq + half, seq)
        size -= half
    return seq


@triton.jit
def _locate(cu_ptr, key_len, n_seqs, length, PACKED: tl.constexpr):
    """Row and sequence of this program's node of `length`, and where the node begins."""
    nodes = key_len // length + n_seqs
    row = tl.program_id(0) // nodes
    node = tl.program_id(0) % nodes
    begin = node * 0
    end = begin + key_len
    if PACKED:
        seq = _sequence_of(cu_ptr, n_seqs, node, length, True)
        begin = tl.load(cu_ptr + seq)
        end = tl.load(cu_ptr + seq + 1)
        node -= begin // length + seq
    return row.to(tl.int64), begin, end, begin + node * length


@triton.jit
def _parent(begin, start, window, length):
    """Of the node of `length` that `start` lies in: its first key, and the number of its list.

    The list holds the `n_list` survivors behind the best `above`. The first node of a sequence has
    none; the others have ``begin // length + m - 1``, which is distinct for all sequences of a row.
    """
    m = (start - begin) // length
    low = begin + m * length
    above = tl.minimum(low - begin, tl.maximum(window - length, 0))
    return low, begin // length + m - 1, above, tl.minimum(low - begin, window) - above


@triton.jit
def _always_kept(index, begin, rank_ptr, arrival_ptr, key_len, keep_first, keep_recent, live,
                 HAS_RANK: tl.constexpr):  # fmt: skip
    """Which keys are kept for ever, and up to which position the others are kept at least."""
    nth = index - begin
    until = index + keep_recent
    if HAS_RANK:
        nth = tl.load(rank_ptr + index, mask=live, other=0)
        arrival = nth + keep_recent
        nth -= tl.load(rank_ptr + begin + index * 0, mask=live, other=0)
        until = tl.load(arrival_ptr + arrival, mask=live & (arrival < key_len), other=_NEVER)
    return nth < keep_first, until


@triton.jit(do_not_specialize=["key_len", "heads", "n_seqs", "row_words", "n_tiles"])
def _encode_kernel(score_ptr, mask_ptr, cu_ptr, planes_ptr, start_ptr, expiry_ptr,
                   key_len, heads, n_seqs, row_words, n_tiles,
                   HAS_MASK: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Bit planes ``[R, 32, row_words]``, and the intervals of keys that nothing drives out."""
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    word = (tl.program_id(0) % n_tiles) * WORDS + tl.arange(0, WORDS)
    # [WORDS, 32]
    index = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    live = (word < row_words)[:, None] & (index < key_len)
    masks = mask_ptr + row // heads * key_len
    order = _order_keys(score_ptr + row * key_len, masks, index, live, HAS_MASK)
    planes = planes_ptr + row * 32 * row_words + word
    for b in range(32):
        tl.store(planes, _plane(order, b), mask=word < row_words)
        planes += row_words

    local = index
    if PACKED:
        seq = _sequence_of(cu_ptr, n_seqs, index, 1, False)
        local = index - tl.load(cu_ptr + seq, mask=live, other=0)
    tl.store(start_ptr + row * key_len + index, local, mask=live)
    expiry = tl.where(order == _PADDING, local, _NEVER)
    tl.store(expiry_ptr + row * key_len + index, expiry, mask=live)


@triton.jit
def _members(w, list_words, n_list, row_first, low, high):
    """The bits of the words `w` of a set that stand for members: list entries, keys [low, high)."""
    is_list = w < list_words
    first = tl.where(is_list, w, row_first + w) * 32
    return _bits_within(first, tl.where(is_list, 0, low), tl.where(is_list, n_list, high))


@triton.jit
def _narrow(ptr, step, tied, bit, digit, live):
    """Of the keys still tied those with `digit` in the planes ``bit + 1`` and `bit`."""
    upper = tl.load(ptr + (bit + 1) * step, mask=live, other=0)
    lower = tl.load(ptr + bit * step, mask=live, other=0)
    return tied & (upper ^ ((digit >> 1) - 1)) & (lower ^ ((digit & 1) - 1))


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _tie(tied, w, count, upto, skipped):
    """Index of the tied key that has `skipped` tied keys before it, 0 if there is none here."""
    before = upto - count
    hit = (upto > skipped) & (before <= skipped)
    return tl.sum(tl.where(hit, w * 32 + _nth_bit(tied, skipped - before), 0), 0)


@triton.jit
def _kth_best(state_ptr, list_ptr, row_ptr, list_step, row_step, n_words, list_words, n_list,
              row_first, low, high, rank, total,
              OLDER_WINS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Order key and index of the `rank`-th best (from 1) of the `total` keys of a set.

    Two bits of the answer a round; `state` holds the keys that agree with it so far. A rank beyond
    `total` gives order key 0, which every key reaches.
    """
    value = rank * 0
    digit = rank * 0
    for step in range(16):
        bit = 30 - 2 * step
        n3 = tl.zeros([TILE], tl.int32)
        n2 = tl.zeros([TILE], tl.int32)
        n1 = tl.zeros([TILE], tl.int32)
        for w0 in range(0, n_words, TILE):
            w = w0 + tl.arange(0, TILE)
            live = w < n_words
            ptr = tl.where(w < list_words, list_ptr + w, row_ptr + w)
            plane_step = tl.where(w < list_words, list_step, row_step)
            upper = tl.load(ptr + (bit + 1) * plane_step, mask=live, other=0)
            lower = tl.load(ptr + bit * plane_step, mask=live, other=0)
            if step == 0:
                tied = _members(w, list_words, n_list, row_first, low, high)
            else:
                tied = tl.load(state_ptr + w, mask=live, other=0)
                tied = _narrow(ptr, plane_step, tied, bit + 2, digit, live)
            tl.store(state_ptr + w, tied, mask=live)
            n3 += _popcount(tied & upper & lower)
            n2 += _popcount(tied & upper & ~lower)
            n1 += _popcount(tied & ~upper & lower)
        c3, c2, c1 = tl.reduce((n3, n2, n1), 0, _add3)
        digit = tl.where(rank <= c3 + c2 + c1, 1, 0)
        digit += tl.where(rank <= c3 + c2, 1, 0) + tl.where(rank <= c3, 1, 0)
        rest = total - c3 - c2 - c1
        total = tl.where(digit == 3, c3, tl.where(digit == 2, c2, tl.where(digit == 1, c1, rest)))
        rank -= tl.where(digit < 3, c3, 0) + tl.where(digit < 2, c2, 0) + tl.where(digit < 1, c1, 0)
        value = (value << 2) | digit
        tl.debug_barrier()

    if OLDER_WINS:
        skipped = rank - 1
    else:
        skipped = tl.maximum(total - rank, 0)
    index = rank * 0
    seen = rank * 0
    for w0 in range(0, n_words, TILE):
        w = w0 + tl.arange(0, TILE)
        live = w < n_words
        ptr = tl.where(w < list_words, list_ptr + w, row_ptr + w)
        plane_step = tl.where(w < list_words, list_step, row_step)
        tied = _narrow(ptr, plane_step, tl.load(state_ptr + w, mask=live, other=0), 0, digit, live)
        count = _popcount(tied)
        index += _tie(tied, w, count, seen + tl.cumsum(count, 0), skipped)
        seen += tl.sum(count, 0)
    return value, index


@triton.jit(do_not_specialize=[
    "key_len", "heads", "n_seqs", "row_words", "window", "parent_len", "parent_slots",
    "child_len", "child_slots", "state_words",
])  # fmt: skip
def _node_kernel(score_ptr, mask_ptr, cu_ptr, planes_ptr, parent_ptr, child_ptr, state_ptr,
                 key_len, heads, n_seqs, row_words, window, parent_len, parent_slots,
                 child_len, child_slots, state_words,
                 HAS_MASK: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The list of one node: keys of ranks ``(window - child_len, window]`` of all that precede it.

    They are chosen from the list of the node's parent and the parent's keys before the node. The
    lists of a level are ``[R, nodes, 33, slots]``: positions, then planes of ``slots / 32`` words.
    """
    row, begin, end, start = _locate(cu_ptr, key_len, n_seqs, child_len, PACKED)
    above = tl.minimum(start - begin, tl.maximum(window - child_len, 0))
    n_child = tl.minimum(start - begin, window) - above
    if (start >= end) | (n_child <= 0):
        return

    low, parent, parent_above, n_list = _parent(begin, start, window, parent_len)
    rank = window - parent_above
    parent_ptr += (row * (key_len // parent_len) + parent) * 2 * parent_slots
    child = row * (key_len // child_len) + begin // child_len + (start - begin) // child_len - 1
    child_ptr += child * 2 * child_slots
    state_ptr += child * 2 * state_words
    list_ptr = parent_ptr + parent_slots
    list_step = parent_slots // 32
    list_words = (n_list + 31) // 32
    row_first = low // 32 - list_words
    row_ptr = planes_ptr + row * 32 * row_words + row_first
    n_words = list_words + (start + 31) // 32 - low // 32
    total = n_list + start - low

    least, least_at = _kth_best(
        state_ptr, list_ptr, row_ptr, list_step, row_words, n_words, list_words, n_list,
        row_first, low, start, rank, total, False, TILE,
    )  # fmt: skip
    # All bits set: above every order key, so that nothing reaches it.
    most, most_at = least * 0 - 1, least_at
    if rank > child_len:
        most, most_at = _kth_best(
            state_ptr, list_ptr, row_ptr, list_step, row_words, n_words, list_words, n_list,
            row_first, low, start, rank - child_len, total, False, TILE,
        )  # fmt: skip

    # Mark the keys from `least` to below `most`, and count them up to each word.
    upto_ptr = state_ptr + state_words
    seen = rank * 0
    for w0 in range(0, n_words, TILE):
        w = w0 + tl.arange(0, TILE)
        live = w < n_words
        ptr = tl.where(w < list_words, list_ptr + w, row_ptr + w)
        plane_step = tl.where(w < list_words, list_step, row_words)
        tied_least = _members(w, list_words, n_list, row_first, low, start)
        tied_most = tied_least
        from_least = tied_least & 0
        from_most = tied_least & 0
        for b in range(32):
            plane = tl.load(ptr + (31 - b) * plane_step, mask=live, other=0)
            zero = ((least >> (31 - b)) & 1) - 1
            from_least |= tied_least & plane & zero
            tied_least &= plane ^ zero
            zero = ((most >> (31 - b)) & 1) - 1
            from_most |= tied_most & plane & zero
            tied_most &= plane ^ zero
        from_least |= tied_least & _bits_within(w * 32, least_at, _NEVER)
        from_most |= tied_most & _bits_within(w * 32, most_at, _NEVER)
        chosen = from_least & ~from_most
        count = _popcount(chosen)
        tl.store(state_ptr + w, chosen, mask=live)
        tl.store(upto_ptr + w, seen + tl.cumsum(count, 0), mask=live)
        seen += tl.sum(count, 0)
    tl.debug_barrier()

    # Slot i of the list is the i-th marked key.
    for w0 in range(0, child_slots // 32, 32):
        word = w0 + tl.arange(0, 32)
        # [32, 32]
        slot = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        live = slot < n_child
        w = slot * 0
        size = n_words
        while size > 1:
            half = size // 2
            upto = tl.load(upto_ptr + w + half - 1, mask=live, other=0)
            w = tl.where(upto <= slot, w + half, w)
            size -= half
        before = tl.load(upto_ptr + w - 1, mask=live & (w > 0), other=0)
        marked = tl.load(state_ptr + w, mask=live, other=0)
        entry = w * 32 + _nth_bit(marked, slot - before)
        is_list = w < list_words
        listed = tl.load(parent_ptr + entry, mask=live & is_list, other=0)
        position = tl.where(is_list, listed, row_first * 32 + entry)
        tl.store(child_ptr + slot, position, mask=live)
        masks = mask_ptr + row // heads * key_len
        order = _order_keys(score_ptr + row * key_len, masks, position, live, HAS_MASK)
        for b in range(32):
            target = child_ptr + child_slots + b * (child_slots // 32) + word
            tl.store(target, _plane(order, b), mask=word * 32 < n_child)


@triton.jit
def _strict_order(order, position, live):
    """Order key and position in one int64: larger is better, and the newer wins."""
    return tl.where(live, (order.to(tl.int64) << 32) | position, _NO_KEY)


@triton.jit
def _beaten_by(key, rivals, CHUNK: tl.constexpr, SLICE: tl.constexpr):
    """How many of the rivals beat each key."""
    count = tl.zeros([CHUNK], tl.int32)
    for i in range(0, CHUNK, SLICE):
        rival = tl.gather(rivals, i + tl.arange(0, SLICE), 0)
        # [SLICE, CHUNK]
        count += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
    return count


@triton.jit
def _beaten_at(key, rivals, missing, CHUNK: tl.constexpr, SLICE: tl.constexpr):
    """Index of the rival with which `missing` have beaten each key; CHUNK if they never do."""
    at = tl.zeros([CHUNK], tl.int32)
    for i in range(0, CHUNK, SLICE):
        rival = tl.gather(rivals, i + tl.arange(0, SLICE), 0)
        # [SLICE, CHUNK]
        upto = tl.cumsum((rival[:, None] > key[None, :]).to(tl.int32), 0)
        at += tl.sum((upto < missing[None, :]).to(tl.int32), 0)
        missing -= tl.max(upto, 0)
    return at


@triton.jit(do_not_specialize=[
    "key_len", "heads", "n_seqs", "row_words", "window", "keep_first", "keep_recent",
    "slots",
])  # fmt: skip
def _chunk_kernel(score_ptr, mask_ptr, cu_ptr, planes_ptr, list_ptr, rank_ptr, arrival_ptr,
                  expiry_ptr, key_len, heads, n_seqs, row_words, window, keep_first, keep_recent,
                  slots,
                  HAS_MASK: tl.constexpr, HAS_RANK: tl.constexpr, PACKED: tl.constexpr,
                  CHUNK: tl.constexpr, NODE: tl.constexpr, SLICE: tl.constexpr):  # fmt: skip
    """Expiry of the keys that die within one chunk."""
    LIST_WORDS: tl.constexpr = NODE // 32
    WORDS: tl.constexpr = 2 * LIST_WORDS
    row, begin, end, start = _locate(cu_ptr, key_len, n_seqs, CHUNK, PACKED)
    stop = tl.minimum(start + CHUNK, end)
    if (start >= end) | (stop - begin <= window):
        return

    low, node, above, n_list = _parent(begin, start, window, NODE)
    list_ptr += (row * (key_len // NODE) + node) * 2 * slots
    row_first = low // 32 - LIST_WORDS
    # [WORDS]
    w = tl.arange(0, WORDS)
    is_list = w < LIST_WORDS
    row_ptr = planes_ptr + row * 32 * row_words + row_first
    plane_ptr = tl.where(is_list, list_ptr + slots + w, row_ptr + w)
    plane_step = tl.where(is_list, slots // 32, row_words)
    tied_least = _members(w, LIST_WORDS, n_list, row_first, low, start)
    live = tied_least != 0

    # The survivors that may die here have the ranks (window - CHUNK, window]: two searches at once.
    tied_most = tied_least
    from_least = tied_least & 0
    from_most = tied_least & 0
    least = window - above
    most = least - CHUNK
    plane_ptr += 31 * plane_step
    plane = tl.load(plane_ptr, mask=live, other=0)
    for b in range(32):
        plane_ptr -= plane_step
        following = tl.load(plane_ptr, mask=live & (b < 31), other=0)
        ones_least = tied_least & plane
        ones_most = tied_most & plane
        counts = tl.sum(_popcount(ones_least) + (_popcount(ones_most) << 16), 0)
        n_least, n_most = counts & 0xFFFF, counts >> 16
        zero = tl.where(n_least < least, -1, 0)
        from_least |= ones_least & zero
        tied_least &= plane ^ zero
        least -= tl.where(n_least < least, n_least, 0)
        zero = tl.where(n_most < most, -1, 0)
        from_most |= ones_most & zero
        tied_most &= plane ^ zero
        most -= tl.where(n_most < most, n_most, 0)
        plane = following
    n_least, n_most = _popcount(tied_least), _popcount(tied_most)
    upto = tl.cumsum(n_least + (n_most << 16), 0)
    total = tl.max(upto, 0)
    skipped = tl.maximum((total & 0xFFFF) - least, 0)
    at = _tie(tied_least, w, n_least, upto & 0xFFFF, skipped)
    from_least |= tied_least & _bits_within(w * 32, at, _NEVER)
    skipped = tl.maximum((total >> 16) - most, 0)
    at = _tie(tied_most, w, n_most, upto >> 16, skipped)
    from_most |= tied_most & _bits_within(w * 32, at, _NEVER)
    marked = from_least & ~from_most

    # Candidates: the i-th marked survivor, and the i-th key of the chunk. [CHUNK]
    slot = tl.arange(0, CHUNK)
    count = _popcount(marked)
    upto = tl.cumsum(count, 0)
    old_live = slot < tl.max(upto, 0)
    w = slot * 0
    for level in tl.static_range(1, 16):
        if (WORDS >> level) > 0:
            passed = tl.gather(upto, w + (WORDS >> level) - 1, 0) <= slot
            w += tl.where(passed, WORDS >> level, 0)
    entry = w * 32 + _nth_bit(tl.gather(marked, w, 0), slot - tl.gather(upto - count, w, 0))
    is_list = w < LIST_WORDS
    listed = tl.load(list_ptr + entry, mask=old_live & is_list, other=0)
    old = tl.where(is_list, listed, row_first * 32 + entry)
    new = start + slot
    new_live = new < stop
    scores = score_ptr + row * key_len
    masks = mask_ptr + row // heads * key_len
    old_order = _order_keys(scores, masks, old, old_live, HAS_MASK)
    new_order = _order_keys(scores, masks, new, new_live, HAS_MASK)
    old_key = _strict_order(old_order, old, old_live)
    new_key = _strict_order(new_order, new, new_live)

    # `room` ranks are left for candidates; each rival that beats a key takes one.
    room = window - tl.minimum(start - begin, tl.maximum(window - CHUNK, 0))
    # Between old and new the order keys decide: on a tie the new one wins.
    missing = room - _beaten_by(old_key, old_key, CHUNK, SLICE)
    old_dies = _beaten_at(old_order - 1, new_order, missing, CHUNK, SLICE)
    missing = room - _beaten_by(new_order, old_order, CHUNK, SLICE)
    new_dies = _beaten_at(new_key, new_key, missing, CHUNK, SLICE)

    ranks = rank_ptr + row // heads * key_len
    arrivals = arrival_ptr + row // heads * key_len
    first, until = _always_kept(
        old, begin, ranks, arrivals, key_len, keep_first, keep_recent, old_live, HAS_RANK
    )
    expiry = tl.maximum(start + old_dies, until)
    expiry = tl.where(first | (expiry >= end), _NEVER, expiry - begin)
    expiry_ptr += row * key_len
    tl.store(expiry_ptr + old, expiry, mask=(old_order > _PADDING) & (old_dies < CHUNK))
    first, until = _always_kept(
        new, begin, ranks, arrivals, key_len, keep_first, keep_recent, new_live, HAS_RANK
    )
    expiry = tl.maximum(start + tl.maximum(new_dies, slot), until)
    expiry = tl.where(first | (expiry >= end), _NEVER, expiry - begin)
    tl.store(expiry_ptr + new, expiry, mask=(new_order > _PADDING) & (new_dies < CHUNK))


@triton.jit(do_not_specialize=["key_len", "n_seqs", "row_words", "window"])
def _shared_kernel(cu_ptr, planes_ptr, state_ptr, best_ptr, key_len, n_seqs, row_words, window,
                   PACKED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Order key and index of the worst key that is chosen, for each sequence of each row."""
    pid = tl.program_id(0)
    row = (pid // n_seqs).to(tl.int64)
    begin = pid * 0
    end = begin + key_len
    if PACKED:
        begin = tl.load(cu_ptr + pid % n_seqs)
        end = tl.load(cu_ptr + pid % n_seqs + 1)
    row_first = begin // 32
    row_ptr = planes_ptr + row * 32 * row_words + row_first
    state_ptr += row * (row_words + n_seqs) + row_first + pid % n_seqs
    n_words = (end + 31) // 32 - row_first
    order, entry = _kth_best(
        state_ptr, row_ptr, row_ptr, row_words, row_words,
        n_words, 0, 0, row_first, begin, end, begin * 0 + window, end - begin, True, TILE,
    )  # fmt: skip
    tl.store(best_ptr + 2 * pid, order ^ _PADDING)
    tl.store(best_ptr + 2 * pid + 1, row_first * 32 + entry)


@triton.jit(do_not_specialize=[
    "key_len", "heads", "n_seqs", "keep_first", "keep_recent", "n_tiles",
])  # fmt: skip
def _interval_kernel(score_ptr, mask_ptr, cu_ptr, best_ptr, rank_ptr, arrival_ptr, start_ptr,
                     expiry_ptr, key_len, heads, n_seqs, keep_first, keep_recent, n_tiles,
                     RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANK: tl.constexpr,
                     PACKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Intervals where a choice holds for every position: the best of a sequence, or score > 0."""
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    index = (tl.program_id(0) % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    live = index < key_len
    seq = index * 0
    begin = index * 0
    end = begin + key_len
    if PACKED:
        seq = _sequence_of(cu_ptr, n_seqs, index, 1, False)
        begin = tl.load(cu_ptr + seq, mask=live, other=0)
        end = tl.load(cu_ptr + seq + 1, mask=live, other=0)
    masks = mask_ptr + row // heads * key_len
    order = _order_keys(score_ptr + row * key_len, masks, index, live, HAS_MASK)
    if RELU:
        chosen = order > 0
    else:
        best = best_ptr + 2 * (row * n_seqs + seq)
        worst = tl.load(best, mask=live, other=0)
        last = tl.load(best + 1, mask=live, other=0)
        chosen = (order > worst) | ((order == worst) & (index <= last))
    ranks = rank_ptr + row // heads * key_len
    arrivals = arrival_ptr + row // heads * key_len
    first, until = _always_kept(
        index, begin, ranks, arrivals, key_len, keep_first, keep_recent, live, HAS_RANK
    )
    real = order > _PADDING
    start = tl.where((chosen | first) & real, 0, index - begin)
    expiry = tl.where(chosen | first | (until >= end), _NEVER, until - begin)
    expiry = tl.where(real, expiry, index - begin)
    tl.store(start_ptr + row * key_len + index, start, mask=live)
    tl.store(expiry_ptr + row * key_len + index, expiry, mask=live)


@dataclass(frozen=True)
class SelectTiles:
    """Sizes of the selection's pieces; none depends on the shape of a call.

    Attributes:
        chunk: Keys of a chunk, at least 64 and a power of two.
        node: Keys of the shortest nodes, a power of two, at least twice `chunk`.
        fan_out: How many nodes of one level make a node of the next.
        words: Words that a node's program reads at a time.
        rivals: Keys of a chunk that are compared at a time.
        chunk_warps, node_warps, encode_warps: Warps of a program of each kernel.
    """

    chunk: int = 128
    node: int = 2048
    fan_out: int = 32
    words: int = 1024
    encode_words: int = 64
    keys: int = 1024
    rivals: int = 16
    chunk_warps: int = 4
    node_warps: int = 8
    encode_warps: int = 4


TILES = SelectTiles()

_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class _Rows:
    """What all kernels read. Pointers that a call does not need are those of the scores."""

    score: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    rank: Tensor
    arrival: Tensor
    rows: int
    key_len: int
    heads: int
    n_seqs: int
    keep_first: int
    keep_recent: int
    has_mask: bool
    has_rank: bool
    packed: bool

    @classmethod
    def of(
        cls,
        score: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        keep_first: int,
        keep_recent: int,
    ) -> _Rows:
        key_len = score.shape[-1]
        rows = score.numel() // key_len
        mask = rank = arrival = score
        if key_mask is not None:
            mask = key_mask.contiguous().view(-1, key_len)
            if keep_first or keep_recent:
                rank, arrival = _real_order(mask)
            mask = mask.view(torch.uint8)
        return cls(
            score, mask, score if cu_seqlens is None else cu_seqlens, rank, arrival,
            rows, key_len, 1 if key_mask is None else rows // mask.shape[0],
            1 if cu_seqlens is None else cu_seqlens.numel() - 1,
            min(keep_first, key_len), min(keep_recent, key_len),
            key_mask is not None, rank is not score, cu_seqlens is not None,
        )  # fmt: skip


def _real_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of real keys before each key, and the position of each real key, int32 ``[B, K]``."""
    key_len = mask.shape[-1]
    rank = mask.cumsum(-1, dtype=torch.int32) - mask.to(torch.int32)
    arrival = rank.new_full((mask.shape[0], key_len + 1), NEVER)
    position = torch.arange(key_len, dtype=torch.int32, device=mask.device)
    arrival.scatter_(-1, torch.where(mask, rank, key_len).long(), position.expand(mask.shape))
    return rank, arrival[:, :-1].contiguous()


def _encode(rows: _Rows, tiles: SelectTiles, start: Tensor, expiry: Tensor) -> Tensor:
    """Bit planes int32 ``[R, 32, ceil(K / 32)]``; sets the intervals of keys that never die."""
    row_words = triton.cdiv(rows.key_len, 32)
    planes = torch.empty(rows.rows, 32, row_words, dtype=torch.int32, device=start.device)
    n_tiles = triton.cdiv(row_words, tiles.encode_words)
    _encode_kernel[(rows.rows * n_tiles,)](
        rows.score, rows.mask, rows.cu_seqlens, planes, start, expiry,
        rows.key_len, rows.heads, rows.n_seqs, row_words, n_tiles,
        HAS_MASK=rows.has_mask, PACKED=rows.packed, WORDS=tiles.encode_words,
        num_warps=tiles.encode_warps,
    )  # fmt: skip
    return planes


def _select_causal(
    rows: _Rows, window: int, tiles: SelectTiles, start: Tensor, expiry: Tensor
) -> None:
    """Intervals of the mode ``"causal"``."""
    planes = _encode(rows, tiles, start, expiry)
    if window >= rows.key_len:
        return
    lengths = [tiles.node]
    while lengths[-1] * tiles.fan_out < rows.key_len:
        lengths.append(lengths[-1] * tiles.fan_out)
    parent, parent_len, parent_slots = planes, _LONGEST, 32
    for length in reversed(lengths):
        lists = rows.rows * (rows.key_len // length)
        if not lists:
            continue
        slots = min(length, triton.cdiv(window, 32) * 32)
        state_words = triton.cdiv(min(parent_len, rows.key_len), 32) + parent_slots // 32 + 2
        child = torch.empty(lists, 2 * slots, dtype=torch.int32, device=start.device)
        state = torch.empty(lists, 2 * state_words, dtype=torch.int32, device=start.device)
        _node_kernel[(lists + rows.rows * rows.n_seqs,)](
            rows.score, rows.mask, rows.cu_seqlens, planes, parent, child, state,
            rows.key_len, rows.heads, rows.n_seqs, planes.shape[-1], window,
            parent_len, parent_slots, length, slots, state_words,
            HAS_MASK=rows.has_mask, PACKED=rows.packed, TILE=tiles.words,
            num_warps=tiles.node_warps,
        )  # fmt: skip
        parent, parent_len, parent_slots = child, length, slots
    chunks = rows.rows * (rows.key_len // tiles.chunk + rows.n_seqs)
    _chunk_kernel[(chunks,)](
        rows.score, rows.mask, rows.cu_seqlens, planes, parent, rows.rank, rows.arrival, expiry,
        rows.key_len, rows.heads, rows.n_seqs, planes.shape[-1], window,
        rows.keep_first, rows.keep_recent, parent_slots,
        HAS_MASK=rows.has_mask, HAS_RANK=rows.has_rank, PACKED=rows.packed,
        CHUNK=tiles.chunk, NODE=tiles.node, SLICE=tiles.rivals, num_warps=tiles.chunk_warps,
    )  # fmt: skip


def _select_fixed(
    rows: _Rows, window: int, relu: bool, tiles: SelectTiles, start: Tensor, expiry: Tensor
) -> None:
    """Intervals of the modes ``"shared"`` and ``"relu"``."""
    best = start
    if not relu:
        planes = _encode(rows, tiles, start, expiry)
        row_words = planes.shape[-1]
        best = start.new_empty(rows.rows, rows.n_seqs, 2)
        state = start.new_empty(rows.rows, row_words + rows.n_seqs)
        _shared_kernel[(rows.rows * rows.n_seqs,)](
            rows.cu_seqlens, planes, state, best, rows.key_len, rows.n_seqs, row_words, window,
            PACKED=rows.packed, TILE=tiles.words, num_warps=tiles.node_warps,
        )  # fmt: skip
    n_tiles = triton.cdiv(rows.key_len, tiles.keys)
    _interval_kernel[(rows.rows * n_tiles,)](
        rows.score, rows.mask, rows.cu_seqlens, best, rows.rank, rows.arrival, start, expiry,
        rows.key_len, rows.heads, rows.n_seqs, rows.keep_first, rows.keep_recent, n_tiles,
        RELU=relu, HAS_MASK=rows.has_mask, HAS_RANK=rows.has_rank, PACKED=rows.packed,
        BLOCK=tiles.keys,
    )  # fmt: skip


def select_intervals(
    score: Tensor,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    tiles: SelectTiles = TILES,
) -> tuple[Tensor, Tensor]:
    """Start and expiry of every key. Launches only: no look at any value, nothing kept.

    Args:
        score: fp32 ``[..., K]``, contiguous; the leading dimensions are batch times KV heads, or
            the KV heads of packed sequences.
        window_size: ``W >= 1``.
        mode: ``"causal"``, ``"shared"`` or ``"relu"``.
        key_mask: Bool ``[B, K]`` with B a divisor of the rows of `score` (packed: ``[K]``), True
            for real keys; row ``r`` uses mask ``r // (R // B)``.
        cu_seqlens: int32 ``[N + 1]`` on the device, from 0 to K, or ``None``.
        keep_first: First real keys of each sequence that are visible for ever.
        keep_recent: Newest real keys that are visible in any case.
        tiles: Sizes of the kernels' pieces; the result does not depend on them.

    Returns:
        ``start`` and ``expiry``, int32 in the shape of `score`.
    """
    start = torch.empty_like(score, dtype=torch.int32)
    expiry = torch.empty_like(start)
    if score.numel() == 0:
        return start, expiry
    rows = _Rows.of(score, key_mask, cu_seqlens, keep_first, keep_recent)
    if mode == "causal":
        _select_causal(rows, window_size, tiles, start, expiry)
    else:
        _select_fixed(rows, window_size, mode == "relu", tiles, start, expiry)
    return start, expiry
