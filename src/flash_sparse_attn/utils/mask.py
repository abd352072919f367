"""Dense boolean masks from a bias: the predecessors' functions, with settled meaning.

These build an explicit mask, O(query_len * key_len) as soon as it differs between queries. For a
score that depends on the key alone, `select_keys` makes the same choice in O(key_len) memory.

Equal biases: where every query has its own allowed keys (a 4-D mask with one row per query, such as
a causal one, or a single query), the newer key wins; where one choice is made for all queries, the
older one does, since the newer would leave the first causal rows without a key. Both as in
`select_keys`. NaN ranks last. `min_dtype` is the caller's mark for "masked": a key whose bias
equals it is never chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_sparse_attn.checks import check_count, check_tensor
from flash_sparse_attn.intervals import order_key

_NEVER_CHOSEN = torch.iinfo(torch.int32).min


def topk_indices(attention_bias: Tensor, window_size: int) -> Tensor:
    """Positions of the `window_size` largest biases of each row; the older position wins ties.

    Args:
        attention_bias: Float ``[B, Hkv, K]``; read detached, in fp32.
        window_size: Keys to keep, at least 1; more than K means all K.

    Returns:
        int64 ``[B, Hkv, min(window_size, K)]``, ascending.
    """
    check_count("window_size", window_size, 1)
    order = order_key(attention_bias.detach().float())
    best_first = order.argsort(dim=-1, descending=True, stable=True)
    return best_first[..., :window_size].sort(dim=-1).values


def topk_mask(
    attention_bias: Tensor,
    attention_mask: Tensor | None,
    window_size: int,
    min_dtype: float,
    block_size: int | None = None,
    *,
    newer_wins: bool = False,
) -> Tensor:
    """The `window_size` largest biases among the allowed keys of each row.

    Args:
        attention_bias: Float ``[..., K]``; read detached, in fp32.
        attention_mask: Bool, broadcastable with the bias, True = allowed; ``None`` allows all.
        window_size: Keys to keep, at least 1; a row with fewer allowed keys keeps them all.
        min_dtype: A key whose bias equals this value counts as not allowed.
        block_size: If given, `block_smooth` the result in blocks of that many keys.
        newer_wins: Which of two equal biases is preferred: the higher position or the lower.

    Returns:
        Bool, the broadcast shape of bias and mask.
    """
    check_count("window_size", window_size, 1)
    allowed = _allowed_keys(attention_bias, attention_mask, min_dtype)
    order = order_key(attention_bias.detach().float()).masked_fill(~allowed, _NEVER_CHOSEN)
    if window_size >= order.shape[-1]:
        chosen = allowed
    else:
        threshold = order.topk(window_size, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        above, tied = order > threshold, order == threshold
        places = window_size - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
        chosen = (above | (tied & (_rank_among_tied(tied, newer_wins) <= places))) & allowed
    return _smoothed(chosen, allowed, block_size)


def relu_mask(
    attention_bias: Tensor,
    attention_mask: Tensor | None,
    min_dtype: float,
    block_size: int | None = None,
) -> Tensor:
    """The allowed keys whose bias is above zero; a NaN bias is not.

    Args:
        attention_bias: Float ``[..., K]``; read detached.
        attention_mask: Bool, broadcastable with the bias, True = allowed; ``None`` allows all.
        min_dtype: A key whose bias equals this value counts as not allowed.
        block_size: If given, `block_smooth` the result in blocks of that many keys.

    Returns:
        Bool, the broadcast shape of bias and mask.
    """
    allowed = _allowed_keys(attention_bias, attention_mask, min_dtype)
    return _smoothed((attention_bias.detach() > 0) & allowed, allowed, block_size)


def block_smooth(
    attention_mask: Tensor, key_len: int, block_size: int, *, allowed: Tensor | None = None
) -> Tensor:
    """Keep or drop whole blocks of keys, by strict majority.

    A block becomes all True if more than half of its keys are True, else all False; the last,
    shorter block is judged by its own length. A row that would lose all its keys stays as it was.

    Args:
        attention_mask: Bool ``[..., key_len]``; not modified.
        key_len: Length of the last dimension.
        block_size: Keys per block, at least 1; 1 changes nothing.
        allowed: Bool, broadcastable to `attention_mask`; a key outside stays False.

    Returns:
        Bool, the shape of `attention_mask`.

    Raises:
        TypeError, ValueError: `block_size` is not an int of at least 1, or `key_len` is wrong.
    """
    check_count("block_size", block_size, 1)
    if attention_mask.shape[-1] != key_len:
        raise ValueError(
            "key_len: expected the last dimension of attention_mask, "
            f"{attention_mask.shape[-1]}, got {key_len}"
        )
    device = attention_mask.device
    block_of_key = torch.arange(key_len, device=device) // block_size
    n_blocks = -(-key_len // block_size)
    block_length = torch.full((n_blocks,), block_size, device=device)
    block_length[-1:] = key_len - (n_blocks - 1) * block_size
    counts = torch.zeros((*attention_mask.shape[:-1], n_blocks), dtype=torch.int32, device=device)
    counts.index_add_(-1, block_of_key, attention_mask.int())
    smoothed = (2 * counts > block_length)[..., block_of_key]
    if allowed is not None:
        smoothed = smoothed & allowed
    return torch.where(smoothed.any(dim=-1, keepdim=True), smoothed, attention_mask)


def create_mask(
    attention_bias: Tensor,
    attention_mask: Tensor | None,
    batch_size: int,
    query_len: int,
    key_len: int,
    window_size: int,
    min_dtype: float,
    block_size: int | None = None,
    type: str = "topk",
) -> Tensor:
    """The keys worth attending, by their bias, as a boolean attention mask.

    With a bias ``[B, Hkv, 1, key_len]`` and no mask, or one that is the same for all queries, one
    choice is made for all queries from the whole sequence: a causal model that uses it **leaks the
    future into the choice**. With a causal mask ``[1, 1, query_len, key_len]``, every query chooses
    within its prefix.

    Args:
        attention_bias: Float ``[{1|B}, heads, {1|query_len}, key_len]``; read detached, in fp32.
        attention_mask: Bool, True = allowed: ``[B, key_len]``; or ``[B, query_len]``, which allows
            all keys before the queries; or ``[{1|B}, {1|heads}, {1|query_len}, {1|key_len}]``.
            ``None`` allows all.
        batch_size: B.
        query_len: Number of queries.
        key_len: Number of keys.
        window_size: Keys to keep for each query, at least 1; more than `key_len` means all.
            ``"relu"`` has no such bound.
        min_dtype: A key whose bias equals this value counts as not allowed.
        block_size: If given, whole blocks of keys are kept or dropped by majority, see
            `block_smooth`; a key that is not allowed stays False.
        type: ``"topk"``, the `window_size` largest; or ``"relu"``, all above zero.

    Returns:
        Bool, the broadcast shape of bias and mask; True = attend.

    Raises:
        TypeError, ValueError: A tensor or an option is not as described.
    """
    if type not in ("topk", "relu"):
        raise ValueError(f"type: expected 'topk' or 'relu', got {type!r}")
    check_count("window_size", window_size, 1)
    _check_bias(attention_bias, batch_size, query_len, key_len)
    heads = attention_bias.shape[1]
    mask = None
    if attention_mask is not None:
        mask = _mask_4d(attention_mask, batch_size, heads, query_len, key_len)
    if type == "relu":
        return relu_mask(attention_bias, mask, min_dtype, block_size)
    own_keys = query_len == 1 or (mask is not None and mask.shape[2] == query_len)
    return topk_mask(attention_bias, mask, window_size, min_dtype, block_size, newer_wins=own_keys)


def _allowed_keys(bias: Tensor, mask: Tensor | None, min_dtype: float) -> Tensor:
    """Bool, the broadcast shape: allowed by the mask and not marked by `min_dtype`."""
    # In fp32, because min_dtype may be the minimum of a wider dtype than the bias has.
    unmarked = bias.detach().float() != min_dtype
    return unmarked if mask is None else unmarked & mask


def _rank_among_tied(tied: Tensor, newer_wins: bool) -> Tensor:
    """int32: each tied key's place among the tied keys of its row, the preferred one first."""
    if newer_wins:
        return tied.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
    return tied.cumsum(dim=-1, dtype=torch.int32)


def _smoothed(chosen: Tensor, allowed: Tensor, block_size: int | None) -> Tensor:
    if block_size is None:
        return chosen
    return block_smooth(chosen, chosen.shape[-1], block_size, allowed=allowed)


def _check_bias(bias: Tensor, batch_size: int, query_len: int, key_len: int) -> None:
    check_tensor("attention_bias", bias, "[{1|B}, heads, {1|query_len}, key_len]")
    if not bias.is_floating_point():
        raise TypeError(f"attention_bias: expected a floating dtype, got {bias.dtype}")
    batch, _, queries, keys = bias.shape
    if batch not in (1, batch_size) or queries not in (1, query_len) or keys != key_len:
        raise ValueError(
            "attention_bias: expected [{1|B}, heads, {1|query_len}, key_len] = "
            f"[1 or {batch_size}, heads, 1 or {query_len}, {key_len}], got {tuple(bias.shape)}"
        )


def _mask_4d(mask: Tensor, batch_size: int, heads: int, query_len: int, key_len: int) -> Tensor:
    """The mask as a 4-D bool tensor that broadcasts against the bias."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask: expected torch.bool (True = allowed), got {mask.dtype}; "
            "use .bool() on a mask of zeros and ones"
        )
    shape = tuple(mask.shape)
    if shape == (batch_size, key_len):
        return mask[:, None, None, :]
    if shape == (batch_size, query_len) and query_len < key_len:
        before_queries = mask.new_ones(batch_size, key_len - query_len)
        return torch.cat([before_queries, mask], dim=1)[:, None, None, :]
    if mask.dim() == 4:
        full = (batch_size, heads, query_len, key_len)
        fits = [size in (1, expected) for size, expected in zip(shape, full, strict=True)]
        if all(fits) or (heads == 1 and fits[0] and fits[2] and fits[3]):
            return mask
    raise ValueError(
        f"attention_mask: expected [B, key_len] = ({batch_size}, {key_len}), [B, query_len] = "
        f"({batch_size}, {query_len}) or 4-D, each dimension 1 or that of "
        f"[B, heads, query_len, key_len] = ({batch_size}, {heads}, {query_len}, {key_len}), "
        f"got {shape}"
    )
