"""Device functions on words: 32 keys in the 32 bits of an int32, for counting and choosing keys.

A *set* of keys is given by its words. Plane ``b`` of a word holds bit ``b`` of the order keys of
its 32 keys; the best keys of a set are found bit by bit, from plane 31 down, with an AND and a
population count for 32 keys. Ties go by place in the set: a set is in the order of positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Order keys below that of -inf; see `flash_sparse_attn.intervals.order_key`.
_PADDING = tl.constexpr(-(2**31))
_NAN = tl.constexpr(-(2**31) + 1)


@triton.jit
def popcount(x):
    """Set bits of words, in plain arithmetic: no intrinsic exists on every target."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def nth_bit(word, n):
    """Index of the set bit of a word that has `n` set bits below it."""
    word = word.to(tl.uint32, bitcast=True)
    at = n * 0
    for i_half in tl.static_range(5):
        part = (word >> at.to(tl.uint32)) & ((1 << (16 >> i_half)) - 1)
        count = popcount(part.to(tl.int32, bitcast=True))
        above = n >= count
        at += tl.where(above, 16 >> i_half, 0)
        n -= tl.where(above, count, 0)
    return at


@triton.jit
def _low_bits(n):
    """A word with the lowest `n` bits set, ``0 <= n <= 32``."""
    return tl.where(n < 32, (1 << (n & 31)) - 1, -1)


@triton.jit
def bits_within(first, low, high):
    """The bits of words that begin at `first` whose places lie in ``[low, high)``."""
    below_low = tl.minimum(tl.maximum(low - first, 0), 32)
    below_high = tl.minimum(tl.maximum(high - first, 0), 32)
    return _low_bits(below_high) & ~_low_bits(below_low)


@triton.jit
def order_keys(ptr_score, ptr_mask, index, live, HAS_MASK: tl.constexpr):
    """Canonical int32 order keys: larger is better; padding, and what is not live, is lowest."""
    bits = tl.load(ptr_score + index, mask=live, other=0.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(magnitude > 0x7F800000, _NAN, order)
    if HAS_MASK:
        live = live & (tl.load(ptr_mask + index, mask=live, other=0) != 0)
    return tl.where(live, order, _PADDING)


@triton.jit
def planes_of(order, BLOCK_W: tl.constexpr):
    """Planes ``[BLOCK_W, 32]`` of order keys ``[BLOCK_W, 32]``, as unsigned of the same order."""
    offs_b = tl.arange(0, 32)[None, :]
    unsigned = order ^ _PADDING
    planes = tl.zeros([BLOCK_W, 32], tl.int32)
    for b in range(32):
        # [BLOCK_W]
        plane = tl.sum(((unsigned >> b) & 1) << offs_b, 1)
        planes = tl.where(offs_b == b, plane[:, None], planes)
    return planes


@triton.jit
def _pack(low, high):
    """Two counts in one number, so that one reduction serves both; each sum stays below 2 ** 16."""
    # The minimum is for the compiler, which fails to see a population count in front of a shift.
    return low + (tl.minimum(high, 32) << 16)


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _tied_at(tied, offs_w, count, upto, skipped):
    """Place of the tied key that has `skipped` tied keys before it, 0 if it is not here."""
    before = upto - count
    hit = (upto > skipped) & (before <= skipped)
    return tl.sum(tl.where(hit, offs_w * 32 + nth_bit(tied, skipped - before), 0), 0)


@triton.jit
def mark_ranks(ptr_plane, plane_step, members, offs_w, worst, best):
    """The keys of ranks ``(best, worst]``, from 1, among the `members` of words ``[BLOCK_W]``.

    `ptr_plane` points to plane 0 of each word. Where fewer keys than a rank exist, all reach it.
    """
    live = members != 0
    tied_worst = members
    tied_best = members
    above_worst = members & 0
    above_best = members & 0
    ptr_plane += 31 * plane_step
    plane = tl.load(ptr_plane, mask=live, other=0)
    ptr_plane -= plane_step
    following = tl.load(ptr_plane, mask=live, other=0)
    for b in range(32):
        # Two planes ahead: a round is shorter than the way to L2.
        ptr_plane -= plane_step
        coming = tl.load(ptr_plane, mask=live & (b < 30), other=0)
        ones_worst = tied_worst & plane
        ones_best = tied_best & plane
        counts = tl.sum(_pack(popcount(ones_worst), popcount(ones_best)), 0)
        n_worst, n_best = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        # All bits set if the key of that rank has a 0 here.
        zero = tl.where(n_worst < worst, -1, 0)
        above_worst |= ones_worst & zero
        tied_worst &= plane ^ zero
        worst -= n_worst & zero
        zero = tl.where(n_best < best, -1, 0)
        above_best |= ones_best & zero
        tied_best &= plane ^ zero
        best -= n_best & zero
        plane = following
        following = coming
    # Of equal keys the newer are better.
    n_worst, n_best = popcount(tied_worst), popcount(tied_best)
    counts = _pack(n_worst, n_best)
    total = tl.sum(counts, 0)
    upto = tl.cumsum(counts, 0)
    skipped = tl.maximum((total & 0xFFFF) - worst, 0)
    at = _tied_at(tied_worst, offs_w, n_worst, upto & 0xFFFF, skipped)
    above_worst |= tied_worst & bits_within(offs_w * 32, at, 0x7FFFFFFF)
    skipped = tl.maximum(((total >> 16) & 0xFFFF) - best, 0)
    at = _tied_at(tied_best, offs_w, n_best, (upto >> 16) & 0xFFFF, skipped)
    above_best |= tied_best & bits_within(offs_w * 32, at, 0x7FFFFFFF)
    return above_worst & ~above_best


@triton.jit
def nth_marked(marked, n, BLOCK_W: tl.constexpr):
    """Place of the marked key that has `n` marked keys before it; both are vectors."""
    count = popcount(marked)
    upto = tl.cumsum(count, 0)
    w = n * 0
    for i_half in tl.static_range(1, 16):
        if (BLOCK_W >> i_half) > 0:
            passed = tl.gather(upto, w + (BLOCK_W >> i_half) - 1, 0) <= n
            w += tl.where(passed, BLOCK_W >> i_half, 0)
    before = tl.gather(upto - count, w, 0)
    return w * 32 + nth_bit(tl.gather(marked, w, 0), n - before)


@triton.jit
def _keep_digit(ptr, step, tied, bit, digit, live):
    """Of the tied keys those with `digit` in the planes ``bit + 1`` and `bit`."""
    upper = tl.load(ptr + (bit + 1) * step, mask=live, other=0)
    lower = tl.load(ptr + bit * step, mask=live, other=0)
    return tied & (upper ^ ((digit >> 1) - 1)) & (lower ^ ((digit & 1) - 1))


@triton.jit
def kth_best(ptr_plane, plane_step, ptr_state, n_words, low, high, rank,
             OLDER_WINS: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Order key and place of the `rank`-th best key, from 1, of the places ``[low, high)``.

    For sets of any size, `BLOCK_W` words at a time, two bits of the answer in a round. `ptr_state`
    points to `n_words` of memory for the keys that agree with the answer so far. If there are fewer
    than `rank` keys, the order key is the lowest.
    """
    ptr_plane += tl.arange(0, BLOCK_W)
    ptr_state += tl.arange(0, BLOCK_W)
    for w0 in range(0, n_words, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        tl.store(ptr_state + w0, bits_within(offs_w * 32, low, high), mask=offs_w < n_words)
    value = rank * 0
    digit = rank * 0
    total = high - low
    for i_round in range(16):
        bit = 30 - 2 * i_round
        n3 = tl.zeros([BLOCK_W], tl.int32)
        n2 = tl.zeros([BLOCK_W], tl.int32)
        n1 = tl.zeros([BLOCK_W], tl.int32)
        for w0 in range(0, n_words, BLOCK_W):
            live = w0 + tl.arange(0, BLOCK_W) < n_words
            ptr = ptr_plane + w0
            upper = tl.load(ptr + (bit + 1) * plane_step, mask=live, other=0)
            lower = tl.load(ptr + bit * plane_step, mask=live, other=0)
            tied = tl.load(ptr_state + w0, mask=live, other=0)
            if i_round > 0:
                tied = _keep_digit(ptr, plane_step, tied, bit + 2, digit, live)
                tl.store(ptr_state + w0, tied, mask=live)
            n3 += popcount(tied & upper & lower)
            n2 += popcount(tied & upper & ~lower)
            n1 += popcount(tied & ~upper & lower)
        c3, c2, c1 = tl.reduce((n3, n2, n1), 0, _add3)
        digit = tl.where(rank <= c3 + c2 + c1, 1, 0)
        digit += tl.where(rank <= c3 + c2, 1, 0) + tl.where(rank <= c3, 1, 0)
        rest = total - c3 - c2 - c1
        total = tl.where(digit == 3, c3, tl.where(digit == 2, c2, tl.where(digit == 1, c1, rest)))
        rank -= tl.where(digit < 3, c3, 0) + tl.where(digit < 2, c2, 0) + tl.where(digit < 1, c1, 0)
        value = (value << 2) | digit
        tl.debug_barrier()

    skipped = rank - 1 if OLDER_WINS else tl.maximum(total - rank, 0)
    at = rank * 0
    seen = rank * 0
    for w0 in range(0, n_words, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        live = offs_w < n_words
        tied = tl.load(ptr_state + w0, mask=live, other=0)
        tied = _keep_digit(ptr_plane + w0, plane_step, tied, 0, digit, live)
        count = popcount(tied)
        at += _tied_at(tied, offs_w, count, seen + tl.cumsum(count, 0), skipped)
        seen += tl.sum(count, 0)
    return value ^ _PADDING, at


@triton.jit
def mark_from(ptr_plane, plane_step, members, offs_w, live, order, at):
    """The members of words that are at least as good as the key of `order` at the place `at`."""
    tied = members
    above = members & 0
    for b in range(32):
        plane = tl.load(ptr_plane + (31 - b) * plane_step, mask=live, other=0)
        zero = (((order ^ _PADDING) >> (31 - b)) & 1) - 1
        above |= tied & plane & zero
        tied &= plane ^ zero
    return above | (tied & bits_within(offs_w * 32, at, 0x7FFFFFFF))
