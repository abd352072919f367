"""Dynamic mask attention over texts that are cut along the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..attention import flash_sparse_attn_func, flash_sparse_attn_varlen_func
from ..selection import select_keys
from .ranks import Mesh, Ranks
from .survivors import Packing, RowFormat, Rule, Scan


def context_parallel_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    window_size: int,
    *,
    mesh: Mesh,
    key_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    shard_lengths: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`dynamic_mask_attn_func` where each rank holds one stretch of the texts.

    Ranks hold consecutive stretches, rank 0 the beginning. What a rank needs of all ranks before it
    are the keys that survive to its first token: ``window_size + keep_first + keep_recent`` rows
    per KV head, however long the texts. The result is that of one process with the whole texts, and
    so are the gradients; those of survivors return to the ranks that own them and are added in fp32
    in the order of ranks. The mode is ``"causal"``.

    Every rank of the mesh has to call, with the same sizes and options, and to run the backward
    pass, even if its own rows have no part in the loss. A rank that fails lets the others fail when
    the time limit of the group is over.

    Args:
        query: ``[B, S, H, D]``, the rank's own stretch.
        key: ``[B, S, Hkv, D]``.
        value: ``[B, S, Hkv, D]``.
        scores: Float ``[B, Hkv, S]``.
        window_size: ``W``, the number of keys each query keeps.
        mesh: A `DeviceMesh` of one dimension or a `ProcessGroup`.
        key_mask: Bool ``[B, S]``, True for real tokens; on every rank or on none.
        keep_first, keep_recent: As in `select_keys`, counted in the whole texts.
        shard_lengths: Tokens ``S`` of every rank, in order; default: as many as here.
        softmax_scale, softcap, deterministic, return_lse, backend: As in `flash_sparse_attn_func`.

    Returns:
        ``out [B, S, H, D]``, or ``(out, lse [B, H, S])``, of the rank's own queries.

    Raises:
        TypeError, ValueError: An argument does not fit. That ranks differ is looked for on CPUs,
            and on GPUs with ``FLASH_SPARSE_ATTN_CHECK=1``.
        RuntimeError: Another rank failed or did not call.
    """
    checks.check_qkv(query, key, value)
    checks.check_scores(scores, key)
    checks.check_selection_arguments(
        scores, window_size, "causal", ("causal",), key_mask, None, keep_first, keep_recent
    )
    window = (window_size, keep_first, keep_recent)
    ranks, offsets = _along(mesh, query, key, key_mask, window, shard_lengths)
    key, value, scores, real = _with_survivors(
        ranks, offsets, None, window, key, value, scores, key_mask
    )
    selection = select_keys(
        scores, window_size, key_mask=real, keep_first=keep_first, keep_recent=keep_recent
    )
    return flash_sparse_attn_func(
        query,
        key,
        value,
        selection,
        scores[:, :, None],
        softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_lse,
        backend=backend,
    )


def context_parallel_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    *,
    mesh: Mesh,
    key_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    shard_lengths: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`context_parallel_attn_func` for packed sequences, each attended on its own.

    Ranks may begin and end anywhere in a sequence: the survivors of a sequence that lies across the
    beginning of a rank come from the ranks before it.

    Args:
        query: ``[T, H, D]``, the rank's own stretch of the packed tokens.
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, D]``.
        scores: Float ``[Hkv, T]``.
        cu_seqlens: int32 ``[N + 1]``, the borders of all sequences in the tokens of all ranks, the
            same on every rank.
        key_mask: Bool ``[T]``, True for real tokens; on every rank or on none.
        window_size, mesh, keep_first, keep_recent, shard_lengths, softmax_scale, softcap: As in
            `context_parallel_attn_func`.
        deterministic, return_lse, backend: As there.

    Returns:
        ``out [T, H, D]``, or ``(out, lse [H, T])``, of the rank's own queries.

    Raises:
        TypeError, ValueError, RuntimeError: As there.
    """
    checks.check_qkv(query, key, value, packed=True)
    checks.check_scores(scores, key, packed=True)
    real = None if key_mask is None else key_mask[None]
    checks.check_selection_arguments(
        scores[None], window_size, "causal", ("causal",), real, None, keep_first, keep_recent
    )
    window = (window_size, keep_first, keep_recent)
    ranks, offsets = _along(mesh, query[None], key[None], key_mask, window, shard_lengths)
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, offsets[-1], query.device)
    packing = Packing(cu_seqlens, offsets)
    length = len(key)
    joined = _with_survivors(
        ranks, offsets, packing, window, key[None], value[None], scores[None], real
    )
    key, value, scores = (whole[0] for whole in joined[:3])
    real = None if joined[3] is None else joined[3][0]
    borders = packing.local_borders(ranks.rank, len(key) - length)
    selection = select_keys(
        scores,
        window_size,
        key_mask=real,
        cu_seqlens=borders[1],
        keep_first=keep_first,
        keep_recent=keep_recent,
    )
    return flash_sparse_attn_varlen_func(
        query,
        key,
        value,
        *borders,
        length,
        len(key),
        softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        attn_mask=selection,
        attn_bias=scores,
        return_lse=return_lse,
        backend=backend,
    )


def token_positions(
    hidden_states: Tensor,
    mesh: Mesh,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shard_lengths: Sequence[int] | None = None,
) -> Tensor:
    """The number of real tokens before each token of a rank, in its whole text.

    Args:
        hidden_states: ``[B, S, ...]``, the rank's own stretch; packed ``[T, ...]``.
        mesh, key_mask, cu_seqlens, shard_lengths: As in `context_parallel_attn_func`. A mask costs
            an exchange of its counts.

    Returns:
        int64 ``[B, S]`` or ``[1, S]``; packed ``[T]``.
    """
    ranks = Ranks.of(mesh)
    length = hidden_states.shape[0 if cu_seqlens is not None else 1]
    begin = _offsets(ranks, length, shard_lengths)[ranks.rank]
    index = torch.arange(begin, begin + length, device=hidden_states.device)
    if cu_seqlens is not None:
        borders = cu_seqlens.long()
        return index - borders[torch.searchsorted(borders, index, right=True) - 1]
    if key_mask is None:
        return index[None]
    before = ranks.gather(key_mask.sum(-1))[: ranks.rank].sum(0)
    return (before[:, None] + key_mask.cumsum(-1) - 1).clamp(min=0)


def _offsets(ranks: Ranks, length: int, shard_lengths: Sequence[int] | None) -> tuple[int, ...]:
    """The first token of each rank, and the end of the last."""
    lengths = [length] * ranks.size if shard_lengths is None else list(shard_lengths)
    if len(lengths) != ranks.size or lengths[ranks.rank] != length:
        raise ValueError(
            f"shard_lengths: expected the tokens of each of {ranks.size} ranks, and {length} for "
            f"rank {ranks.rank}, got {lengths}"
        )
    return tuple(accumulate(lengths, initial=0))


def _along(
    mesh: Mesh,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    window: tuple[int, int, int],
    shard_lengths: Sequence[int] | None,
) -> tuple[Ranks, tuple[int, ...]]:
    """The ranks of a call, and their `_offsets`."""
    ranks = Ranks.of(mesh)
    batch, length, heads, dim = key.shape
    if query.shape[1] != length:
        raise ValueError(
            f"query: expected as many tokens as key, {length}, got {query.shape[1]}; a rank holds "
            "the queries, keys and values of the same tokens"
        )
    offsets = _offsets(ranks, length, shard_lengths)
    if ranks.size > 1 and checks.looks_at_values(key):
        sizes = {
            f"shard_lengths[{rank}]": end - begin
            for rank, (begin, end) in enumerate(pairwise(offsets))
        }
        sizes |= {"batch size": batch, "KV heads": heads, "head dimension": dim}
        sizes |= dict(zip(("window_size", "keep_first", "keep_recent"), window, strict=True))
        sizes |= {"key_mask": key_mask is not None, "bytes of a key": dim * key.element_size()}
        ranks.check_agreement(key.device, **sizes)
    return ranks, offsets


def _with_survivors(
    ranks: Ranks,
    offsets: tuple[int, ...],
    packing: Packing | None,
    window: tuple[int, int, int],
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Key, value, scores and mask of a rank behind the survivors of earlier ranks.

    Selecting from these keys gives every query of the rank what selecting from the whole text does:
    the order of keys is that of the text, and a key that is not there has lost to W others that
    are.
    """
    rule = Rule.of(*window, num_before=offsets[-2])
    if ranks.size == 1 or rule.capacity == 0:
        return key, value, scores, key_mask
    real = key_mask
    if real is None:
        real = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    later = real if packing is None else real & packing.open_tokens(ranks.rank)
    scan = Scan(ranks, rule, RowFormat.of(key, scores), packing)
    key, value, scores, is_survivor = _Join.apply(scan, key, value, scores, later)
    if is_survivor is None:
        return key, value, scores, key_mask
    is_full = key_mask is None and packing is None and offsets[ranks.rank] >= rule.capacity
    return key, value, scores, None if is_full else torch.cat([is_survivor, real], dim=1)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan, key, value, scores, later):  # type: ignore[no-untyped-def]
        batch, length, heads, dim = key.shape
        capacity = scan.rule.capacity
        picked = scan.rule.pick(scores, later)  # [B, Hkv, C]
        at = _at(picked)
        is_real = later.gather(1, picked[:, 0])
        own = scan.form.pack(key[at], value[at], scores.gather(2, picked), is_real)
        own = F.pad(own, (0, 0, capacity - own.shape[2], 0))
        ctx.scan = scan
        ctx.save_for_backward(picked)

        if scan.ranks.rank == 0:
            scan.survivors(own, lambda: None)
            return key, value, scores, None
        whole = [
            key.new_empty(batch, capacity + length, heads, dim),
            value.new_empty(batch, capacity + length, heads, dim),
            scores.new_empty(batch, heads, capacity + length),
        ]

        def copy_own() -> None:
            whole[0][:, capacity:] = key
            whole[1][:, capacity:] = value
            whole[2][..., capacity:] = scores

        rows = scan.survivors(own, copy_own)
        form, is_survivor = scan.form, scan.form.real(rows)
        whole[0][:, :capacity] = form.key(rows).transpose(1, 2)
        whole[1][:, :capacity] = form.value(rows).transpose(1, 2)
        whole[2][..., :capacity] = form.score(rows)
        ctx.mark_non_differentiable(is_survivor)
        return *whole, is_survivor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_key, grad_value, grad_scores, _):  # type: ignore[no-untyped-def]
        scan, (picked,) = ctx.scan, ctx.saved_tensors
        capacity, dim = scan.rule.capacity, scan.form.head_dim
        before = 0 if scan.ranks.rank == 0 else capacity
        dtype = torch.promote_types(scan.form.dtype, torch.float32)
        parts = [
            grad_key[:, :before].transpose(1, 2),
            grad_value[:, :before].transpose(1, 2),
            grad_scores[..., :before, None],
        ]
        grad = torch.cat([part.to(dtype) for part in parts], dim=-1)  # [B, Hkv, C, 2 D + 1]
        grad = F.pad(grad, (0, 0, 0, capacity - before))
        grads = []

        def copy_own() -> None:
            grads.append(grad_key[:, before:].clone())
            grads.append(grad_value[:, before:].clone())
            grads.append(grad_scores[..., before:].clone())

        returned = scan.send_back(grad, copy_own)
        # The own set was filled up in front to its full size.
        returned = returned[:, :, capacity - picked.shape[2] :].split([dim, dim, 1], dim=-1)
        for rows, more in zip(grads[:2], returned, strict=False):
            rows[_at(picked)] = (rows[_at(picked)] + more).to(rows.dtype)
        total = grads[2].gather(2, picked) + returned[2][..., 0]
        grads[2].scatter_(2, picked, total.to(grads[2].dtype))
        return None, *grads, None


def _at(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What takes keys ``index [B, Hkv, C]`` out of ``[B, S, Hkv, D]``, as ``[B, Hkv, C, D]``."""
    batch, heads, _ = index.shape
    entry = torch.arange(batch, device=index.device)[:, None, None]
    return entry, index, torch.arange(heads, device=index.device)[:, None]
