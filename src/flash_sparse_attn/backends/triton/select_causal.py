"""Expiry of every key in the mode ``"causal"``: where the W-th better key arrives.

For any ``K`` and ``W``, with work that depends on shapes only:

1. Every sequence is cut into *nodes* of ``L`` keys. Within a node at most ``L`` keys can die, so
   only the ``L`` worst survivors at its start matter besides its own keys, whatever ``W`` is. They
   are the node's *list*, by position, with bit planes of their own.
2. Sequences too long for one program are cut into long nodes first (`_prefix_kernel`); the lists of
   short nodes are chosen from the list of their long node and its keys (`_list_kernel`). If ``W``
   is small, a long prefix is replaced by the ``W`` best keys of each of its nodes.
3. `_chunk_kernel` finds the survivors that may die within one chunk, and compares them, and the
   chunk's keys, with the chunk's keys: a key dies where its last missing rival arrives.

Symbols: ``R`` rows (batch x KV heads), ``K`` keys of a row, *words*: see `words`. An index counts
from the start of a row; what is stored counts from the start of a sequence. All lists of a level
have the same number of slots: ``[R, lists x slots]`` indices, then ``[R, 32, lists x slots / 32]``
planes, row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .select_rows import _NEVER, PER_CALL, Rows, SelectTiles, always_kept, encode, sequence_of
from .words import (
    _PADDING,
    bits_within,
    kth_best,
    mark_from,
    mark_ranks,
    nth_bit,
    nth_marked,
    order_keys,
    planes_of,
    popcount,
)

_NO_KEY = tl.constexpr(-(2**63))

# A length of nodes beyond that of any sequence.
_UNCUT = 2**31 - 1

# Arguments whose value must not compile a kernel anew.
_SIZES = [
    *PER_CALL,
    "parent_len",
    "parent_slots",
    "child_len",
    "child_slots",
    "is_local",
    "state_words",
    "n_nodes",
    "is_merge",
    "slots",
]


@triton.jit
def _locate(i_program, ptr_cu, key_len, n_seqs, length, PACKED: tl.constexpr):
    """Row and sequence of a node of `length`, and where the node starts."""
    nodes = key_len // length + n_seqs
    i_row = i_program // nodes
    i_node = i_program % nodes
    begin = i_node * 0
    end = begin + key_len
    if PACKED:
        i_seq = sequence_of(ptr_cu, n_seqs, i_node, length, True)
        begin = tl.load(ptr_cu + i_seq)
        end = tl.load(ptr_cu + i_seq + 1)
        i_node -= begin // length + i_seq
    return i_row.to(tl.int64), begin, end, begin + i_node * length


@triton.jit
def _list_of(begin, start, window, length):
    """List of the node of `length` that starts at `start`: its number, and the ranks it holds.

    ``(above, above + size]``. The first node of a sequence has an empty list. The numbers of the
    others, ``begin // length + m - 1``, are distinct for all sequences of a row.
    """
    above = tl.minimum(start - begin, tl.maximum(window - length, 0))
    number = begin // length + (start - begin) // length - 1
    return number, above, tl.minimum(start - begin, window) - above


@triton.jit
def _planes_of_list(ptr_lists, i_list, n_lists, slots):
    """Where plane 0 of a list lies in the lists of a row, and the way to the next plane."""
    return ptr_lists + n_lists * slots + i_list * (slots // 32), n_lists * slots // 32


@triton.jit
def _store_slots(ptr_lists, i_list, n_lists, slots, slot, index, live, ptr_score, ptr_mask,
                 HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Write the keys at `index` into the slots `slot`, ``[BLOCK_S]`` from a whole word on."""
    tl.store(ptr_lists + i_list * slots + slot, index, mask=live)
    order = order_keys(ptr_score, ptr_mask, index, live, HAS_MASK)
    # [BLOCK_S / 32, 32]
    planes = planes_of(tl.reshape(order, [BLOCK_S // 32, 32]), BLOCK_S // 32)
    ptr, step = _planes_of_list(ptr_lists, i_list, n_lists, slots)
    offs_w = tl.min(slot, 0) // 32 + tl.arange(0, BLOCK_S // 32)
    ptr += tl.arange(0, 32)[None, :] * step + offs_w[:, None]
    tl.store(ptr, planes, mask=(offs_w < slots // 32)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _list_kernel(ptr_score, ptr_mask, ptr_cu, ptr_planes, ptr_parents, ptr_children,
                 key_len, heads, n_seqs, row_words, window,
                 parent_len, parent_slots, child_len, child_slots, is_local,
                 HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
                 BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """The list of one node, from its parent's list and the parent's keys before the node.

    `is_local`: the best `child_slots` keys of the node before it instead.
    """
    i_row, begin, end, start = _locate(tl.program_id(0), ptr_cu, key_len, n_seqs, child_len, PACKED)
    child, _, n_child = _list_of(begin, start, window, child_len)
    if (start >= end) | (n_child <= 0):
        return
    low = begin + (start - begin) // parent_len * parent_len
    parent, above, n_list = _list_of(begin, low, window, parent_len)
    worst = window - above
    best = worst - child_len
    if is_local:
        n_child = child_slots
        low = start - child_len
        n_list = n_list * 0
        worst = child_slots
        best = worst * 0
    ptr_score += i_row * key_len
    ptr_mask += i_row // heads * key_len
    parents = key_len // parent_len
    children = key_len // child_len
    ptr_parents += i_row * 2 * parents * parent_slots
    ptr_children += i_row * 2 * children * child_slots

    list_words = (n_list + 31) // 32
    row_word = low // 32 - list_words
    ptr_list, list_step = _planes_of_list(ptr_parents, parent, parents, parent_slots)
    ptr_row = ptr_planes + i_row * 32 * row_words + row_word
    # [BLOCK_W]
    offs_w = tl.arange(0, BLOCK_W)
    is_list = offs_w < list_words
    ptr_plane = tl.where(is_list, ptr_list + offs_w, ptr_row + offs_w)
    plane_step = tl.where(is_list, list_step, row_words)
    first = tl.where(is_list, offs_w, row_word + offs_w) * 32
    members = bits_within(first, tl.where(is_list, 0, low), tl.where(is_list, n_list, start))
    marked = mark_ranks(ptr_plane, plane_step, members, offs_w, worst, best)

    for i_slot in range(0, child_slots, BLOCK_S):
        # [BLOCK_S]
        slot = i_slot + tl.arange(0, BLOCK_S)
        live = slot < n_child
        place = nth_marked(marked, slot, BLOCK_W)
        is_listed = place < list_words * 32
        ptr = ptr_parents + parent * parent_slots + place
        listed = tl.load(ptr, mask=live & is_listed, other=0)
        index = tl.where(is_listed, listed, row_word * 32 + place)
        _store_slots(ptr_children, child, children, child_slots, slot, index, live,
                     ptr_score, ptr_mask, HAS_MASK, BLOCK_S)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _prefix_kernel(ptr_score, ptr_mask, ptr_cu, ptr_planes, ptr_locals, ptr_children, ptr_state,
                   key_len, heads, n_seqs, row_words, window, child_len, child_slots,
                   state_words, n_nodes, is_merge,
                   HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
                   BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Lists of nodes, each from all keys before the node, a program for every so many nodes.

    `is_merge`: from the lists of the best keys of each node before it, instead of all keys.
    """
    ptr_state += tl.program_id(0).to(tl.int64) * 2 * state_words
    ptr_upto = ptr_state + state_words
    children = key_len // child_len
    for i_node in range(tl.program_id(0), n_nodes, tl.num_programs(0)):
        i_row, begin, end, start = _locate(i_node, ptr_cu, key_len, n_seqs, child_len, PACKED)
        child, _, n_child = _list_of(begin, start, window, child_len)
        if (start < end) & (n_child > 0):
            row_score = ptr_score + i_row * key_len
            row_mask = ptr_mask + i_row // heads * key_len
            row_children = ptr_children + i_row * 2 * children * child_slots
            row_locals = ptr_locals + i_row * 2 * children * child_slots
            first = begin // 32
            low = begin - first * 32
            high = start - first * 32
            ptr_plane = ptr_planes + i_row * 32 * row_words + first
            step = row_words
            if is_merge:
                first = begin // child_len
                low = begin * 0
                high = (start - begin) // child_len * child_slots
                ptr_plane, step = _planes_of_list(row_locals, first, children, child_slots)
            n_words = (high + 31) // 32
            worst, worst_at = kth_best(
                ptr_plane, step, ptr_state, n_words, low, high, window, False, BLOCK_W
            )
            # All order keys lie below the largest number.
            best = worst * 0 + 0x7FFFFFFF
            best_at = worst_at
            if window > child_len:
                best, best_at = kth_best(
                    ptr_plane, step, ptr_state, n_words, low, high, window - child_len, False,
                    BLOCK_W,
                )  # fmt: skip

            # Mark the keys from `worst` to below `best`, and count them up to each word.
            seen = low * 0
            for w0 in range(0, n_words, BLOCK_W):
                offs_w = w0 + tl.arange(0, BLOCK_W)
                live = offs_w < n_words
                members = bits_within(offs_w * 32, low, high)
                ptr = ptr_plane + offs_w
                marked = mark_from(ptr, step, members, offs_w, live, worst, worst_at)
                if window > child_len:
                    marked &= ~mark_from(ptr, step, members, offs_w, live, best, best_at)
                count = popcount(marked)
                tl.store(ptr_state + offs_w, marked, mask=live)
                tl.store(ptr_upto + offs_w, seen + tl.cumsum(count, 0), mask=live)
                seen += tl.sum(count, 0)
            tl.debug_barrier()

            for i_slot in range(0, child_slots, BLOCK_S):
                # [BLOCK_S]
                slot = i_slot + tl.arange(0, BLOCK_S)
                live = slot < n_child
                w = slot * 0
                size = n_words
                while size > 1:
                    half = size // 2
                    upto = tl.load(ptr_upto + w + half - 1, mask=live, other=0)
                    w = tl.where(upto <= slot, w + half, w)
                    size -= half
                before = tl.load(ptr_upto + w - 1, mask=live & (w > 0), other=0)
                marked = tl.load(ptr_state + w, mask=live, other=0)
                place = w * 32 + nth_bit(marked, slot - before)
                index = first * 32 + place
                if is_merge:
                    index = tl.load(row_locals + first * child_slots + place, mask=live, other=0)
                _store_slots(row_children, child, children, child_slots, slot, index, live,
                             row_score, row_mask, HAS_MASK, BLOCK_S)  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _strict_order(order, index, live):
    """Order key and index in one int64: larger is better, and of equals the newer."""
    return tl.where(live, (order.to(tl.int64) << 32) | index, _NO_KEY)


@triton.jit
def _beaten_by(key, rivals, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """How many of the rivals beat each key."""
    count = tl.zeros([CHUNK], tl.int32)
    for i in range(0, CHUNK, BLOCK_R):
        rival = tl.gather(rivals, i + tl.arange(0, BLOCK_R), 0)
        # [BLOCK_R, CHUNK]
        count += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
    return count


@triton.jit
def _beaten_at(key, rivals, missing, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Number of the rival with which `missing` have beaten each key; CHUNK if they never do."""
    at = tl.zeros([CHUNK], tl.int32)
    for i in range(0, CHUNK, BLOCK_R):
        rival = tl.gather(rivals, i + tl.arange(0, BLOCK_R), 0)
        # [BLOCK_R, CHUNK]
        upto = tl.cumsum((rival[:, None] > key[None, :]).to(tl.int32), 0)
        at += tl.sum((upto < missing[None, :]).to(tl.int32), 0)
        missing -= tl.max(upto, 0)
    return at


@triton.jit(do_not_specialize=_SIZES)
def _chunk_kernel(ptr_score, ptr_mask, ptr_cu, ptr_planes, ptr_lists, ptr_rank, ptr_arrival,
                  ptr_expiry, key_len, heads, n_seqs, row_words, window, keep_first, keep_recent,
                  slots,
                  HAS_MASK: tl.constexpr, HAS_RANK: tl.constexpr, PACKED: tl.constexpr,
                  CHUNK: tl.constexpr, NODE: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Expiry of the keys that die within one chunk."""
    LIST_WORDS: tl.constexpr = NODE // 32
    i_row, begin, end, start = _locate(tl.program_id(0), ptr_cu, key_len, n_seqs, CHUNK, PACKED)
    stop = tl.minimum(start + CHUNK, end)
    if (start >= end) | (stop - begin <= window):
        return
    ptr_score += i_row * key_len
    ptr_mask += i_row // heads * key_len
    ptr_rank += i_row // heads * key_len
    ptr_arrival += i_row // heads * key_len
    ptr_expiry += i_row * key_len
    lists = key_len // NODE
    ptr_lists += i_row * 2 * lists * slots

    # The survivors that may die here have the ranks (window - CHUNK, window].
    low = begin + (start - begin) // NODE * NODE
    i_list, above, n_list = _list_of(begin, low, window, NODE)
    row_word = low // 32 - LIST_WORDS
    ptr_list, list_step = _planes_of_list(ptr_lists, i_list, lists, slots)
    ptr_row = ptr_planes + i_row * 32 * row_words + row_word
    # [2 * LIST_WORDS]
    offs_w = tl.arange(0, 2 * LIST_WORDS)
    is_list = offs_w < LIST_WORDS
    ptr_plane = tl.where(is_list, ptr_list + offs_w, ptr_row + offs_w)
    plane_step = tl.where(is_list, list_step, row_words)
    first = tl.where(is_list, offs_w, row_word + offs_w) * 32
    members = bits_within(first, tl.where(is_list, 0, low), tl.where(is_list, n_list, start))
    worst = window - above
    marked = mark_ranks(ptr_plane, plane_step, members, offs_w, worst, worst - CHUNK)

    # Candidates: the i-th of those survivors, and the i-th key of the chunk. [CHUNK]
    slot = tl.arange(0, CHUNK)
    above = tl.minimum(start - begin, tl.maximum(window - CHUNK, 0))
    old_live = slot < tl.minimum(start - begin, window) - above
    place = nth_marked(marked, slot, 2 * LIST_WORDS)
    is_listed = place < NODE
    listed = tl.load(ptr_lists + i_list * slots + place, mask=old_live & is_listed, other=0)
    old = tl.where(is_listed, listed, row_word * 32 + place)
    new = start + slot
    new_live = new < stop
    old_order = order_keys(ptr_score, ptr_mask, old, old_live, HAS_MASK)
    new_order = order_keys(ptr_score, ptr_mask, new, new_live, HAS_MASK)
    old_key = _strict_order(old_order, old, old_live)
    new_key = _strict_order(new_order, new, new_live)

    # Candidates hold the ranks behind `above`; each rival that beats a key takes one.
    # Between old and new the order keys decide: of equals the new one is better.
    missing = window - above - _beaten_by(old_key, old_key, CHUNK, BLOCK_R)
    old_dies = _beaten_at(old_order - 1, new_order, missing, CHUNK, BLOCK_R)
    missing = window - above - _beaten_by(new_order, old_order, CHUNK, BLOCK_R)
    new_dies = _beaten_at(new_key, new_key, missing, CHUNK, BLOCK_R)

    is_first, until = always_kept(
        old, begin, ptr_rank, ptr_arrival, key_len, keep_first, keep_recent, old_live, HAS_RANK
    )
    expiry = tl.maximum(start + old_dies, until)
    expiry = tl.where(is_first | (expiry >= end), _NEVER, expiry - begin)
    tl.store(ptr_expiry + old, expiry, mask=(old_order > _PADDING) & (old_dies < CHUNK))
    is_first, until = always_kept(
        new, begin, ptr_rank, ptr_arrival, key_len, keep_first, keep_recent, new_live, HAS_RANK
    )
    expiry = tl.maximum(start + tl.maximum(new_dies, slot), until)
    expiry = tl.where(is_first | (expiry >= end), _NEVER, expiry - begin)
    tl.store(ptr_expiry + new, expiry, mask=(new_order > _PADDING) & (new_dies < CHUNK))


def select_causal(
    rows: Rows, window: int, tiles: SelectTiles, start: Tensor, expiry: Tensor
) -> None:
    """Write start and expiry of every key, int32 ``[R, K]``."""
    planes = encode(rows, tiles, start, expiry)
    if window >= rows.key_len:
        return
    lists, slots = planes, 32
    if rows.key_len > tiles.node:
        length = _UNCUT
        if rows.key_len > 32 * tiles.words:
            length = 16 * tiles.words
            lists, slots = _prefix_lists(rows, window, tiles, planes, length)
        lists, slots = _node_lists(
            rows, window, tiles, planes, tiles.node, parents=(lists, length, slots)
        )
    launch(_chunk_kernel, rows.n_rows * (rows.key_len // tiles.chunk + rows.n_seqs))(
        rows.score,
        rows.mask,
        rows.cu_seqlens,
        planes,
        lists,
        rows.rank,
        rows.arrival,
        expiry,
        rows.key_len,
        rows.heads,
        rows.n_seqs,
        planes.shape[-1],
        window,
        rows.keep_first,
        rows.keep_recent,
        slots,
        HAS_MASK=rows.has_mask,
        HAS_RANK=rows.has_rank,
        PACKED=rows.packed,
        CHUNK=tiles.chunk,
        NODE=tiles.node,
        BLOCK_R=tiles.rivals,
        num_warps=tiles.chunk_warps,
    )


def _empty_lists(rows: Rows, window: int, length: int, like: Tensor) -> tuple[Tensor, int]:
    """Memory for the lists of all nodes of a length, and the slots of each."""
    slots = min(length, triton.cdiv(window, 32) * 32)
    return like.new_empty(rows.n_rows, 2, rows.key_len // length * slots), slots


def _node_lists(
    rows: Rows,
    window: int,
    tiles: SelectTiles,
    planes: Tensor,
    length: int,
    parents: tuple[Tensor, int, int] | None,
) -> tuple[Tensor, int]:
    """Lists of the nodes of a length, from those of their parents: (lists, length, slots).

    Without parents: for each node the best keys of the node before it.
    """
    children, slots = _empty_lists(rows, window, length, planes)
    parent_lists, parent_len, parent_slots = parents or (planes, _UNCUT, 32)
    launch(_list_kernel, rows.n_rows * (rows.key_len // length + rows.n_seqs))(
        rows.score,
        rows.mask,
        rows.cu_seqlens,
        planes,
        parent_lists,
        children,
        rows.key_len,
        rows.heads,
        rows.n_seqs,
        planes.shape[-1],
        window,
        parent_len,
        parent_slots,
        length,
        slots,
        int(parents is None),
        HAS_MASK=rows.has_mask,
        PACKED=rows.packed,
        BLOCK_W=tiles.words,
        BLOCK_S=tiles.slots,
        num_warps=tiles.set_warps,
    )
    return children, slots


def _prefix_lists(
    rows: Rows, window: int, tiles: SelectTiles, planes: Tensor, length: int
) -> tuple[Tensor, int]:
    """Lists of the nodes of a length, from all keys before them."""
    children, slots = _empty_lists(rows, window, length, planes)
    # The best keys of each node are fewer than its keys only if few are kept.
    merge = 2 * slots <= length
    local = planes
    prefix_words = planes.shape[-1] + 1
    if merge:
        local, _ = _node_lists(rows, window, tiles, planes, length, parents=None)
        prefix_words = rows.key_len // length * slots // 32
    n_nodes = rows.n_rows * (rows.key_len // length + rows.n_seqs)
    programs = min(n_nodes, tiles.prefixes)
    state = planes.new_empty(programs, 2, prefix_words)
    launch(_prefix_kernel, programs)(
        rows.score,
        rows.mask,
        rows.cu_seqlens,
        planes,
        local,
        children,
        state,
        rows.key_len,
        rows.heads,
        rows.n_seqs,
        planes.shape[-1],
        window,
        length,
        slots,
        prefix_words,
        n_nodes,
        int(merge),
        HAS_MASK=rows.has_mask,
        PACKED=rows.packed,
        BLOCK_W=tiles.words,
        BLOCK_S=tiles.slots,
        num_warps=tiles.prefix_warps,
    )
    return children, slots
