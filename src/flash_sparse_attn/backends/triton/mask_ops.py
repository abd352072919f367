"""Custom operators of plans without a selection, and which of them a call takes.

As in `ops.py`, kernels are imported when an operator runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ...problem import Problem
from ...tracing import is_traced
from ...varlen import PackedSequences
from .config import SLOT_ALIGN, architecture_of, tiles_for
from .masks import MaskLayout
from .ops import on_device

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_library.define(
    "plan_mask(Tensor mask, SymInt query_len, SymInt key_len, int num_heads, int heads_kv,"
    " SymInt batch, bool is_causal, bool for_backward, str architecture, int head_dim,"
    " bool reads_pairs) -> Tensor[]"
)
_library.define(
    "plan_packed(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt query_len, SymInt key_len,"
    " SymInt num_slots, SymInt epoch_len, bool for_backward) -> (Tensor, Tensor)"
)


def _layout_of(
    mask_shape: tuple[int, ...] | None,
    query_len: int,
    key_len: int,
    num_heads: int,
    heads_kv: int,
    batch: int,
    for_backward: bool,
    architecture: str,
    head_dim: int,
    reads_pairs: bool,
) -> MaskLayout:
    """The layout of a call, with the lists that its kernels are going to read."""
    heads = num_heads, heads_kv, batch
    layout = MaskLayout.of(mask_shape, query_len, key_len, *heads, reads_pairs=reads_pairs)
    return layout.with_lists(
        tiles_for(architecture, head_dim, reads_pairs), num_heads // heads_kv,
        batch * query_len * num_heads, for_backward=for_backward,
    )  # fmt: skip


def _architecture_of(device: torch.device) -> str:
    return architecture_of(device)


# A compiler need not look into it.
_architecture_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@on_device
def _plan(mask: Tensor, layout: MaskLayout, is_causal: bool, for_backward: bool) -> Plan:
    from .plan_mask import plan_mask

    return plan_mask(mask, layout, is_causal=is_causal, for_backward=for_backward)


def _plan_mask(
    mask: Tensor,
    query_len: int,
    key_len: int,
    num_heads: int,
    heads_kv: int,
    batch: int,
    is_causal: bool,
    for_backward: bool,
    architecture: str,
    head_dim: int,
    reads_pairs: bool,
) -> list[Tensor]:
    layout = _layout_of(
        mask.shape, query_len, key_len, num_heads, heads_kv, batch, for_backward, architecture,
        head_dim, reads_pairs,
    )  # fmt: skip
    return _plan(mask, layout, is_causal, for_backward).tensors()


@on_device
def _plan_packed(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_len: int,
    key_len: int,
    num_slots: int,
    epoch_len: int,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    from .plan_mask import plan_packed

    packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, epoch_len, num_slots)
    table, use_slot = plan_packed(packed, query_len, key_len, for_backward=for_backward)
    return table, table.new_empty(0) if use_slot is None else use_slot


_library.impl("plan_mask", _plan_mask, "CUDA")
_library.impl("plan_packed", _plan_packed, "CUDA")


@torch.library.register_fake("flash_sparse_attn::plan_mask", lib=_library)
def _(
    mask: Tensor,
    query_len: int,
    key_len: int,
    num_heads: int,
    heads_kv: int,
    batch: int,
    is_causal: bool,
    for_backward: bool,
    architecture: str,
    head_dim: int,
    reads_pairs: bool,
) -> list[Tensor]:
    layout = _layout_of(
        mask.shape, query_len, key_len, num_heads, heads_kv, batch, for_backward, architecture,
        head_dim, reads_pairs,
    )  # fmt: skip
    return [mask.new_empty(shape, dtype=dtype) for shape, dtype in layout.shapes(for_backward)]


@torch.library.register_fake("flash_sparse_attn::plan_packed", lib=_library)
def _(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_len: int,
    key_len: int,
    num_slots: int,
    epoch_len: int,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    num_epochs = query_len // epoch_len + cu_seqlens_q.shape[0] - 1
    table = cu_seqlens_q.new_empty((num_epochs, 8))
    return table, table.new_empty((key_len,) if for_backward else (0,))


def plan_of(problem: Problem, mask: Tensor | None) -> Plan:
    """The plan of a call with a bool mask, or without any."""
    query_len, key_len, is_causal = problem.query_len, problem.key_len, problem.is_causal
    if problem.packed is not None:
        return _packed_plan(problem, problem.packed, mask)
    shape = None if mask is None else mask.shape
    heads = problem.num_heads, problem.num_kv_heads, problem.batch
    # The kernels of a plan from a mask read no mask themselves.
    reads_pairs = problem.bias_shape is not None and problem.bias_shape[2] > 1
    kernels = _architecture_of(problem.device), problem.head_dim, reads_pairs
    needs = problem.requires_grad
    layout = _layout_of(shape, query_len, key_len, *heads, needs, *kernels)
    if mask is None or layout.kind == "keys":
        return _plan_of_keys(layout.sizes, is_causal, mask)
    if not is_traced(mask):
        return _plan(mask, layout, is_causal, needs)
    tensors = torch.ops.flash_sparse_attn.plan_mask(
        mask, query_len, key_len, *heads, is_causal, needs, *kernels
    )
    return Plan.of(tensors, layout.sizes, not is_causal)


def _packed_plan(problem: Problem, packed: PackedSequences, mask: Tensor | None) -> Plan:
    """Slots are the keys of a sequence, and an epoch is a sequence."""
    epoch_len, num_slots = (
        -(-longest // SLOT_ALIGN) * SLOT_ALIGN
        for longest in (packed.max_seqlen_q, packed.max_seqlen_k)
    )
    call = _plan_packed
    if is_traced(packed.cu_seqlens_q):
        call = torch.ops.flash_sparse_attn.plan_packed
    table, use_slot = call(
        packed.cu_seqlens_q, packed.cu_seqlens_k, problem.query_len, problem.key_len, num_slots,
        epoch_len, problem.requires_grad,
    )  # fmt: skip
    sizes = [epoch_len, num_slots, problem.query_len, problem.key_len]
    return _plan_of_keys(sizes, problem.is_causal, mask, table, use_slot)


def _plan_of_keys(
    sizes: list[int],
    is_causal: bool,
    mask: Tensor | None,
    epochs: Tensor | None = None,
    use_slot: Tensor | None = None,
) -> Plan:
    tensors = [*[None] * 7, use_slot, epochs, None, None, mask]
    return Plan.of(tensors, sizes, not is_causal)
