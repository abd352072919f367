"""The keys of earlier ranks that a rank can still see: an exclusive scan of top-W sets.

A set has a fixed number of rows, so no size on the wire depends on data. The rows of a set are in
the order of the text, which is the order of ranks: positions need not travel, and a merge of sets
keeps the strict order of scores, in which the newer of equal keys wins.

Up to `FAN` ranks, every rank sends its own set to all later ones at once. More ranks take several
rounds, and the sets of a round cover `FAN` times as many ranks as those of the round before.
Gradients take the same ways back, and every rank adds what comes in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..intervals import order_key
from .ranks import Ranks

FAN = 8
_BEST, _WORST = (2**31 - 1) << 32, -(2**63)


@dataclass(frozen=True)
class Rule:
    """Which keys of a stretch of text a later query may see.

    Attributes:
        window_size, keep_first, keep_recent: As in `select_keys`.
        capacity: Rows of a set, ``C``: enough for all keys that the rule keeps.
    """

    window_size: int
    keep_first: int
    keep_recent: int
    capacity: int

    @classmethod
    def of(cls, window_size: int, keep_first: int, keep_recent: int, num_before: int) -> Rule:
        """The rule where a set never has to hold more than `num_before` keys."""
        kept = window_size + keep_first + keep_recent
        return cls(window_size, keep_first, keep_recent, min(kept, num_before))

    def pick(self, score: Tensor, real: Tensor) -> Tensor:
        """The keys that stay: the first, the most recent, and the best of the others.

        First and recent keys do not count among the best, so that every KV head keeps as many keys
        and one mask serves them all. What is kept beyond the rule has lost to ``W`` others of the
        set and is invisible.

        Args:
            score: ``[B, Hkv, L]``, keys in the order of the text.
            real: Bool ``[B, L]``, False for padding.

        Returns:
            Indices int64 ``[B, Hkv, min(C, L)]``, rising. Where there are fewer real keys, all of
            them, and the newest padding.
        """
        index = torch.arange(score.shape[-1], device=score.device)
        number = real.cumsum(-1)
        is_kept = (number <= self.keep_first) | (number > number[:, -1:] - self.keep_recent)
        rank = (order_key(score.to(torch.float32)).long() << 32) + index
        rank = torch.where(is_kept[:, None], _BEST + index, rank)
        rank = torch.where(real[:, None], rank, _WORST + index)
        best = rank.topk(min(self.capacity, len(index)), dim=-1, sorted=False)
        return best.indices.sort(dim=-1).values


@dataclass(frozen=True)
class RowFormat:
    """Keys with all that belongs to them as rows of int32 words: key, value, score, real or not.

    Attributes:
        head_dim: ``D``.
        dtype: Of keys and values.
        score_dtype: Of scores, fp32 or fp64.
    """

    head_dim: int
    dtype: torch.dtype
    score_dtype: torch.dtype

    @classmethod
    def of(cls, key: Tensor, score: Tensor) -> RowFormat:
        """The format that holds these exactly."""
        return cls(key.shape[-1], key.dtype, torch.promote_types(score.dtype, torch.float32))

    def pack(self, key: Tensor, value: Tensor, score: Tensor, real: Tensor) -> Tensor:
        """Rows ``[B, Hkv, C, R]``; those of padding are zero.

        Args:
            key, value: ``[B, Hkv, C, D]``.
            score: ``[B, Hkv, C]``.
            real: Bool ``[B, C]``.
        """
        is_real = real[:, None].expand(score.shape)
        marked = torch.stack([score.to(self.score_dtype), is_real.to(self.score_dtype)], dim=-1)
        parts = [torch.cat([key, value], dim=-1), marked]
        rows = torch.cat([part.view(torch.int32) for part in parts], dim=-1)
        return rows.masked_fill(~is_real[..., None], 0)

    def key(self, rows: Tensor) -> Tensor:
        """``[B, Hkv, C, D]``."""
        return self._pairs(rows)[..., : self.head_dim]

    def value(self, rows: Tensor) -> Tensor:
        """``[B, Hkv, C, D]``."""
        return self._pairs(rows)[..., self.head_dim :]

    def score(self, rows: Tensor) -> Tensor:
        """``[B, Hkv, C]``, 0 for padding."""
        return self._marked(rows)[..., 0]

    def real(self, rows: Tensor) -> Tensor:
        """Bool ``[B, C]``: the same for all KV heads."""
        return self._marked(rows[:, 0])[..., 1] > 0

    def _pairs(self, rows: Tensor) -> Tensor:
        return rows[..., : -2 * self._score_words].contiguous().view(self.dtype)

    def _marked(self, rows: Tensor) -> Tensor:
        return rows[..., -2 * self._score_words :].contiguous().view(self.score_dtype)

    @property
    def _score_words(self) -> int:
        return self.score_dtype.itemsize // 4


@dataclass(frozen=True)
class Packing:
    """Packed sequences along the ranks: only a sequence across a border needs what is before it.

    Attributes:
        borders: int32 ``[N + 1]``, borders of the sequences in the text of all ranks.
        offsets: The first token of every rank, and the end of the last.
    """

    borders: Tensor
    offsets: tuple[int, ...]

    def reaches_back(self, rank: int) -> Tensor:
        """First token of the sequence that lies across the beginning of a rank, int32 ``[]``.

        The beginning itself, if a sequence begins there.
        """
        begin = self.offsets[rank]
        return self.borders.masked_fill(self.borders > begin, 0).amax()

    def open_tokens(self, rank: int) -> Tensor:
        """Which tokens of a rank belong to the sequence that goes on behind it, bool ``[1, T]``."""
        begin, end = self.offsets[rank : rank + 2]
        index = torch.arange(begin, end, device=self.borders.device)
        return (index >= self.reaches_back(rank + 1))[None]

    def continues(self, source: int, rank: int) -> Tensor:
        """Whether `rank` begins in the sequence in which `source` ends, bool ``[]``."""
        return self.reaches_back(rank) < self.offsets[source + 1]

    def local_borders(self, rank: int, before: int) -> tuple[Tensor, Tensor]:
        """Borders of a rank's queries, and of its keys behind `before` keys of earlier ranks.

        All sequences are there, those elsewhere empty: which ones, only the device knows.
        """
        begin, end = self.offsets[rank : rank + 2]
        queries = (self.borders - begin).clamp(0, end - begin)
        keys = torch.where(self.borders > begin, queries + before, 0)
        keys[-1] = end - begin + before
        return queries, keys


@dataclass
class _Round:
    """One exchange, as the gradients have to undo it.

    Attributes:
        sources, targets: Ranks whose sets came, and ranks to which this one's went.
        picked: Indices ``[B, Hkv, C]`` of the survivors in the sets that came and, where
            `had_before`, the survivors so far. ``None`` if there is nothing before this rank.
        sent: Indices ``[B, Hkv, C]`` of what was sent in the survivors so far and the rank's own
            set, ``None`` if it was the own set alone.
        had_before: Whether there were survivors before this round.
    """

    sources: list[int]
    targets: list[int]
    had_before: bool = False
    picked: Tensor | None = None
    sent: Tensor | None = None


@dataclass
class Scan:
    """The exclusive scan of one call, and the way back of its gradients.

    Attributes:
        ranks: Who takes part.
        rule: What a set keeps.
        form: What a row holds.
        packing: Sequences, if there are several.
    """

    ranks: Ranks
    rule: Rule
    form: RowFormat
    packing: Packing | None
    _rounds: list[_Round] = field(default_factory=list)

    def survivors(self, own: Tensor, meanwhile: Callable[[], None]) -> Tensor | None:
        """The set of the keys before this rank, ``None`` on the first.

        Args:
            own: Rows ``[B, Hkv, C, R]`` of the keys of this rank that later ranks may see.
            meanwhile: Work to do while the first sets travel.
        """
        rank, size = self.ranks.rank, self.ranks.size
        before, stride = None, 1
        while stride < size:
            steps = range(stride, FAN * stride, stride)
            this = _Round(
                sources=[rank - step for step in reversed(steps) if rank >= step],
                targets=[rank + step for step in steps if rank + step < size],
                had_before=before is not None,
            )
            everything = own
            if before is not None:
                everything, this.sent = self._merge([self._going_on(before), own])
            table = everything.expand(len(this.targets), *own.shape)
            transfer = self.ranks.send(table, this.targets, this.sources)
            if stride == 1:
                meanwhile()
            received = transfer.wait()
            sets = [self._coming_from(*pair) for pair in zip(this.sources, received, strict=True)]
            if before is not None:
                sets.append(before)
            if sets:
                before, this.picked = self._merge(sets)
            self._rounds.append(this)
            stride *= FAN
        return before

    def send_back(self, grad: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """Gradients of the own set ``[B, Hkv, C, G]``, from all ranks that read it.

        Args:
            grad: fp32 or fp64 ``[B, Hkv, C, G]``, gradients of the survivors; zero on the first
                rank, which has none.
            meanwhile: Work to do while the first gradients travel.
        """
        own = torch.zeros_like(grad)
        for this in reversed(self._rounds):
            count = len(this.sources)
            parts = [grad]
            if this.picked is not None:
                parts = self._spread(grad, this.picked, count + this.had_before)
            table = torch.stack(parts[:count]) if count else grad.new_empty(0, *grad.shape)
            transfer = self.ranks.send(table, this.sources, this.targets)
            if this is self._rounds[-1]:
                meanwhile()
            sent = torch.zeros_like(grad)
            for part in transfer.wait():
                sent = sent + part
            if this.sent is None:
                own = own + sent
            else:
                to_before, to_own = self._spread(sent, this.sent, 2)
                own = own + to_own
                grad = parts[-1] + to_before
        return own

    def _merge(self, sets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The set of several, in the order of the text, and where each of its rows was."""
        rows = torch.cat(sets, dim=2)
        index = self.rule.pick(self.form.score(rows), self.form.real(rows))
        return rows.gather(2, _for_rows(index, rows)), index

    def _spread(self, grad: Tensor, index: Tensor, count: int) -> list[Tensor]:
        """The opposite of `_merge` for gradients: no two rows go to the same place."""
        batch, heads, rows, width = grad.shape
        whole = grad.new_zeros(batch, heads, count * rows, width)
        whole.scatter_(2, _for_rows(index, grad), grad)
        return list(whole.split(rows, dim=2))

    def _coming_from(self, source: int, rows: Tensor) -> Tensor:
        """A set that was sent here, empty if its sequence has ended since."""
        if self.packing is None:
            return rows
        return rows.masked_fill(~self.packing.continues(source, self.ranks.rank), 0)

    def _going_on(self, before: Tensor) -> Tensor:
        """Survivors of earlier ranks, empty if their sequence ends in this one."""
        if self.packing is None:
            return before
        reaches = self.packing.reaches_back(self.ranks.rank + 1)
        return before.masked_fill(reaches >= self.packing.offsets[self.ranks.rank], 0)


def _for_rows(index: Tensor, rows: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, rows.shape[-1])
