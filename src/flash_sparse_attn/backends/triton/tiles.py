"""Device functions shared by the kernels: addresses, loads, scores, the blocks of a tile.

A tile holds ``BLOCK_M`` *rows*. The rows of an epoch are its (query, head) pairs in the order of
queries, the ``GROUP`` heads of one KV head side by side, so that a tile is full for any group size.
Scores are kept in units of log 2: ``exp2`` is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides: their values compile no kernel anew. A kernel need not have them all.
NUMBERS = (
    "query_len", "key_len", "epoch_len", "num_epochs", "num_lists", "num_tiles", "num_blocks",
    "num_rows", "num_items", "old_slots", "num_slots", "row_0", "plan_b", "plan_h", "tile_0",
    "num_now", "num_batches", "programs_0", "programs_1", "columns", "unit_0", "units_now",
    "unit_len", "units_of_epoch", "num_parts", "num_sequences", "num_runs", "num_bits",
    "coarse_len", "num_coarse", "piece_len", "num_pieces", "keep_first", "keep_recent", "has_rest",
    "sqb", "sqn", "sqh", "skb", "skn", "skh", "svb", "svn", "svh", "sgb", "sgn", "sgh", "sgd",
    "sbb", "sbk", "sbg", "sbq", "sbn", "smb", "smk", "smg", "smq", "smn",
)  # fmt: skip

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))
_MINUS_INF = tl.constexpr(-(2**23))  # the bits of -inf in fp32
# The largest finite bias. Times log2(e) it is still finite in fp32, which finfo.min is not.
_MAX_BIAS = tl.constexpr(2.3e38)
# Below every finite score, and finite: no difference of peaks is NaN, so that no loop needs a
# guard.
LOWEST = tl.constexpr(-3.4e38)


# Beyond every position: the expiry of a key that stays, and the start of one that never comes.
_NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def row_and_rest(size):
    """This program's row of keys (int64) and its number among the `size` programs of the row."""
    i_program = tl.program_id(0)
    return (i_program // size).to(tl.int64), i_program % size


@triton.jit
def epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED: tl.constexpr):
    """First query of an epoch, its number of queries, and the position of the first."""
    if PACKED:
        ptr = ptr_epochs + i_epoch * 8
        return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    else:
        first = i_epoch * epoch_len
        return first, tl.minimum(epoch_len, query_len - first), first + key_len - query_len


@triton.jit
def key_bounds(i_epoch, ptr_epochs, key_len, PACKED: tl.constexpr):
    """First key and number of keys of the sequence of an epoch."""
    if PACKED:
        return tl.load(ptr_epochs + i_epoch * 8 + 3), tl.load(ptr_epochs + i_epoch * 8 + 4)
    else:
        return 0, key_len


@triton.jit
def bias_offsets(
    i_local, i_list, num_lists, num_slots, key_0, key_len,
    SLOTS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Where the copied bias of the slots of a list begins, and the step from head to head.

    Of keys in order all are in one list, with room for the last block of any sequence.
    """
    MEMBERS: tl.constexpr = GROUP if KEY_BIAS == "head" else 1
    if SLOTS == "keys":
        stride = (tl.cdiv(key_len, 128) + 1).to(tl.int64) * 128
        return tl.multiple_of(i_local * MEMBERS * stride, 128) + key_0, stride
    else:
        offs = (i_local * MEMBERS * num_lists + i_list) * num_slots
        return tl.multiple_of(offs, 128), num_lists.to(tl.int64) * num_slots


@triton.jit
def count_prefix(ptr, length, value, bits, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the leading `length` entries are ``"above"`` `value`, or ``"up to"`` it. [BLOCK].

    Entries fall or rise, so that those counted come first. ``length < 2 ** bits``.
    """
    count = tl.zeros([BLOCK], tl.int32)
    for i in range(bits):
        more = count + (1 << (bits - 1 - i))
        entry = tl.load(ptr + more - 1, mask=more <= length, other=0)
        counted = entry > value if HOW == "above" else entry <= value
        count = tl.where((more <= length) & counted, more, count)
    return count


@triton.jit
def row_offsets(index, stride, ALIGNED: tl.constexpr):
    """Offsets of rows, int64; `ALIGNED` promises multiples of 8 elements, for 16-byte accesses."""
    offset = index.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def load_rows(
    ptr, offs_row, mask_row, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of `D` elements, padded with zeros to `BLOCK_D`; zeros where `mask_row` is False."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_row[:, None] + offs_d[None, :]
    if MASKED:
        mask = mask_row[:, None]
        if D != BLOCK_D:
            mask = mask & (offs_d < D)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0)
    elif D != BLOCK_D:
        # The mask has the shape of the block: its constancy along D keeps accesses wide.
        mask = tl.broadcast_to((offs_d < D)[None, :], ptrs.shape)
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_grads(
    ptr, i_query, i_head, stride_query, stride_head, stride_d, mask_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows of dO, which may have any strides: the gradient of a sum has stride 0 everywhere."""
    offs = row_offsets(i_query, stride_query, ALIGNED) + row_offsets(i_head, stride_head, ALIGNED)
    if ALIGNED:
        return load_rows(ptr, offs, mask_row, D, BLOCK_D, True)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        mask = mask_row[:, None] & (offs_d < D)[None, :]
        return tl.load(ptr + offs[:, None] + (offs_d * stride_d)[None, :], mask=mask, other=0.0)


@triton.jit
def load_out(
    ptr, ptr_rest, has_rest, offs_row, mask_row, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of O in fp32, with what rounding took from them if forward has kept that."""
    out = load_rows(ptr, offs_row, mask_row, D, BLOCK_D, True)
    rest = load_rows(ptr_rest, offs_row, mask_row & (has_rest > 0), D, BLOCK_D, True)
    return out.to(tl.float32) + rest.to(tl.float32)


@triton.jit
def load_slots(
    source, slot_base, block, key, key_0, i_batch, i_head, stride,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys or values ``[BLOCK_N, BLOCK_D]``, zeros in columns past the last.

    Copied slots are read from the copies, slots that are the keys from `key_0` on through a
    descriptor of ``[B, K, Hkv, D]`` if there is one, others row by row: offsets have the type of
    `stride`, and only blocks that are `MASKED` have slots without a key.
    """
    if SLOTS == "copied":
        row_0 = slot_base + block * BLOCK_N
        if TMA:
            return source.load([row_0.to(tl.int32), 0])
        else:
            offs = (row_0 + tl.arange(0, BLOCK_N)) * SLOT_D
            return load_rows(source, offs, None, SLOT_D, BLOCK_D, False)
    elif TMA:
        rows = source.load([i_batch.to(tl.int32), key_0 + block * BLOCK_N, i_head.to(tl.int32), 0])
        return rows.reshape(BLOCK_N, BLOCK_D)
    else:
        offs = key.to(stride.dtype) * stride
        if ALIGNED:
            offs = tl.multiple_of(offs, 8)
        return load_rows(source, offs, key >= 0, D, BLOCK_D, MASKED)


@triton.jit
def slot_keys(ptr_key, slot, key_0, num_keys, SLOTS: tl.constexpr):
    """The key in each slot, -1 for none."""
    if SLOTS == "keys" or SLOTS == "run":
        return tl.where(slot < num_keys, key_0 + slot, -1)
    else:
        return tl.load(ptr_key + slot)


@triton.jit
def last_key(at, num_keys, CLAMPS: tl.constexpr):
    """The last slot that each row sees where slots are the keys, negative for none. [M]."""
    return tl.minimum(at, num_keys - 1) if not CLAMPS else at * 0 + (num_keys - 1)


@triton.jit
def slot_intervals(
    ptr_start, ptr_expiry, slot, num_keys, SLOTS: tl.constexpr, CLAMPS: tl.constexpr
):  # fmt: skip
    """First position that sees the key in each slot, and first that no longer does."""
    if SLOTS == "keys":
        start = slot if not CLAMPS else slot * 0
        inside = slot < num_keys
        return tl.where(inside, start, _NEVER), tl.where(inside, _NEVER, 0)
    else:
        return tl.load(ptr_start + slot), tl.load(ptr_expiry + slot)


@triton.jit
def along_slots(vector, TRANSPOSED: tl.constexpr):
    """A vector over slots, to be broadcast over rows: scores are [M, N], transposed [N, M]."""
    return vector[:, None] if TRANSPOSED else vector[None, :]


@triton.jit
def along_rows(vector, TRANSPOSED: tl.constexpr):
    """A vector over the rows of a tile, to be broadcast over slots."""
    return vector[None, :] if TRANSPOSED else vector[:, None]


@triton.jit
def near_rows(
    slot, at, mask_row, num_keys,
    MASKED: tl.constexpr,
    CLAMPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What tiles read of aligned rows of a mask or bias: 8 keys at a time, if any may be seen."""
    near = along_rows(mask_row, TRANSPOSED)
    if MASKED:
        slot = slot // 8 * 8
        near = near & along_slots(slot < num_keys, TRANSPOSED)
        if not CLAMPS:
            near = near & (along_slots(slot, TRANSPOSED) <= along_rows(at, TRANSPOSED))
    return near


@triton.jit
def _words(
    ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """For rows of a tile and slots the word that holds 32 queries of the slot, the row's too.

    The queries of the tile lie in the `WORDS` words from `word_0` on.
    """
    i_word = (i_query >> 5) - word_0  # [M]
    if MEMBERS * WORDS == 1:
        word = along_slots(tl.load(ptr_bits + word_0 * num_slots + slot), TRANSPOSED)
    else:
        for member in tl.static_range(MEMBERS):
            for step in tl.static_range(WORDS):
                offs = (member * num_words + word_0 + step) * num_slots + slot
                column = tl.load(ptr_bits + offs, mask=word_0 + step < num_words, other=0)
                mine = i_word == step
                if MEMBERS > 1:
                    mine = mine & (i_group == member)
                column = along_slots(column, TRANSPOSED)
                if member + step == 0:
                    word = tl.where(along_rows(mine, TRANSPOSED), column, 0)
                else:
                    word = tl.where(along_rows(mine, TRANSPOSED), column, word)
    return word


@triton.jit
def bits_see(
    ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which rows of a tile see which slots; symbols as in `_words`."""
    word = _words(
        ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots, MEMBERS, WORDS, TRANSPOSED
    )
    return ((word >> along_rows(i_query & 31, TRANSPOSED)) & 1) != 0


@triton.jit
def where_negative(sign, scores):
    """Scores where the int32 `sign` is negative, else -inf, whatever they are.

    By the bits of the numbers: LLVM packs the comparisons of a tile into vectors, one by one, and
    unpacks them again.
    """
    seen = sign >> 31  # all bits or none
    bits = (scores.to(tl.int32, bitcast=True) & seen) | (~seen & _MINUS_INF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def hide(
    scores, ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Scores with -inf where a row does not see a slot; else as `bits_see`."""
    word = _words(
        ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots, MEMBERS, WORDS, TRANSPOSED
    )
    return where_negative(word << along_rows(~i_query & 31, TRANSPOSED), scores)


@triton.jit
def gathered_bias(
    block, is_one, i_query, i_group, mask_row, ptr_key, ptr_bits, word_0, num_words, num_slots,
    ptr_bias, sbn,
    MASKED: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The bias of pairs ``[M, N]`` of a block of gathered slots, -inf where a row sees none."""
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    key = tl.load(ptr_key + slot)
    seen = (mask_row & is_one)[:, None] & (key >= 0)[None, :]
    if MASKED:
        seen &= bits_see(
            ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots, MEMBERS, WORDS, False
        )
    offs = (key.to(tl.int64) * sbn)[None, :]
    return tl.load(ptr_bias + offs, mask=seen, other=float("-inf"))


@triton.jit
def bias_of_tile(
    i_tile, is_one, first, num, slot, key, ptr_bits, num_words, num_slots, ptr_bias, sbg, sbq, sbn,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The bias of pairs ``[N, M]`` of gathered slots and a tile, -inf where a row does not see one.

    `SHARED`: the heads of a KV head share bias and mask, and it is that of queries, ``[N, M / G]``.
    """
    HEADS: tl.constexpr = 1 if SHARED else GROUP
    ROWS: tl.constexpr = BLOCK_M // GROUP if SHARED else BLOCK_M
    row, i_query, i_group = tile_rows(i_tile, HEADS, ROWS)
    seen = (key >= 0)[:, None] & (is_one & (row < num * HEADS))[None, :]
    if MASKED:
        word_0 = i_tile * ROWS // HEADS // 32
        seen &= bits_see(
            ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots, MEMBERS, WORDS, True
        )
    offs = i_group.to(tl.int64) * sbg + (first + i_query).to(tl.int64) * sbq
    offs = (key.to(tl.int64) * sbn)[:, None] + offs[None, :]
    return tl.load(ptr_bias + offs, mask=seen, other=float("-inf"))


@triton.jit
def for_heads(block, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``[Q, N]`` of queries as ``[Q G, N]`` of rows, transposed ``[N, Q]`` as ``[N, Q G]``."""
    LEFT: tl.constexpr = block.shape[0]
    RIGHT: tl.constexpr = block.shape[1]
    if GROUP == 1:
        return block
    elif TRANSPOSED:
        return tl.broadcast_to(block[:, :, None], LEFT, RIGHT, GROUP).reshape(LEFT, RIGHT * GROUP)
    else:
        return tl.broadcast_to(block[:, None, :], LEFT, GROUP, RIGHT).reshape(LEFT * GROUP, RIGHT)


@triton.jit
def tile_rows(i_tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a tile, and the query and head of each. [BLOCK_M]."""
    offs = tl.arange(0, BLOCK_M)
    row = i_tile * BLOCK_M + offs
    if BLOCK_M % GROUP == 0:
        # Spelled out so that what does not depend on the tile leaves the loop.
        return row, i_tile * (BLOCK_M // GROUP) + offs // GROUP, offs % GROUP
    else:
        return row, row // GROUP, row % GROUP


@triton.jit
def store_rows(ptr, offs_row, mask_row, block, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first `D` columns of the rows where `mask_row` is True, in the type of `ptr`."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_row[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptr + offs_row[:, None] + offs_d[None, :], block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def log2_bias(bias):
    """A bias in units of log 2: finite stays finite, -inf hides."""
    bias = bias.to(tl.float32)
    finite = tl.minimum(tl.maximum(bias, -_MAX_BIAS), _MAX_BIAS) * _LOG2E
    return tl.where(tl.abs(bias) < _INF, finite, bias)  # NaN stays NaN


@triton.jit
def scaled_scores(product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log 2 from ``q.k``, and the tanh of a softcap (without one the scores).

    `scale` holds log2(e), or with a softcap the scale over the softcap.
    """
    if HAS_SOFTCAP:
        scaled = product * scale
        small = tl.exp2(tl.abs(scaled) * (-2.0 * _LOG2E))
        tanh = (1.0 - small) / (1.0 + small)
        tanh = tl.where(scaled < 0, -tanh, tanh)
        return tanh * (softcap * _LOG2E), tanh
    else:
        scores = product * scale
        return scores, scores


@triton.jit
def softmax_update(scores, peak, total):
    """Online softmax of ``[M, N]`` scores: probabilities, factor of what came before, peak, total.

    A row that has seen no key keeps its first peak, `LOWEST`, and its probabilities are 0.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    probs = tl.exp2(scores - new_peak[:, None])
    factor = tl.exp2(peak - new_peak)
    return probs, factor, new_peak, total * factor + tl.sum(probs, 1)


@triton.jit
def tile_blocks(ptr_visible, ptr_entered, i_first, i_last, BLOCK_N: tl.constexpr):
    """The slot blocks of a tile whose first and last query are given.

    Returns the number of old blocks that all its queries see whole, of old blocks that any of them
    sees, and of new blocks. What a query sees of the old slots is a prefix that only shrinks, or
    only grows, so that the ends of the tile tell both.
    """
    at_first = tl.load(ptr_visible + i_first)
    at_last = tl.load(ptr_visible + i_last)
    num_full = tl.minimum(at_first, at_last) // BLOCK_N
    num_old = tl.cdiv(tl.maximum(at_first, at_last), BLOCK_N)
    num_new = tl.cdiv(tl.load(ptr_entered + i_last), BLOCK_N)
    return num_full, num_old, num_new


@triton.jit
def block_tiles(
    min_start, max_start, min_expiry, max_expiry, position, num,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CLAMPS: tl.constexpr,
):  # fmt: skip
    """The tiles of an epoch for a block of slots, given the borders of their intervals.

    Returns the first tile that sees any of the slots, begin and end of those that see all, and the
    end of those that see any. Slots that only later epochs see have no tile in this one.
    """
    # Queries of the epoch, from its first on, that see any of the slots, and that see all.
    end = tl.maximum(position + num, 0)
    from_any = tl.maximum(min_start - position, 0)
    to_any = tl.minimum(tl.minimum(max_expiry, end) - position, num)
    from_all = tl.maximum(tl.minimum(max_start, end) - position, 0)
    to_all = tl.minimum(tl.minimum(min_expiry, end) - position, num)
    if CLAMPS:
        from_any = tl.where(min_start <= 0, 0, from_any)
        from_all = tl.where(max_start <= 0, 0, from_all)
    tile_1 = tl.maximum(tl.cdiv(to_any * GROUP, BLOCK_M), 0)
    tile_0 = tl.minimum(from_any * GROUP // BLOCK_M, tile_1)
    full_0 = tl.minimum(tl.cdiv(from_all * GROUP, BLOCK_M), tile_1)
    full_1 = tl.maximum(tl.maximum(to_all, 0) * GROUP // BLOCK_M, full_0)
    return tile_0, full_0, full_1, tile_1


@triton.jit
def key_blocks(
    at_first, at_last, num_keys, CLAMPS: tl.constexpr, IS_BORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_blocks` where slots are the keys in order; on demand all count as seen in part."""
    if CLAMPS:
        num_full, num_old = num_keys // BLOCK_N, tl.cdiv(num_keys, BLOCK_N)
    else:
        num_full = tl.minimum(tl.maximum(at_first + 1, 0), num_keys) // BLOCK_N
        num_old = tl.cdiv(tl.minimum(tl.maximum(at_last + 1, 0), num_keys), BLOCK_N)
    if IS_BORDER:
        num_full *= 0
    return num_full, num_old, num_old * 0
