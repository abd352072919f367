"""The epochs of an eager call: which keys each needs, and the tensors cut to them.

``R`` stands for the ``B * Hkv`` rows of keys, ``E`` for the epochs of a tile, ``G`` for the query
heads of a KV head, ``L`` for the queries of an epoch and ``P`` for its key slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..intervals import NEVER, KeySelection, visible_to
from ..problem import Problem

# Measured at N 16384, W 256, D 64, fp32 on two cores, forward + backward: 2**18 scores in a tile
# 316 ms, 2**19 301 ms, 2**20 282 ms, 2**21 295 ms; epochs of 32, 48, 64, 80 queries 392, 355, 301
# and 369 ms.
_SCORES_PER_TILE = 1 << 20
_MIN_EPOCH, _MAX_EPOCH = 64, 512


@dataclass(frozen=True)
class Tile:
    """Consecutive epochs of equal length with the keys they need."""

    begin: int  # first query
    epochs: int  # E
    length: int  # L
    keys: Tensor  # [R or 1, E, P] key index, 0 where unused
    used: Tensor  # [R or 1, E, P] bool


class Walk:
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
        self.device = query.device
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
        rows[:-1].view(tensor.transpose(1, 2).shape).copy_(tensor.transpose(1, 2))
        return rows

    # Tiles

    def tiles(self) -> Iterator[Tile]:
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
            keys = torch.arange(max(end, 0), device=self.device)
            if self.mask is not None:
                rows = slice(begin, begin + size) if self.mask.shape[2] > 1 else slice(0, 1)
                seen = self.mask[:, :, rows].any(dim=2).any(dim=1).any(dim=0)
                keys = keys[seen.expand(problem.key_len)[: keys.numel()]]
            if keys.numel():
                keys = keys.view(1, 1, -1)
                tile = Tile(begin, 1, size, keys, torch.ones_like(keys, dtype=torch.bool))
                yield replace(tile, used=self._seen(tile))

    def _seen(self, tile: Tile) -> Tensor:
        """The slots that a query of the tile sees, ``[R or 1, E, P]``; others are not read."""
        if (
            isinstance(self.mask, KeySelection)
            and self.bias is not None
            and self.bias.shape[2] == 1
        ):
            # A query sees each of its slots in use, and all queries have the same bias.
            visible = self._by_head(tile.used)[:, :, :, None, None]
        else:
            visible = self._visible(tile)
        if self.bias is not None:
            visible = visible & (self._spread(self.bias, tile) != -torch.inf)
        seen = visible.any(dim=4).any(dim=3)
        if seen.shape[0] * seen.shape[1] > 1:
            seen = seen.expand(self.problem.batch, self.problem.num_kv_heads, -1, -1)
        return seen.flatten(0, 1)

    def _selection_tiles(self, selection: KeySelection) -> Iterator[Tile]:
        problem = self.problem
        length = max(_MIN_EPOCH, min(_MAX_EPOCH, selection.window_size // 4))
        length = min(length, problem.query_len)
        index = torch.arange(problem.key_len, device=self.device)
        enter = selection.start.reshape(self.rows_count, -1).long()
        leave = selection.expiry.reshape(self.rows_count, -1).long()
        leave = torch.where(leave > enter, leave, -NEVER)
        if problem.is_causal:
            enter = torch.maximum(enter, index)
        else:  # visible from the beginning, also to the negative positions of Q > K
            enter = torch.where(enter == 0, -NEVER, enter)
        shift = problem.key_len - problem.query_len
        full = problem.query_len // length
        survivors = Survivors(enter, leave, shift, length, -(-problem.query_len // length))

        capacity = selection.capacity
        for epochs, size in _tile_sizes(
            problem, length, full, capacity, self.rows_count * self.group
        ):
            begin = epochs.start * length
            # Without a bound from shapes the width follows the past: what is alive at the epoch.
            width = survivors.most(epochs) if capacity is None else capacity
            width = min(-(-max(width, 1) // _MIN_EPOCH) * _MIN_EPOCH, problem.key_len)
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
            tile = Tile(begin, len(epochs), size, torch.where(used, keys, 0), used)
            yield tile if self.bias is None else replace(tile, used=self._seen(tile))

    # Tensors cut to a tile

    def queries(self, tensor: Tensor, tile: Tile) -> Tensor:
        """``[B, Q, H, D]`` to ``[R, E, G * L, D]``."""
        problem = self.problem
        rows = tensor[:, tile.begin : tile.begin + tile.epochs * tile.length].to(self.dtype)
        rows = rows.reshape(
            problem.batch, tile.epochs, tile.length, problem.num_kv_heads, self.group, -1
        )
        return rows.permute(0, 3, 1, 4, 2, 5).reshape(
            self.rows_count, tile.epochs, self.group * tile.length, problem.head_dim
        )

    def put_queries(self, target: Tensor, tile: Tile, part: Tensor) -> None:
        """The inverse of `queries`, into the rows of the tile."""
        problem = self.problem
        part = part.view(
            problem.batch, problem.num_kv_heads, tile.epochs, self.group, tile.length, -1
        ).permute(0, 2, 4, 1, 3, 5)
        rows = target[:, tile.begin : tile.begin + tile.epochs * tile.length]
        rows.unflatten(1, (tile.epochs, tile.length)).unflatten(3, (-1, self.group)).copy_(part)

    def rows(self, tensor: Tensor, tile: Tile) -> Tensor:
        """``[B, H, Q]`` to ``[R, E, G * L, 1]``."""
        part = tensor[:, :, tile.begin : tile.begin + tile.epochs * tile.length]
        part = part.reshape(self.rows_count, self.group, tile.epochs, tile.length)
        return part.transpose(1, 2).reshape(self.rows_count, tile.epochs, -1, 1)

    def put_rows(self, target: Tensor, tile: Tile, part: Tensor) -> None:
        """The inverse of `rows`."""
        part = part.view(self.rows_count, tile.epochs, self.group, tile.length).transpose(1, 2)
        rows = target[:, :, tile.begin : tile.begin + tile.epochs * tile.length]
        rows.copy_(part.reshape(rows.shape))

    def slots(self, tile: Tile) -> Tensor:
        """Row of every slot in `key_rows`, ``[R, E, P]``."""
        return torch.where(tile.used, tile.keys + self.row_offset, self.key_rows.shape[0] - 1)

    def keys(self, tile: Tile) -> Tensor:
        """``[R, E, P, D]``."""
        return self._gather(self.key_rows, tile)

    def values(self, tile: Tile) -> Tensor:
        """``[R, E, P, D]``."""
        return self._gather(self.value_rows, tile)

    def _gather(self, rows: Tensor, tile: Tile) -> Tensor:
        slots = self.slots(tile)
        return rows.index_select(0, slots.flatten()).view(*slots.shape, rows.shape[1])

    def add_keys(self, target: Tensor, tile: Tile, part: Tensor) -> None:
        """Add ``[R, E, P, D]`` to the rows of the keys; unused slots add to the spare row."""
        target.index_add_(0, self.slots(tile).flatten(), part.flatten(0, 2))

    def key_gradient(self, rows: Tensor, like: Tensor) -> Tensor:
        """``[R * K + 1, D]`` back to ``[B, K, Hkv, D]``."""
        batch, key_len, kv_heads, _ = like.shape
        return (
            rows[:-1].view(batch, kv_heads, key_len, rows.shape[1]).transpose(1, 2).to(like.dtype)
        )

    # Scores

    def scores(
        self, tile: Tile, queries: Tensor, keys: Tensor, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores ``[R, E, G * L, P]``, -inf where hidden; and the slope of the softcap if on."""
        problem = self.problem
        scores = torch.matmul(queries, keys.mT)
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

    def _visible(self, tile: Tile) -> Tensor:
        """Bool, broadcastable to ``[B, Hkv, E, G, L, P]``."""
        problem = self.problem
        keys = self._by_head(tile.keys)
        position = torch.arange(tile.epochs * tile.length, device=keys.device)
        position = (position + tile.begin + problem.key_len - problem.query_len).view(
            tile.epochs, 1, tile.length, 1
        )
        if isinstance(self.mask, KeySelection):
            start = self.mask.start.gather(2, keys.flatten(2)).view(keys.shape)
            expiry = self.mask.expiry.gather(2, keys.flatten(2)).view(keys.shape)
            expiry = torch.where(self._by_head(tile.used), expiry, 0)  # nobody sees an unused slot
            return visible_to(
                position,
                start[:, :, :, None, None],
                expiry[:, :, :, None, None],
                keys[:, :, :, None, None],
                problem.is_causal,
            )
        visible = self._by_head(tile.used)[:, :, :, None, None]
        if problem.is_causal:
            visible = visible & (keys[:, :, :, None, None] <= position)
        return visible if self.mask is None else visible & self._spread(self.mask, tile)

    def _by_head(self, slots: Tensor) -> Tensor:
        """``[R or 1, E, P]`` to ``[B or 1, Hkv or 1, E, P]``."""
        kv_heads = self.problem.num_kv_heads if slots.shape[0] > 1 else 1
        return slots.unflatten(0, (-1, kv_heads))

    def _offsets(self, shape: torch.Size, strides: tuple[int, ...], tile: Tile) -> Tensor:
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
            offset = offset + self._by_head(tile.keys)[:, :, :, None, None] * strides[3]
        return offset

    def _spread(self, tensor: Tensor, tile: Tile) -> Tensor:
        """A mask or bias cut to the tile, broadcastable to ``[B, Hkv, E, G, L, P]``.

        Read through its strides: an expanded tensor is never copied.
        """
        strides = tensor.stride()
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)
        )
        storage = tensor.detach().as_strided((span,), (1,))
        return storage[self._offsets(tensor.shape, strides, tile)]

    def add_bias(self, target: Tensor, tile: Tile, grad_scores: Tensor) -> None:
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


class Survivors:
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
        self.begin = (self.counts.flatten().cumsum(0) - self.counts.flatten()).view(
            rows, num_epochs
        )

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
