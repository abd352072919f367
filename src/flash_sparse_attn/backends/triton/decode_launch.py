"""Launches of the decoding kernels: a few queries over a cache, and a step of a `WindowCache`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from ...quantize import FP8
from ...window_state import WindowState
from .config import padded_head_dim
from .decode import TURN, combine_kernel, split_kernel
from .decode_config import DecodeConfig, decode_config, splits_at_once, unpacks_fp8
from .inputs import Bias, Call
from .launch import launch, repeat_call
from .survivors import NOTES


@dataclass(frozen=True)
class Keys:
    """Keys and values of a cache, in sequences or in pages.

    Attributes:
        key: ``[B, K, Hkv, D]``, or pages ``[num_pages, page_size, Hkv, D]``; last stride 1.
        value: As `key`.
        lengths: int32 ``[B]``, keys of every sequence; default all.
        block_table: int32 ``[B, max_pages]``, contiguous, the pages of every sequence in order.
        key_scale, value_scale: fp32 ``[Hkv]``, or one for each key in the shape of ``key[..., 0]``;
            what e4m3 keys and values are multiplied by.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    block_table: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Keys of a page, 0 without pages."""
        return 0 if self.block_table is None else self.key.shape[1]

    @property
    def max_pages(self) -> int:
        """Pages that a sequence can have; without pages its keys are one."""
        return 1 if self.block_table is None else self.block_table.shape[1]

    @property
    def max_len(self) -> int:
        """Keys that a sequence can have."""
        return self.max_pages * self.key.shape[1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.key,
            self.value,
            self.lengths,
            self.block_table,
            self.key_scale,
            self.value_scale,
        )

    def scale_strides(self) -> tuple[int, ...]:
        if self.key_scale is None or self.value_scale is None:
            return (0,) * 6
        shape = self.key.shape[:3]
        return (*self.key_scale.expand(shape).stride(), *self.value_scale.expand(shape).stride())


def _pattern(tensor: Bias | None) -> str:
    """``"shared"`` where all queries and heads of a KV head have the same, else ``"rows"``."""
    if tensor is None:
        return "none"
    _, _, member, query, _ = tensor.strides
    return "shared" if member == query == 0 else "rows"


def attend(
    query: Tensor,
    keys: Keys,
    mask: Tensor | None,
    intervals: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    call: Call,
    is_causal: bool,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over the keys of a cache; they are its last positions.

    Args:
        query: fp16 or bf16 ``[B, Q, H, D]``; the last stride is 1.
        keys: Keys and values.
        mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, or ``None``.
        intervals: Start and expiry of a selection, int32 ``[B, Hkv, K]``, or ``None``.
        bias: Of the same set of shapes.
        call: Scale and softcap.
        is_causal: Whether a query sees no key after its own position, length - Q + i.
        config: Tile sizes.

    Returns:
        ``out [B, Q, H, D]`` and ``lse`` fp32 ``[B, H, Q]``.
    """
    batch, query_len, num_heads, head_dim = query.shape
    heads_kv, key_len = keys.key.shape[2], keys.max_len
    group = num_heads // heads_kv
    rows = batch * heads_kv
    config = config or decode_config(query_len * group, head_dim, keys.key.dtype == FP8)
    tiles = rows * triton.cdiv(query_len * group, config.block_m)
    splits = config.splits(tiles, key_len, query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, num_heads, query_len, dtype=torch.float32)
    part, stat = _scratch(query, splits)

    bits = None if mask is None else mask.view(torch.uint8)
    start, expiry = intervals or (None, None)
    masks, biases = (
        None if tensor is None else Bias.of(tensor, num_heads, heads_kv) for tensor in (bits, bias)
    )
    list_len, listed = 0, None
    if mask is not None or intervals is not None:
        list_len = triton.cdiv(triton.cdiv(key_len, TURN), splits) * TURN
        listed = query.new_empty(tiles * splits * list_len, dtype=torch.int32)
    sizes = {"HEADS_KV": heads_kv, "GROUP": group, "D": head_dim}
    sizes |= {"BLOCK_D": padded_head_dim(head_dim), "SPLITS": splits}
    key, value = _in_pairs(keys.key), _in_pairs(keys.value)
    launch(split_kernel, tiles * splits)(
        query, key, value, part, stat, out, lse, keys.lengths, keys.block_table, listed,
        bits, bias, start, expiry, keys.key_scale, keys.value_scale, *(None,) * 6, *call.factors,
        query_len, key_len, keys.key.shape[0], keys.max_pages, list_len, 0, 0,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *(masks.strides if masks else (0,) * 5), *(biases.strides if biases else (0,) * 5),
        *keys.scale_strides(), **sizes, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STAGES=config.num_stages, PAGE=keys.page_size, MASK=_pattern(masks), BIAS=_pattern(biases),
        INTERVALS=intervals is not None, KEEPS=False, UNPACKS=unpacks_fp8(query.device),
        SCAN=max(16, min(1024, triton.next_power_of_2(list_len))), HAS_SOFTCAP=bool(call.softcap),
        IS_CAUSAL=is_causal and (query_len > 1 or intervals is not None),
        num_warps=config.num_warps,
    )  # fmt: skip
    if splits > 1:
        launch(combine_kernel, rows * query_len * group)(
            part, stat, out, lse, *(None,) * 15, *call.factors, query_len, key_len, 0, 0, 0,
            *(0,) * 6, **sizes, **splits_at_once(splits, head_dim), HAS_SOFTCAP=bool(call.softcap),
            num_warps=4, 
        )  # fmt: skip
    return out, lse


def step_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    real: Tensor | None,
    state: WindowState,
    call: Call,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from the next token and commit it.

    Args:
        query: ``[B, 1, H, D]``; the last stride is 1.
        key, value: ``[B, 1, Hkv, D]``.
        score: fp16, bf16 or fp32 ``[B, Hkv]``, contiguous.
        real: uint8 ``[B]``, contiguous, 0 for padding; default all real.
        state: Of the cache.
        call: Scale and softcap.
        config: Tile sizes.

    Returns:
        ``out [B, 1, H, D]`` and ``lse`` fp32 ``[B, H, 1]``.
    """
    batch, _, num_heads, head_dim = query.shape
    heads_kv, capacity = state.key.shape[1:3]
    group = num_heads // heads_kv
    rows = batch * heads_kv
    config = config or decode_config(group, head_dim, state.key.dtype == FP8)
    tiles = rows * triton.cdiv(group, config.block_m)
    splits = config.splits(tiles, capacity, query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, num_heads, 1, dtype=torch.float32)
    part, stat = _scratch(query, splits)
    note = query.new_empty(rows * splits * NOTES.value, dtype=torch.int64)
    sizes = {"HEADS_KV": heads_kv, "GROUP": group, "D": head_dim}
    sizes |= {"BLOCK_D": padded_head_dim(head_dim), "SPLITS": splits}
    stored = _in_pairs(state.key), _in_pairs(state.value)
    strides = [stored[0].stride(dim) for dim in (0, 2, 1)]  # of B, C, Hkv
    slot = (heads_kv * capacity, 1, capacity)
    launch(split_kernel, tiles * splits)(
        query, *stored, part, stat, None, None, None, None, None, None, state.score,
        None, None, state.key_scale, state.value_scale, state.position, state.threshold, score,
        real, state.seen_tokens, note, *call.factors, 1, capacity, 0, 0, 0, *state.sizes[1:],
        *query.stride()[:3], *strides, *strides, 0, 0, 0, 0, 0, slot[0], slot[2], 0, 0, 1,
        *slot, *slot,
        **sizes, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages, PAGE=0,
        MASK="none", BIAS="shared", INTERVALS=False, IS_CAUSAL=False, KEEPS=any(state.sizes[1:]),
        UNPACKS=unpacks_fp8(query.device), SCAN=16,
        HAS_SOFTCAP=bool(call.softcap), num_warps=config.num_warps,
    )  # fmt: skip
    launch(combine_kernel, rows * group)(
        part, stat, out, lse, query, key, value, score, real, note, state.key, state.value,
        state.key_scale, state.value_scale, state.score, state.position, state.threshold,
        state.seen_tokens, state.evicted_at, *call.factors, 1, capacity, *state.sizes,
        *query.stride()[:3:2], *key.stride()[:3:2], *value.stride()[:3:2], **sizes,
        **splits_at_once(splits, head_dim), HAS_SOFTCAP=bool(call.softcap), num_warps=4,
    )  # fmt: skip
    return out, lse


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_mask: Tensor | None,
    state: WindowState,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """`step_token` for each of ``T`` tokens, with little host time from the second call on.

    Args:
        query: ``[B, T, H, D]``; the last stride is 1.
        key, value: ``[B, T, Hkv, D]``.
        scores: fp16, bf16 or fp32 ``[B, Hkv, T]``.
        key_mask: Bool ``[B, T]``, or ``None``.
        state: Of the cache.
        call: Scale and softcap.

    Returns:
        ``out [B, T, H, D]`` and ``lse`` fp32 ``[B, H, T]``.
    """
    scores = scores.permute(2, 0, 1).contiguous()
    reals = None if key_mask is None else key_mask.view(torch.uint8).t().contiguous()
    stored = state.tensors()
    results = []
    for i in range(query.shape[1]):
        q, k, v = (t[:, i : i + 1] for t in (query, key, value))
        real = None if reals is None else reals[i]
        tensors = [q, k, v, scores[i], *([] if real is None else [real]), *stored]
        run = partial(step_token, q, k, v, scores[i], real, state, call)
        facts = ("step", state.sizes, real is None, call)
        out, lse = repeat_call(facts, tensors, run)
        results.append((out, lse))
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def decode(
    query: Tensor,
    keys: Keys,
    mask: Tensor | None,
    intervals: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    call: Call,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """`attend` with little host time from the second call on."""
    optional = [*keys.tensors()[2:], mask, *(intervals or (None, None)), bias]
    given = [tensor is not None for tensor in optional]
    tensors = [query, keys.key, keys.value, *(t for t in optional if t is not None)]
    run = partial(attend, query, keys, mask, intervals, bias, call, is_causal)
    out, lse = repeat_call(("decode", *given, call, is_causal), tensors, run)
    return out, lse


def _in_pairs(stored: Tensor) -> Tensor:
    """Keys or values of 8 bits as pairs of 16 bits; others as they are."""
    return stored.view(torch.int16) if stored.dtype == FP8 else stored


def _scratch(query: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """What splits leave: accumulators, and peaks with totals."""
    part = query.new_empty(query.numel() * splits, dtype=torch.float32)
    return part, part.new_empty(2 * part.numel() // query.shape[-1])
