"""Between padded batches ``[B, S, ...]`` and packed tokens ``[T, ...]``.

Packed tokens stand in batch order, then sequence order; sequence ``b`` is the slice
``cu_seqlens[b] : cu_seqlens[b + 1]``. Packing needs the number of real tokens on the host, which
costs one synchronisation on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    Args:
        tensor: ``[N, ...]``.
        indices: Integer ``[T]``.

    Returns:
        ``[T, ...]``, differentiable.
    """
    return tensor.index_select(0, indices)


def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the real tokens of a padded batch stand.

    Args:
        attention_mask: Bool or integer ``[B, S]``; nonzero = real token.

    Returns:
        ``indices``, int64 ``[T]`` into the flattened batch; ``cu_seqlens``, int32 ``[B + 1]``; and
        ``max_seqlen``, the length of the longest sequence.
    """
    _check_padding_mask("attention_mask", attention_mask, attention_mask)
    real = attention_mask != 0
    lengths = real.sum(dim=-1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    return real.flatten().nonzero().flatten(), cu_seqlens, max_seqlen


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack a padded batch.

    Args:
        hidden_states: ``[B, S, ...]``.
        attention_mask: Bool or integer ``[B, S]``; nonzero = real token.
        unused_mask: Bool or integer ``[B, S]``; nonzero = pack this place too, though it holds no
            token yet.

    Returns:
        ``packed [T, ...]``; ``indices``, ``cu_seqlens`` and ``max_seqlen`` as `get_unpad_data`; and
        ``used_lengths``, int32 ``[B]``, the real tokens of each sequence (unused places left out).
    """
    _check_padding_mask("attention_mask", attention_mask, hidden_states)
    packed_mask = attention_mask != 0
    used_lengths = packed_mask.sum(dim=-1, dtype=torch.int32)
    if unused_mask is not None:
        _check_padding_mask("unused_mask", unused_mask, hidden_states)
        packed_mask = packed_mask | (unused_mask != 0)
    indices, cu_seqlens, max_seqlen = get_unpad_data(packed_mask)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, max_seqlen, used_lengths


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`.

    Args:
        hidden_states: ``[T, ...]``.
        indices: int64 ``[T]``, as `unpad_input` returned them.
        batch: B.
        seqlen: S.

    Returns:
        ``[B, S, ...]``, zero where nothing was packed.
    """
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def upad_input(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    query_length: int,
    unpad_input_func: Callable[..., tuple] = unpad_input,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """Pack query, key and value for the varlen functions.

    Args:
        query: ``[B, query_length, H, D]``.
        key: ``[B, K, Hkv, D]``. Keys past the mask's length (a preallocated cache) are cut off.
        value: ``[B, K, Hkv, D]``.
        attention_mask: Bool or integer ``[B, S]`` over the keys, S <= K; nonzero = real token.
        query_length: S for whole sequences, 1 for a decoding step. Any other length means the last
            tokens; padding must then stand on the left.
        unpad_input_func: What packs the queries in that last case.

    Returns:
        ``query``, ``key``, ``value``, ``indices_q``, ``(cu_seqlens_q, cu_seqlens_k)`` and
        ``(max_seqlen_q, max_seqlen_k)``.

    Raises:
        ValueError: Mask, query and keys do not fit together.
    """
    indices_k, cu_seqlens_k, max_seqlen_k = get_unpad_data(attention_mask)
    batch, mask_len = attention_mask.shape
    if key.shape[0] != batch or key.shape[1] < mask_len:
        raise ValueError(
            f"attention_mask: expected [B, S] with B = {key.shape[0]} and S <= K = {key.shape[1]}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if query.shape[1] != query_length or not 1 <= query_length <= mask_len:
        raise ValueError(
            f"query_length: expected the length of query, {query.shape[1]}, from 1 to the length "
            f"of attention_mask, {mask_len}, got {query_length}"
        )
    key = index_first_axis(key[:, :mask_len].flatten(0, 1), indices_k)
    value = index_first_axis(value[:, :mask_len].flatten(0, 1), indices_k)
    if query_length == mask_len:
        query = index_first_axis(query.flatten(0, 1), indices_k)
        indices_q, cu_seqlens_q, max_seqlen_q = indices_k, cu_seqlens_k, max_seqlen_k
    elif query_length == 1:
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        indices_q, max_seqlen_q = cu_seqlens_q[:-1].long(), 1
        query = query.squeeze(1)
    else:
        query, indices_q, cu_seqlens_q, max_seqlen_q, *_ = unpad_input_func(
            query, attention_mask[:, -query_length:]
        )
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return query, key, value, indices_q, cu_seqlens, max_seqlens


def _check_padding_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.dim() != 2 or mask.is_floating_point() or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected a boolean or integer [B, S] = {tuple(hidden_states.shape[:2])}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
