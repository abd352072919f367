"""Packed sequences: several texts behind one another, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Borders of packed queries and keys.

    Attributes:
        cu_seqlens_q: int32 ``[N + 1]``; the queries of sequence ``n`` are rows ``c[n] : c[n + 1]``.
        cu_seqlens_k: int32 ``[N + 1]``, the same for keys and values.
        max_seqlen_q: The length of the longest query sequence, a host int (it sizes launches).
        max_seqlen_k: The same for keys.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """``(first query, end, first key, end)`` of every sequence; copies to the host."""
        queries, keys = torch.stack([self.cu_seqlens_q, self.cu_seqlens_k]).tolist()
        return list(zip(queries, queries[1:], keys, keys[1:], strict=False))


_pytree.register_pytree_node(
    PackedSequences,
    lambda p: ([p.cu_seqlens_q, p.cu_seqlens_k], (p.max_seqlen_q, p.max_seqlen_k)),
    lambda children, context: PackedSequences(*children, *context),
    serialized_type_name="flash_sparse_attn.varlen.PackedSequences",
)
