"""New keys and values written into the slots of a cache, in sequences or in pages."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import padded_head_dim
from .launch import launch

_MAX_FP8 = tl.constexpr(448.0)
_HEADS = 8
"""Heads of one program."""


@triton.jit
def to_fp8(rows, scale):
    """Rows ``[..., D]`` over their scales, inside the range of e4m3."""
    return tl.minimum(tl.maximum(rows / scale, -_MAX_FP8), _MAX_FP8)


@triton.jit
def row_scale(rows, AXIS: tl.constexpr):
    """Scales with which rows use the whole range of e4m3."""
    return tl.maximum(tl.max(tl.abs(rows), AXIS) / _MAX_FP8, 1e-30)


@triton.jit
def _append(
    ptr_new, ptr_cache, ptr_scale, i_token, head, mask, page, place, stn, sth, scb, scn, sch, ssb,
    ssn, ssh, D: tl.constexpr, BLOCK_D: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Write one token's rows of some heads. [HEADS, D]."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = mask[:, None] & (offs_d < D)[None, :]
    offs = i_token * stn + head * sth
    rows = tl.load(ptr_new + offs[:, None] + offs_d[None, :], mask=mask_d, other=0.0)
    if ptr_scale is not None:
        rows = rows.to(tl.float32)
        ptrs = ptr_scale + page * ssb + place * ssn + head * ssh
        if PER_KEY:
            scale = row_scale(rows, 1)
            tl.store(ptrs, scale, mask=mask)
        else:
            scale = tl.load(ptrs, mask=mask, other=1.0)
        rows = to_fp8(rows, scale[:, None])
    offs = page * scb + place * scn + head * sch
    rows = rows.to(ptr_cache.dtype.element_ty)
    tl.store(ptr_cache + offs[:, None] + offs_d[None, :], rows, mask=mask_d)


@triton.jit(do_not_specialize=("num_slots",))
def append_kernel(
    ptr_new_k, ptr_new_v, ptr_k, ptr_v, ptr_k_scale, ptr_v_scale, ptr_slot, num_slots, page_size,
    sakn, sakh, savn, savh, skb, skn, skh, svb, svn, svh, sxb, sxn, sxh, syb, syn, syh,
    HEADS_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    K_PER_KEY: tl.constexpr,
    V_PER_KEY: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. A slot that does not exist is left alone."""
    blocks: tl.constexpr = (HEADS_KV + HEADS - 1) // HEADS
    i_token = (tl.program_id(0) // blocks).to(tl.int64)
    head = ((tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    slot = tl.load(ptr_slot + i_token).to(tl.int64)
    mask = (head < HEADS_KV) & (slot >= 0) & (slot < num_slots)
    page, place = slot // page_size, slot % page_size
    _append(
        ptr_new_k, ptr_k, ptr_k_scale, i_token, head, mask, page, place, sakn, sakh, skb, skn, skh,
        sxb, sxn, sxh, D, BLOCK_D, K_PER_KEY,
    )  # fmt: skip
    _append(
        ptr_new_v, ptr_v, ptr_v_scale, i_token, head, mask, page, place, savn, savh, svb, svn, svh,
        syb, syn, syh, D, BLOCK_D, V_PER_KEY,
    )  # fmt: skip


def append(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Write tokens ``[T, Hkv, D]`` into slots; the arguments are those of `append_kvcache`."""
    tokens, heads_kv, head_dim = key.shape
    if tokens == 0:
        return
    scale_strides = [
        stride
        for scale in (k_scale, v_scale)
        for stride in ((0, 0, 0) if scale is None else scale.expand(k_cache.shape[:3]).stride())
    ]
    per_key = [scale is not None and scale.dim() > 1 for scale in (k_scale, v_scale)]
    launch(append_kernel, tokens * triton.cdiv(heads_kv, _HEADS))(
        key, value, k_cache, v_cache, k_scale, v_scale, slot_mapping,
        k_cache.shape[0] * k_cache.shape[1], k_cache.shape[1], *key.stride()[:2],
        *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
        HEADS_KV=heads_kv, D=head_dim, BLOCK_D=padded_head_dim(head_dim), HEADS=_HEADS,
        K_PER_KEY=per_key[0], V_PER_KEY=per_key[1], num_warps=4,
    )  # fmt: skip
