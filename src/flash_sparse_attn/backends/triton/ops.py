"""Custom operators: schemas, fakes and autograd of the kernels, registered without Triton.

A graph sees four operators, ``select``, ``plan``, ``forward`` and ``backward``. Kernels are
imported when an operator runs, so that importing the package needs no GPU and no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...intervals import KeySelection
from ...plan import Plan
from ...problem import Problem
from ...tracing import is_traced, is_watched
from ...varlen import PackedSequences
from .config import keeps_rest
from .layout import Layout

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_library.define(
    "select(Tensor score, int window_size, str mode, Tensor? key_mask, Tensor? cu_seqlens,"
    " int keep_first, int keep_recent) -> (Tensor, Tensor)"
)
_library.define(
    "plan(Tensor start, Tensor expiry, Tensor score, Tensor? key_mask, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, str mode, int window_size, int keep_first, int keep_recent,"
    " SymInt query_len, bool is_causal, bool for_backward) -> Tensor[]"
)
_CALL = "float softmax_scale, float softcap, bool clamps_positions, SymInt[] sizes"
_library.define(
    f"forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] plan, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out,"
    f" Tensor norm, Tensor out_rest, Tensor[] plan, {_CALL}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the device of its first tensor as the current one, where Triton launches."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **options: Any) -> Any:
        if first.device.index == torch._C._cuda_getDevice():
            return function(first, *args, **options)
        with torch.cuda.device(first.device):
            return function(first, *args, **options)

    return run


@on_device
def _select(
    score: Tensor,
    window_size: int,
    mode: str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_first: int,
    keep_recent: int,
) -> tuple[Tensor, Tensor]:
    from .select import select_intervals

    return select_intervals(
        score,
        window_size,
        mode=mode,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        keep_first=keep_first,
        keep_recent=keep_recent,
    )


@on_device
def _plan(
    start: Tensor,
    expiry: Tensor,
    score: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mode: str,
    window_size: int,
    keep_first: int,
    keep_recent: int,
    query_len: int,
    is_causal: bool,
    for_backward: bool,
) -> list[Tensor]:
    selection = KeySelection(
        start, expiry, score, mode, window_size, keep_first, keep_recent, key_mask
    )
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, query_len, start.shape[-1])
    return _build_plan(start, selection, query_len, is_causal, packed, for_backward).tensors()


@on_device
def _build_plan(
    start: Tensor,
    selection: KeySelection,
    query_len: int,
    is_causal: bool,
    packed: PackedSequences | None,
    for_backward: bool,
) -> Plan:
    from .plan import build_plan

    return build_plan(
        selection, query_len, is_causal=is_causal, packed=packed, for_backward=for_backward
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    softmax_scale: float,
    softcap: float,
    clamps_positions: bool,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    record = Plan.of(plan, sizes, clamps_positions)
    call = (query, key, value, bias, record, softmax_scale, softcap)
    out, lse, norm, out_rest = _run_forward(*call, with_norm=True)
    return out, lse, norm, out.new_empty(0) if out_rest is None else out_rest


@on_device
def _run_forward(query: Tensor, *args: Any, with_norm: bool) -> Sequence[Tensor]:
    from .calls import run_forward

    return run_forward(query, *args, with_norm=with_norm)


@on_device
def _run_backward(grad_out: Tensor, *args: Any) -> Sequence[Tensor | None]:
    from .calls import run_backward

    return run_backward(grad_out, *args)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: Tensor,
    out_rest: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
    softcap: float,
    clamps_positions: bool,
    sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    record = Plan.of(plan, sizes, clamps_positions)
    kept = out_rest if out_rest.numel() else None
    grads = _run_backward(
        grad_out, query, key, value, bias, out, norm, kept, record, softmax_scale, softcap, needs
    )
    none = norm.new_empty(0)
    return tuple(none.clone() if grad is None else grad for grad in grads)  # type: ignore[return-value]


_library.impl("select", _select, "CUDA")
_library.impl("plan", _plan, "CUDA")
_library.impl("forward", _forward, "CUDA")
_library.impl("backward", _backward, "CUDA")


@torch.library.register_fake("flash_sparse_attn::select", lib=_library)
def _(score: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return score.new_empty(score.shape, dtype=torch.int32), score.new_empty(
        score.shape, dtype=torch.int32
    )


@torch.library.register_fake("flash_sparse_attn::plan", lib=_library)
def _(
    start: Tensor,
    expiry: Tensor,
    score: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mode: str,
    window_size: int,
    keep_first: int,
    keep_recent: int,
    query_len: int,
    is_causal: bool,
    for_backward: bool,
) -> list[Tensor]:
    num_sequences = None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    layout = Layout.of(
        query_len, start.shape[-1], mode, window_size, keep_first, keep_recent, num_sequences
    )
    rows = start.numel() // start.shape[-1]
    shapes = layout.shapes(rows, num_sequences is not None, for_backward)
    return [start.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@torch.library.register_fake("flash_sparse_attn::forward", lib=_library)
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, query_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, query_len), dtype=torch.float32)
    out_rest = query.new_empty(query.shape if keeps_rest(query) else 0)
    return query.new_empty(query.shape), lse, lse.new_empty((2, *lse.shape)), out_rest


@torch.library.register_fake("flash_sparse_attn::backward", lib=_library)
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    norm, needs = args[1], args[-1]
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else norm.new_empty(0)
        for tensor, need in zip((query, key, value, bias), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, bias, plan, *ctx.call = inputs
    out, lse, norm, out_rest = output
    ctx.mark_non_differentiable(lse, norm, out_rest)
    ctx.save_for_backward(query, key, value, bias, out, norm, out_rest, *plan)


def _differentiate(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, bias, out, norm, out_rest, *plan = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    grads = torch.ops.flash_sparse_attn.backward(
        grad_out, query, key, value, bias, out, norm, out_rest, plan, *ctx.call, needs
    )
    asked = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*asked, [None] * len(plan), None, None, None, None)


def refuse_second_derivatives(ctx: Any, *grads: Any) -> None:
    """The derivative of a backward operator."""
    raise RuntimeError(
        "flash_sparse_attn has no second derivatives: its backward pass is not differentiable; "
        "call backward() or autograd.grad() without create_graph=True"
    )


torch.library.register_autograd(
    "flash_sparse_attn::forward", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "flash_sparse_attn::backward", refuse_second_derivatives, lib=_library
)


def select(
    score: Tensor,
    window_size: int,
    mode: str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_first: int,
    keep_recent: int,
) -> tuple[Tensor, Tensor]:
    """Start and expiry of every key; see `select.select_intervals`."""
    call = torch.ops.flash_sparse_attn.select if is_traced(score) else _select
    return call(score, window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent)


def plan(
    selection: KeySelection,
    query_len: int,
    is_causal: bool,
    packed: PackedSequences | None,
    for_backward: bool,
) -> Plan:
    """The plan of a call over a selection."""
    if not is_traced(selection.start):
        return _build_plan(selection.start, selection, query_len, is_causal, packed, for_backward)
    tensors = torch.ops.flash_sparse_attn.plan(
        selection.start,
        selection.expiry,
        selection.score,
        selection.key_mask,
        None if packed is None else packed.cu_seqlens_q,
        None if packed is None else packed.cu_seqlens_k,
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
        query_len,
        is_causal,
        for_backward,
    )
    layout = Layout.of(
        query_len,
        selection.start.shape[-1],
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
        None if packed is None else packed.cu_seqlens_q.shape[0] - 1,
    )
    sizes = [layout.epoch_len, layout.old_slots, query_len, layout.key_len]
    return Plan.of(tensors, sizes, not is_causal)


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: KeySelection,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]`` over the keys of a selection."""
    ready = selection.plan
    # A prepared packed plan is for queries with the borders of the keys; to compare is a sync.
    borders = None if problem.packed is None else problem.packed.cu_seqlens_q
    if (
        ready is None
        or borders is not selection.cu_seqlens
        or not ready.fits(problem.query_len, problem.is_causal, problem.requires_grad)
    ):
        ready = plan(
            selection, problem.query_len, problem.is_causal, problem.packed, problem.requires_grad
        )
    return attend(problem, query, key, value, bias, ready)


def attend(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, ready: Plan
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]`` over the slots of a plan."""
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    factors = problem.softmax_scale, problem.softcap
    if is_watched(query):
        operator = torch.ops.flash_sparse_attn.forward
        call = (*factors, ready.clamps_positions, list(ready.sizes))
        out, lse, *_ = operator(query, key, value, bias, ready.tensors(), *call)
    elif problem.requires_grad:
        out, lse = _Attention.apply(query, key, value, bias, ready, *factors)
    else:
        out, lse, *_ = _run_forward(query, key, value, bias, ready, *factors, with_norm=False)
    return out, lse


class _Attention(torch.autograd.Function):
    """The operator ``forward`` and its gradients without what an operator costs the host."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        plan: Plan,
        *factors: float,
    ) -> tuple[Tensor, Tensor]:
        call = (query, key, value, bias, plan, *factors)
        out, lse, norm, out_rest = _run_forward(*call, with_norm=True)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        # The plan's tensors, too: what keeps a layer's tensors elsewhere, or makes them anew, has
        # to see them.
        ctx.save_for_backward(query, key, value, bias, out, norm, out_rest, *plan.parts)
        ctx.factors, ctx.plan = factors, (plan.sizes, plan.clamps_positions)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, norm, out_rest, *parts = ctx.saved_tensors
        plan = Plan.of(parts, *ctx.plan)
        needs = ctx.needs_input_grad[:4]
        rest = (None,) * 3
        if grad_out is None:
            return (*rest, *rest, None)
        tensors = (grad_out, query, key, value, bias, out, norm)
        if not (torch.is_grad_enabled() or is_watched(grad_out)):
            return (*_run_backward(*tensors, out_rest, plan, *ctx.factors, needs), *rest)
        kept = out.new_empty(0) if out_rest is None else out_rest
        call = (*ctx.factors, plan.clamps_positions, list(plan.sizes), list(needs))
        grads = torch.ops.flash_sparse_attn.backward(*tensors, kept, plan.tensors(), *call)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *rest)
