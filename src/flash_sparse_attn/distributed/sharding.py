"""Attention of tensors that are sharded over a mesh: batches, heads, tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..dynamic_mask import dynamic_mask_attn_func
from .attention import context_parallel_attn_func

# The dimension of each tensor that has the batch, the tokens and the heads; None: it has none.
_DIMENSIONS: dict[str, tuple[int, int, int | None]] = {
    "query": (0, 1, 2),
    "key": (0, 1, 2),
    "value": (0, 1, 2),
    "scores": (0, 2, 1),
    "key_mask": (0, 1, None),
    "out": (0, 1, 2),
    "lse": (0, 2, 1),
}


def sharded_attn_func(
    query: DTensor,
    key: DTensor,
    value: DTensor,
    scores: DTensor,
    window_size: int,
    *,
    key_mask: DTensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`dynamic_mask_attn_func` of distributed tensors, each sharded as `query` is.

    A dimension of the mesh may shard the batch, the heads, or, one of them, the tokens, or
    replicate. Batches and heads need no exchange; sharded tokens are `context_parallel_attn_func`.
    Nothing is redistributed.

    Args:
        query: ``[B, S, H, D]``, placed by ``Shard(0)``, ``Shard(1)``, ``Shard(2)`` or
            ``Replicate()`` on each dimension of its mesh.
        key: ``[B, S, Hkv, D]``, placed as `query`; so KV heads are sharded with query heads.
        value: ``[B, S, Hkv, D]``.
        scores: ``[B, Hkv, S]``, placed accordingly.
        window_size: ``W``, the number of keys each query keeps.
        key_mask: Bool ``[B, S]``, placed accordingly; replicated where heads are sharded.
        return_lse: Also return ``lse [B, H, S]``.
        **options: Others of `dynamic_mask_attn_func`.

    Returns:
        ``out``, or ``(out, lse)``, placed as `query`.

    Raises:
        TypeError, ValueError: An argument does not fit or is placed otherwise.
    """
    tensors = {"query": query, "key": key, "value": value, "scores": scores}
    if key_mask is not None:
        tensors["key_mask"] = key_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: expected a DTensor, got {type(tensor).__name__}; use "
                "torch.distributed.tensor.distribute_tensor"
            )
    mesh = query.device_mesh
    for name, tensor in tensors.items():
        expected = _placements(name, query)
        if tensor.device_mesh != mesh or tuple(tensor.placements) != expected:
            raise ValueError(
                f"{name}: expected placements {expected} on {mesh} as query has them, got "
                f"{tuple(tensor.placements)} on {tensor.device_mesh}; use .redistribute()"
            )
    along = _token_dimension(query, key)
    local: dict[str, Any] = {name: tensor.to_local() for name, tensor in tensors.items()}
    local |= options | {"window_size": window_size, "return_lse": return_lse}
    if along is None:
        result = dynamic_mask_attn_func(**local)
    else:
        lengths = _chunks(query.shape[1], mesh.size(along))
        result = context_parallel_attn_func(
            **local, mesh=mesh.get_group(along), shard_lengths=lengths
        )
    if not return_lse:
        return _whole(result, "out", query, query.shape)
    batch, length, heads, _ = query.shape
    lse = _whole(result[1], "lse", query, torch.Size((batch, heads, length)))
    return _whole(result[0], "out", query, query.shape), lse


def _whole(local: Tensor, name: str, query: DTensor, shape: torch.Size) -> DTensor:
    """The distributed tensor of `shape` of which every rank has its part."""
    return DTensor.from_local(
        local,
        query.device_mesh,
        _placements(name, query),
        shape=shape,  # uneven parts do not tell it
        stride=torch.empty(shape, device="meta").stride(),
    )


def _placements(name: str, query: DTensor) -> tuple[Placement, ...]:
    """How a tensor is placed if the query is placed so."""
    placements: list[Placement] = []
    for placement in query.placements:
        if type(placement) is Shard and placement.dim in (0, 1, 2):
            dim = _DIMENSIONS[name][placement.dim]
            placements.append(Replicate() if dim is None else Shard(dim))
        elif isinstance(placement, Replicate):
            placements.append(placement)
        else:
            raise ValueError(
                "query: expected Shard(0), Shard(1), Shard(2) or Replicate() on each dimension of "
                f"the mesh, got {placement}; use .redistribute()"
            )
    return tuple(placements)


def _token_dimension(query: DTensor, key: DTensor) -> int | None:
    """The dimension of the mesh that shards the tokens, if one does."""
    along, parts = None, 1
    for number, placement in enumerate(query.placements):
        if placement == Shard(1):
            if along is not None:
                raise ValueError(
                    f"query: expected tokens sharded on one dimension of the mesh, got {along} and "
                    f"{number}; flatten the two into one"
                )
            along = number
        elif placement == Shard(2):
            parts *= query.device_mesh.size(number)
    if key.shape[2] % parts:
        raise ValueError(
            f"key: expected KV heads that divide among {parts} ranks, got {key.shape[2]}; shard "
            "the batch or the tokens instead"
        )
    return along


def _chunks(length: int, count: int) -> list[int]:
    """How many of `length` tokens each rank has: as many as the first, until there are no more."""
    most = -(-length // count)
    return [min(most, max(0, length - most * rank)) for rank in range(count)]
