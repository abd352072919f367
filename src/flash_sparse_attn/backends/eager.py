"""Attention in plain PyTorch at O(N W) cost, on any device and in any float dtype, with gradients.

Queries are cut into epochs of ``L`` consecutive positions. An epoch needs the keys that are visible
at its first position (the survivors, at most ``W``) and those that enter during it (at most ``L``).
Their rows are gathered, and an epoch becomes one small dense attention under a mask. A bool mask
gives an epoch the columns that any of its rows sees. The backward pass recomputes the scores of an
epoch, so that memory stays O(N).

``R`` stands for the ``B * Hkv`` rows of keys, ``E`` for the epochs of a tile, ``G`` for the query
heads of a KV head, ``L`` for the queries of an epoch and ``P`` for its key slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..problem import Problem
from ..selection import NEVER, KeySelection, visible_to

# A tile's scores stay in the processor's cache: measured on 2 cores at N 16384, W 256.
_SCORES_PER_TILE = 1 << 18
_MIN_EPOCH, _MAX_EPOCH = 64, 512


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine: it always can."""
    return []


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call: it runs every checked call."""
    return []


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``; packed calls as one batch entry."""
    if problem.packed is None:
        return _Attention.apply(problem, mask, query, key, value, bias)
    outs, lses = [query[:, :0]], [query.new_empty(1, problem.num_heads, 0, dtype=_lse_dtype(query))]
    for q0, q1, k0, k1 in problem.packed.ranges():
        part = replace(problem, packed=None, query_len=q1 - q0, key_len=k1 - k0)
        out, lse = _Attention.apply(
            part,
            _cut_mask(mask, k0, k1),
            query[:, q0:q1],
            key[:, k0:k1],
            value[:, k0:k1],
            None if bias is None else bias[..., k0:k1],
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _cut_mask(
    mask: Tensor | KeySelection | None, begin: int, end: int
) -> Tensor | KeySelection | None:
    if isinstance(mask, KeySelection):
        return replace(
            mask,
            start=mask.start[None, :, begin:end],
            expiry=mask.expiry[None, :, begin:end],
            score=mask.score[None, :, begin:end],
            key_mask=None,
            cu_seqlens=None,
        )
    return None if mask is None else mask[..., begin:end]


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, mask, query, key, value, bias):  # type: ignore[no-untyped-def]
        walk = _Walk(problem, mask, query, key, value, bias)
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = torch.full(
            (problem.batch, problem.num_heads, problem.query_len),
            -torch.inf,
            dtype=walk.dtype,
            device=query.device,
        )
        for tile in walk.tiles():
            probs, _ = walk.scores(tile)
            peak = probs.amax(dim=-1, keepdim=True)
            peak = torch.where(peak == -torch.inf, 0.0, peak)
            probs.sub_(peak).exp_()
            total = probs.sum(dim=-1, keepdim=True)
            part = torch.matmul(probs, walk.values(tile)) / torch.where(total == 0, 1.0, total)
            walk.put_queries(out, tile, part)
            walk.put_rows(lse, tile, peak + total.log())
        walk.check_rows(lse)
        ctx.problem, ctx.mask = problem, mask
        ctx.save_for_backward(query, key, value, bias, out, lse)
        lse = lse.to(_lse_dtype(query))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):  # type: ignore[no-untyped-def]
        problem, mask = ctx.problem, ctx.mask
        query, key, value, bias, out, lse = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_bias = ctx.needs_input_grad[2:]
        needs_scores = needs_query or needs_key or needs_bias
        walk = _Walk(problem, mask, query, key, value, bias)
        grad_query = torch.zeros_like(query) if needs_query else None
        grad_key = torch.zeros_like(walk.key_rows) if needs_key else None
        grad_value = torch.zeros_like(walk.value_rows) if needs_value else None
        grad_bias = None
        if needs_bias:
            grad_bias = torch.zeros(bias.numel(), dtype=walk.dtype, device=bias.device)
        # delta = rowsum(dO * O) = rowsum(P * dP)
        delta = torch.einsum("bqhd,bqhd->bhq", grad_out.to(walk.dtype), out.to(walk.dtype))
        hidden = lse == -torch.inf
        lse = torch.where(hidden, torch.inf, lse)  # exp(s - inf) = 0 in rows without a key

        with _repeatable(problem):
            for tile in walk.tiles():
                scores, slope = walk.scores(tile, with_slope=needs_query or needs_key)
                probs = scores.sub_(walk.rows(lse, tile)).exp_()
                grad = walk.queries(grad_out, tile)
                if grad_value is not None:
                    walk.add_keys(grad_value, tile, torch.matmul(probs.mT, grad))
                if not needs_scores:
                    continue
                grad_scores = torch.matmul(grad, walk.values(tile).mT)
                grad_scores.sub_(walk.rows(delta, tile)).mul_(probs)
                if grad_bias is not None:
                    walk.add_bias(grad_bias, tile, grad_scores)
                if not (needs_query or needs_key):
                    continue
                grad_scores.mul_(problem.softmax_scale if slope is None else slope.mul_(problem.softmax_scale))
                if grad_query is not None:
                    walk.put_queries(grad_query, tile, torch.matmul(grad_scores, walk.keys(tile)))
                if grad_key is not None:
                    walk.add_keys(grad_key, tile, torch.matmul(grad_scores.mT, walk.queries(query, tile)))

        return (
            None,
            None,
            grad_query,
            None if grad_key is None else walk.key_gradient(grad_key, key),
            None if grad_value is None else walk.key_gradient(grad_value, value),
            None if grad_bias is None else grad_bias.view(bias.shape).to(bias.dtype),
        )


@contextmanager
def _repeatable(problem: Problem) -> Iterator[None]:
    """Ordered sums also on GPUs, where indexed additions are atomic unless this is asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if problem.deterministic and not before:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class _Tile:
    """Consecutive epochs of equal length with the keys they need."""

    begin: int  # first query
    epochs: int  # E
    length: int  # L
    keys: Tensor  # [R or 1, E, P] key index, 0 where unused
    used: Tensor  # [R or 1, E, P] bool


class _Walk:
    """The tiles of one call, and the tensors cut to them."""

    def __init__(
        self,
        problem: Problem,
        mask: Tensor | KeySelection | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
    ):
        self.problem, self.mask, self.bias = problem, mask, bias
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query = query
        self.group = problem.num_heads // problem.num_kv_heads
        self.rows_count = problem.batch * problem.num_kv_heads
        self.key_rows = self._with_zero_row(key)
        self.value_rows = self._with_zero_row(value)
        self.row_offset = (
            torch.arange(self.rows_count, device=query.device) * problem.key_len
        ).view(-1, 1, 1)

    def _with_zero_row(self, tensor: Tensor) -> Tensor:
        """``[B, K, Hkv, D]`` to ``[R * K + 1, D]``; unused slots read the last row, all zeros."""
        rows = tensor.new_zeros(
            self.rows_count * self.problem.key_len + 1, self.problem.head_dim, dtype=self.dtype
        )
        rows[:-1].view(tensor.transpose(1, 2).shape).copy_(
            tensor.transpose(1, 2)
        )
        return rows

    # Tiles

    def tiles(self) -> Iterator[_Tile]:
        """All queries, tile by tile. Slot lists and their shapes depend on the past only."""
        problem = self.problem
        if not (problem.query_len and problem.key_len and self.rows_count):
            return
        if isinstance(self.mask, KeySelection):
            yield from self._selection_tiles(self.mask)
            return
        length = _MIN_EPOCH
        for begin in range(0, problem.query_len, length):
            size = min(length, problem.query_len - begin)
            end = problem.key_len
            if problem.is_causal:
                end = min(end, begin + size + problem.key_len - problem.query_len)
            keys = torch.arange(max(end, 0), device=self.query.device)
            if self.mask is not None:
                rows = slice(begin, begin + size) if self.mask.shape[2] > 1 else slice(0, 1)
                seen = self.mask[:, :, rows].any(dim=2).any(dim=1).any(dim=0)
                keys = keys[seen.expand(problem.key_len)[: keys.numel()]]
            if keys.numel():
                keys = keys.view(1, 1, -1)
                yield _Tile(begin, 1, size, keys, torch.ones_like(keys, dtype=torch.bool))

    def _selection_tiles(self, selection: KeySelection) -> Iterator[_Tile]:
        problem = self.problem
        length = max(_MIN_EPOCH, min(_MAX_EPOCH, selection.window_size // 2))
        length = min(length, problem.query_len)
        index = torch.arange(problem.key_len, device=self.query.device)
        enter = selection.start.reshape(self.rows_count, -1).long()
        leave = selection.expiry.reshape(self.rows_count, -1).long()
        leave = torch.where(leave > enter, leave, -NEVER)
        if problem.is_causal:
            enter = torch.maximum(enter, index)
        else:  # visible from the beginning, also to the negative positions of Q > K
            enter = torch.where(enter == 0, -NEVER, enter)
        shift = problem.key_len - problem.query_len
        full = problem.query_len // length
        survivors = _Survivors(enter, leave, shift, length, -(-problem.query_len // length))

        capacity = selection.capacity
        for epochs, size in _tile_sizes(problem, length, full, capacity, self.rows_count * self.group):
            begin = epochs.start * length
            # Without a bound from shapes the width follows the past: what is alive at the epoch.
            width = survivors.most(epochs) if capacity is None else capacity
            width = min(-(-width // _MIN_EPOCH) * _MIN_EPOCH, problem.key_len)
            old = survivors.table(epochs, width)
            position = torch.arange(epochs.start, epochs.stop, device=index.device) * length + shift
            new = position[:, None] + torch.arange(1, size, device=index.device)
            inside = (new >= 0) & (new < problem.key_len)
            new = torch.where(inside, new, 0).expand(self.rows_count, -1, -1)
            entering = enter.gather(1, new.flatten(1)).view(new.shape) == new
            entering &= leave.gather(1, new.flatten(1)).view(new.shape) > new
            entering &= inside & (new > position[:, None])
            keys = torch.cat([old.clamp(min=0), new], dim=-1)
            used = torch.cat([old >= 0, entering], dim=-1)
            yield _Tile(begin, len(epochs), size, torch.where(used, keys, 0), used)

    # Tensors cut to a tile

    def queries(self, tensor: Tensor, tile: _Tile) -> Tensor:
        """``[B, Q, H, D]`` to ``[R, E, G * L, D]``."""
        problem = self.problem
        rows = tensor[:, tile.begin : tile.begin + tile.epochs * tile.length].to(self.dtype)
        rows = rows.reshape(
            problem.batch, tile.epochs, tile.length, problem.num_kv_heads, self.group, -1
        )
        return rows.permute(0, 3, 1, 4, 2, 5).reshape(
            self.rows_count, tile.epochs, self.group * tile.length, problem.head_dim
        )

    def put_queries(self, target: Tensor, tile: _Tile, part: Tensor) -> None:
        """The inverse of `queries`, into the rows of the tile."""
        problem = self.problem
        part = part.view(
            problem.batch, problem.num_kv_heads, tile.epochs, self.group, tile.length, -1
        ).permute(0, 2, 4, 1, 3, 5)
        rows = target[:, tile.begin : tile.begin + tile.epochs * tile.length]
        rows.unflatten(1, (tile.epochs, tile.length)).unflatten(3, (-1, self.group)).copy_(part)

    def rows(self, tensor: Tensor, tile: _Tile) -> Tensor:
        """``[B, H, Q]`` to ``[R, E, G * L, 1]``."""
        part = tensor[:, :, tile.begin : tile.begin + tile.epochs * tile.length]
        part = part.reshape(self.rows_count, self.group, tile.epochs, tile.length)
        return part.transpose(1, 2).reshape(self.rows_count, tile.epochs, -1, 1)

    def put_rows(self, target: Tensor, tile: _Tile, part: Tensor) -> None:
        """The inverse of `rows`."""
        part = part.view(self.rows_count, tile.epochs, self.group, tile.length).transpose(1, 2)
        rows = target[:, :, tile.begin : tile.begin + tile.epochs * tile.length]
        rows.copy_(part.reshape(rows.shape))

    def slots(self, tile: _Tile) -> Tensor:
        """Row of every slot in `key_rows`, ``[R, E, P]``."""
        return torch.where(tile.used, tile.keys + self.row_offset, self.key_rows.shape[0] - 1)

    def keys(self, tile: _Tile) -> Tensor:
        """``[R, E, P, D]``."""
        return self._gather(self.key_rows, tile)

    def values(self, tile: _Tile) -> Tensor:
        """``[R, E, P, D]``."""
        return self._gather(self.value_rows, tile)

    def _gather(self, rows: Tensor, tile: _Tile) -> Tensor:
        slots = self.slots(tile)
        return rows.index_select(0, slots.flatten()).view(*slots.shape, -1)

    def add_keys(self, target: Tensor, tile: _Tile, part: Tensor) -> None:
        """Add ``[R, E, P, D]`` to the rows of the keys; unused slots add to the spare row."""
        target.index_add_(0, self.slots(tile).flatten(), part.flatten(0, 2))

    def key_gradient(self, rows: Tensor, like: Tensor) -> Tensor:
        """``[R * K + 1, D]`` back to ``[B, K, Hkv, D]``."""
        batch, key_len, kv_heads, _ = like.shape
        return rows[:-1].view(batch, kv_heads, key_len, rows.shape[1]).transpose(1, 2).to(like.dtype)

    # Scores

    def scores(self, tile: _Tile, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """Scores ``[R, E, G * L, P]``, -inf where hidden; and the slope of the softcap if it is on."""
        problem = self.problem
        scores = torch.matmul(self.queries(self.query, tile), self.keys(tile).mT)
        scores.mul_(problem.softmax_scale)
        slope = None
        if problem.softcap:
            scores.div_(problem.softcap).tanh_()
            slope = 1.0 - scores.square() if with_slope else None
            scores.mul_(problem.softcap)
        grid = scores.view(
            problem.batch, problem.num_kv_heads, tile.epochs, self.group, tile.length, -1
        )
        visible = self._visible(tile)
        if self.bias is None:
            grid.masked_fill_(~visible, -torch.inf)
        else:
            bias = self._spread(self.bias, tile).to(self.dtype)
            grid.add_(torch.where(visible, bias, -torch.inf))
        return scores, slope

    def _visible(self, tile: _Tile) -> Tensor:
        """Bool, broadcastable to ``[B, Hkv, E, G, L, P]``."""
        problem = self.problem
        keys = tile.keys.unflatten(0, (-1, problem.num_kv_heads if tile.keys.shape[0] > 1 else 1))
        used = tile.used.view(keys.shape)[:, :, :, None, None]
        position = torch.arange(tile.epochs * tile.length, device=keys.device)
        position = (position + tile.begin + problem.key_len - problem.query_len).view(
            tile.epochs, 1, tile.length, 1
        )
        if isinstance(self.mask, KeySelection):
            start = self.mask.start.gather(2, keys.flatten(2)).view(keys.shape)
            expiry = self.mask.expiry.gather(2, keys.flatten(2)).view(keys.shape)
            visible = visible_to(
                position,
                start[:, :, :, None, None],
                expiry[:, :, :, None, None],
                keys[:, :, :, None, None],
                problem.is_causal,
            )
            return visible & used
        visible = used
        if problem.is_causal:
            visible = visible & (keys[:, :, :, None, None] <= position)
        return visible if self.mask is None else visible & self._spread(self.mask, tile)

    def _offsets(self, shape: torch.Size, strides: tuple[int, ...], tile: _Tile) -> Tensor:
        """Offsets of a 4-D tensor's elements, broadcastable to ``[B, Hkv, E, G, L, P]``."""
        problem = self.problem
        device = tile.keys.device
        heads = torch.arange(problem.num_heads, device=device) * shape[1] // problem.num_heads
        if shape[1] != problem.num_heads:  # one head for the whole group
            heads = heads[:: self.group]
        heads = heads.view(1, problem.num_kv_heads, 1, -1, 1, 1)
        offset = heads * strides[1]
        if shape[0] > 1:
            batch = torch.arange(problem.batch, device=device).view(-1, 1, 1, 1, 1, 1)
            offset = offset + batch * strides[0]
        if shape[2] > 1:
            rows = torch.arange(tile.epochs * tile.length, device=device) + tile.begin
            offset = offset + rows.view(tile.epochs, 1, tile.length, 1) * strides[2]
        if shape[3] > 1:
            kv_heads = problem.num_kv_heads if tile.keys.shape[0] > 1 else 1
            keys = tile.keys.unflatten(0, (-1, kv_heads))
            offset = offset + keys[:, :, :, None, None] * strides[3]
        return offset

    def _spread(self, tensor: Tensor, tile: _Tile) -> Tensor:
        """A mask or bias cut to the tile, broadcastable to ``[B, Hkv, E, G, L, P]``.

        Read through its strides: an expanded tensor is never copied.
        """
        strides = tensor.stride()
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        storage = tensor.detach().as_strided((span,), (1,))
        return storage[self._offsets(tensor.shape, strides, tile)]

    def add_bias(self, target: Tensor, tile: _Tile, grad_scores: Tensor) -> None:
        """Add the gradient of the scores to the flat, contiguous gradient of the bias."""
        problem = self.problem
        assert self.bias is not None
        grid = grad_scores.view(
            problem.batch, problem.num_kv_heads, tile.epochs, self.group, tile.length, -1
        )
        shape = self.bias.shape
        if shape[1] != problem.num_heads:
            grid = grid.sum(dim=3, keepdim=True)
        if shape[2] == 1:
            grid = grid.sum(dim=4, keepdim=True)
        if shape[3] == 1:
            grid = grid.sum(dim=5, keepdim=True)
        strides = torch.empty(shape, device="meta").stride()
        offsets = self._offsets(shape, strides, tile).expand(grid.shape)
        target.index_add_(0, offsets.flatten(), grid.flatten())

    def check_rows(self, lse: Tensor) -> None:
        """Blame a NaN or infinite row on the bias if a visible key has such a bias."""
        if self.bias is None or not checks.looks_at_values(lse):
            return
        if bool((lse.isnan() | (lse == torch.inf)).any()):
            for tile in self.tiles():
                checks.check_bias_values(self._spread(self.bias, tile), self._visible(tile))


def _tile_sizes(
    problem: Problem, length: int, full: int, capacity: int | None, rows: int
) -> Iterator[tuple[range, int]]:
    """Ranges of epochs with their length: as many full ones as fit the cache, then the rest."""
    together = 1
    if capacity is not None:
        together = max(1, _SCORES_PER_TILE // (rows * length * (capacity + length)))
    for begin in range(0, full, together):
        yield range(begin, min(begin + together, full)), length
    if rest := problem.query_len - full * length:
        yield range(full, full + 1), rest


class _Survivors:
    """The keys that are visible at the first position of each epoch, in the order of positions."""

    def __init__(self, enter: Tensor, leave: Tensor, shift: int, length: int, num_epochs: int):
        rows, key_len = enter.shape
        device = enter.device
        first = (-((shift - enter) // length)).clamp(min=0)  # ceil((enter - shift) / length)
        last = (-((shift - leave) // length) - 1).clamp(max=num_epochs - 1)
        times = (last - first + 1).clamp(min=0).flatten()
        # One entry for every epoch a key survives into: (row, epoch) and the key.
        entry = torch.repeat_interleave(torch.arange(rows * key_len, device=device), times)
        number = torch.arange(entry.numel(), device=device) - (times.cumsum(0) - times)[entry]
        place = entry // key_len * num_epochs + first.flatten()[entry] + number
        place, order = place.sort(stable=True)
        self.keys = entry[order] % key_len
        self.counts = torch.bincount(place, minlength=rows * num_epochs).view(rows, num_epochs)
        self.begin = (self.counts.flatten().cumsum(0) - self.counts.flatten()).view(rows, num_epochs)

    def most(self, epochs: range) -> int:
        """The largest number of survivors in any row of these epochs."""
        return int(self.counts[:, epochs.start : epochs.stop].max())

    def table(self, epochs: range, width: int) -> Tensor:
        """Key indices ``[R, E, width]``, -1 where unused."""
        slot = torch.arange(width, device=self.keys.device)
        begin = self.begin[:, epochs.start : epochs.stop, None]
        used = slot < self.counts[:, epochs.start : epochs.stop, None]
        if not self.keys.numel():
            return torch.full(used.shape, -1, device=slot.device)
        return torch.where(used, self.keys[torch.where(used, begin + slot, 0)], -1)
