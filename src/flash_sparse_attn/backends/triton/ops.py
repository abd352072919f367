"""Custom operators: schemas, fakes and autograd of the kernels, registered without Triton.

A graph sees four operators, ``select``, ``plan``, ``forward`` and ``backward``. Kernels are
imported when an operator runs, so that importing the package needs no GPU and no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...intervals import KeySelection
from ...plan import Plan
from ...problem import Problem
from ...varlen import PackedSequences
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
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out,"
    f" Tensor norm, Tensor[] plan, {_CALL}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
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
    from .plan import build_plan

    selection = KeySelection(
        start, expiry, score, mode, window_size, keep_first, keep_recent, key_mask
    )
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, query_len, start.shape[-1])
    return build_plan(
        selection, query_len, is_causal=is_causal, packed=packed, for_backward=for_backward
    ).tensors()


@on_device
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
) -> tuple[Tensor, Tensor, Tensor]:
    from .calls import run_forward

    record = Plan.of(plan, sizes, clamps_positions)
    out, lse, norm = run_forward(
        query, key, value, bias, record, softmax_scale, softcap, with_norm=True
    )
    return out, lse, norm


@on_device
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
    softcap: float,
    clamps_positions: bool,
    sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .calls import run_backward

    record = Plan.of(plan, sizes, clamps_positions)
    grads = run_backward(
        grad_out, query, key, value, bias, out, norm, record, softmax_scale, softcap, needs
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
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, query_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, query_len), dtype=torch.float32)
    return query.new_empty(query.shape), lse, lse.new_empty((2, *lse.shape))


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
    out, lse, norm = output
    ctx.mark_non_differentiable(lse, norm)
    ctx.save_for_backward(query, key, value, bias, out, norm, *plan)


def _differentiate(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, bias, out, norm, *plan = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    grads = torch.ops.flash_sparse_attn.backward(
        grad_out, query, key, value, bias, out, norm, plan, *ctx.call, needs
    )
    asked = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*asked, [None] * len(plan), None, None, None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "flash_sparse_attn has no second derivatives: its backward pass is not differentiable; "
        "call backward() or autograd.grad() without create_graph=True"
    )


torch.library.register_autograd(
    "flash_sparse_attn::forward", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd("flash_sparse_attn::backward", _refuse, lib=_library)


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
    call = torch.ops.flash_sparse_attn.plan if is_traced(selection.start) else _plan
    tensors = call(
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
    if not (problem.requires_grad or is_traced(query)):
        return _infer(query, key, value, bias, problem, ready)
    call = (problem.softmax_scale, problem.softcap, ready.clamps_positions, list(ready.sizes))
    operator = torch.ops.flash_sparse_attn.forward
    out, lse, _ = operator(query, key, value, bias, ready.tensors(), *call)
    return out, lse


@on_device
def _infer(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, problem: Problem, plan: Plan
) -> tuple[Tensor, Tensor]:
    from .calls import run_forward

    scale, softcap = problem.softmax_scale, problem.softcap
    out, lse, _ = run_forward(query, key, value, bias, plan, scale, softcap, with_norm=False)
    return out, lse


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler, a fake mode or another subclass has to see operators, not launches."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
