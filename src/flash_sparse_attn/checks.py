"""Argument checks. Messages name the argument, what was expected, what came and the remedy."""

from __future__ import annotations

import math
import os
import warnings

import torch
from torch import Tensor

from .intervals import KeySelection

MAX_HEAD_DIM = 256


def looks_at_values(tensor: Tensor) -> bool:
    """Whether values may be inspected: on CPUs always, on GPUs (a sync) only when asked for."""
    if tensor.is_meta or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("FLASH_SPARSE_ATTN_CHECK") == "1"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensor(name: str, value: object, form: str, *, optional: bool = False) -> None:
    """`value` is a tensor with as many dimensions as `form`, e.g. ``"[B, Q, H, D]"``, names."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(value).__name__}")
    rank = form.count(",") + 1
    if value.dim() != rank:
        raise ValueError(
            f"{name}: expected {rank} dimensions {form}, "
            f"got {value.dim()} with shape {_shape(value)}"
        )


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, packed: bool = False) -> None:
    """Ranks, dtypes, devices, head counts and head dimension of query, key and value."""
    forms = ("[T, H, D]", "[T, Hkv, D]") if packed else ("[B, Q, H, D]", "[B, K, Hkv, D]")
    for name, tensor, form in (
        ("query", query, forms[0]),
        ("key", key, forms[1]),
        ("value", value, forms[1]),
    ):
        check_tensor(name, tensor, form)
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}; cast it"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name}: expected the device of query, {query.device}, "
                f"got {tensor.device}; move it"
            )
    if key.shape != value.shape:
        raise ValueError(f"value: expected the shape of key, {_shape(key)}, got {_shape(value)}")
    if not packed and key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key: expected batch size {query.shape[0]} as in query, got {key.shape[0]}"
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key: expected KV heads that divide the {heads} query heads, got {kv_heads}; "
            "query is [B, Q, H, D], key is [B, K, Hkv, D]"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: expected head dimension {query.shape[-1]} as in query, got {key.shape[-1]}"
        )
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"query: expected 1 <= D <= {MAX_HEAD_DIM}, got D = {query.shape[-1]}")
    if not packed and heads > 256 and heads > query.shape[1]:
        warnings.warn(
            f"query has {heads} heads and length {query.shape[1]}: it looks like [B, H, S, D]; "
            "expected [B, S, H, D], use .transpose(1, 2)",
            stacklevel=5,
        )


def check_broadcast(
    name: str, tensor: Tensor, shape: tuple[int, int, int, int], kv_heads: int
) -> None:
    """`tensor` is 4-D and every dimension is 1 or full; heads may be 1, Hkv or H."""
    form = "({1|B}, {1|Hkv|H}, {1|Q}, {1|K})"
    check_tensor(name, tensor, form)
    batch, heads, query_len, key_len = shape
    # Tuples, not sets: hashing a symbolic size would make a compiler treat it as a constant.
    allowed = ((1, batch), (1, kv_heads, heads), (1, query_len), (1, key_len))
    for dim, sizes in enumerate(allowed):
        if tensor.shape[dim] not in sizes:
            expected = " or ".join(str(size) for size in sorted(set(sizes)))
            raise ValueError(
                f"{name}: expected {form} = broadcastable to {shape} with {kv_heads} KV heads, "
                f"got {_shape(tensor)}: dimension {dim} has to be {expected}"
            )


def check_mask(
    mask: Tensor, shape: tuple[int, int, int, int], kv_heads: int, device: torch.device
) -> None:
    """`attn_mask` is bool, on the device of query and broadcastable."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            "attn_mask: expected a bool tensor, a KeySelection or None, "
            f"got {type(mask).__name__}; "
            "a KeySelection takes no second mask: give select_keys a key_mask or cu_seqlens"
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask: expected torch.bool (True = visible), got {mask.dtype}; "
            "pass mask.bool(), or an additive mask as attn_bias"
        )
    check_broadcast("attn_mask", mask, shape, kv_heads)
    if mask.device != device:
        raise ValueError(f"attn_mask: expected device {device}, got {mask.device}; move it")


def check_bias(
    bias: Tensor, shape: tuple[int, int, int, int], kv_heads: int, query: Tensor
) -> None:
    """`attn_bias` is fp16, bf16 or fp32 (fp64 with fp64 queries) and broadcastable."""
    if isinstance(bias, Tensor):
        allowed = [torch.float16, torch.bfloat16, torch.float32]
        if query.dtype == torch.float64:
            allowed.append(torch.float64)
        if bias.dtype not in allowed:
            names = ", ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"attn_bias: expected one of {names}, got {bias.dtype}; cast it")
    check_broadcast("attn_bias", bias, shape, kv_heads)
    if bias.device != query.device:
        raise ValueError(f"attn_bias: expected device {query.device}, got {bias.device}; move it")


def check_bias_values(bias: Tensor, visible: Tensor) -> None:
    """No visible key has a NaN or +inf bias."""
    bad = visible & (bias.isnan() | (bias == torch.inf))
    if bad.any():
        raise ValueError(
            f"attn_bias: expected finite values or -inf, got {int(bad.sum())} NaN or +inf on "
            "visible keys; use -inf or attn_mask to hide a key"
        )


def resolve_causality(mask: object, is_causal: bool | None) -> bool:
    """What `is_causal` means with this mask: a causal selection brings its own causality."""
    if is_causal is not None and not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected True, False or None, got {is_causal!r}")
    if isinstance(mask, KeySelection):
        return mask.resolve_causality(is_causal)
    return bool(is_causal)


def check_selection(
    selection: KeySelection,
    batch: int,
    kv_heads: int,
    key_len: int,
    device: torch.device,
    packed: bool,
) -> None:
    """The selection was made for these keys."""
    if packed != (selection.cu_seqlens is not None):
        expected = "made with cu_seqlens" if packed else "made without cu_seqlens"
        raise ValueError(
            f"attn_mask: expected a KeySelection {expected}, got {selection!r}; "
            "packed selections go with flash_sparse_attn_varlen_func"
        )
    expected_shape = (kv_heads, key_len) if packed else (batch, kv_heads, key_len)
    if tuple(selection.start.shape) != expected_shape:
        form = "[Hkv, total_k]" if packed else "[B, Hkv, K]"
        raise ValueError(
            f"attn_mask: expected a KeySelection of {form} = {expected_shape}, got "
            f"{_shape(selection.start)}; select with one score per key and KV head"
        )
    if selection.start.device != device:
        raise ValueError(
            f"attn_mask: expected a KeySelection on {device}, got {selection.start.device}; "
            "use selection.to(device)"
        )


def check_same_borders(selection: KeySelection, cu_seqlens_k: Tensor) -> None:
    """A packed selection was made with the borders of the call."""
    borders = selection.cu_seqlens
    if borders is None or not looks_at_values(cu_seqlens_k):
        return
    if borders.shape != cu_seqlens_k.shape or bool((borders != cu_seqlens_k).any()):
        raise ValueError(
            f"attn_mask: expected a KeySelection made with cu_seqlens_k = {cu_seqlens_k.tolist()}, "
            f"got one made with {borders.tolist()}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """int32 borders ``0 = c_0 <= c_1 <= ... = total`` on the right device."""
    check_tensor(name, cu_seqlens, "[N + 1]")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {cu_seqlens.dtype}; use .int()")
    if cu_seqlens.device != device:
        raise ValueError(f"{name}: expected device {device}, got {cu_seqlens.device}; move it")
    if cu_seqlens.numel() < 1:
        raise ValueError(f"{name}: expected at least one border [N + 1], got none")
    if looks_at_values(cu_seqlens):
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != total:
            raise ValueError(
                f"{name}: expected borders from 0 to the {total} packed tokens, "
                f"got {borders[0]} to {borders[-1]}"
            )
        if borders != sorted(borders):
            raise ValueError(f"{name}: expected borders that never decrease, got {borders}")


def check_max_seqlen(name: str, max_seqlen: int, cu_seqlens: Tensor) -> None:
    """A Python int that no sequence exceeds."""
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(max_seqlen).__name__}")
    if looks_at_values(cu_seqlens):
        longest = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        if longest > max_seqlen:
            raise ValueError(
                f"{name}: expected at least the longest sequence, {longest}, got {max_seqlen}"
            )


def check_key_mask(key_mask: Tensor, expected: tuple[int, ...], device: torch.device) -> None:
    """Bool, True for real tokens, one value per key."""
    form = "[B, K]" if len(expected) == 2 else "[total_k]"
    check_tensor("key_mask", key_mask, form)
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask: expected torch.bool (True = real token), got {key_mask.dtype}; use .bool()"
        )
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_mask: expected {form} = {expected}, got {_shape(key_mask)}")
    if key_mask.device != device:
        raise ValueError(f"key_mask: expected device {device}, got {key_mask.device}; move it")


def check_count(name: str, value: int, least: int) -> None:
    """An int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_selection_arguments(
    scores: Tensor,
    window_size: int,
    mode: str,
    modes: tuple[str, ...],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_first: int,
    keep_recent: int,
) -> None:
    """The arguments of `select_keys`."""
    packed = cu_seqlens is not None
    check_tensor("scores", scores, "[Hkv, total_k]" if packed else "[B, Hkv, K]")
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    check_count("window_size", window_size, 1)
    check_count("keep_first", keep_first, 0)
    check_count("keep_recent", keep_recent, 0)
    if mode not in modes:
        raise ValueError(f"mode: expected one of {', '.join(modes)}, got {mode!r}")
    if key_mask is not None:
        expected = (scores.shape[-1],) if packed else (scores.shape[0], scores.shape[-1])
        check_key_mask(key_mask, expected, scores.device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, scores.shape[-1], scores.device)
    if looks_at_values(scores):
        bad = scores.isnan()
        if key_mask is not None:
            bad = bad & key_mask.unsqueeze(-2)
        if bad.any():
            raise ValueError(
                f"scores: expected numbers, got {int(bad.sum())} NaN on real tokens; "
                "look for an overflow or a division by zero where the scores are made"
            )


def check_scores(scores: Tensor, key: Tensor, *, packed: bool = False) -> None:
    """Scores have one number per key and KV head."""
    form = "[Hkv, total_k]" if packed else "[B, Hkv, K]"
    check_tensor("key", key, "[T, Hkv, D]" if packed else "[B, K, Hkv, D]")
    check_tensor("scores", scores, form)
    expected = (
        (key.shape[1], key.shape[0]) if packed else (key.shape[0], key.shape[2], key.shape[1])
    )
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"scores: expected {form} = {expected}, one score per key and KV head, "
            f"got {_shape(scores)}"
        )
    if scores.device != key.device:
        raise ValueError(f"scores: expected device {key.device}, got {scores.device}; move them")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or None, got {value!r}")


def check_options(softmax_scale: float | None, deterministic: bool | None) -> None:
    """A finite scale, and a switch."""
    if softmax_scale is not None:
        _check_number("softmax_scale", softmax_scale)
        if not math.isfinite(softmax_scale):
            raise ValueError(
                f"softmax_scale: expected a finite number or None, got {softmax_scale}"
            )
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: expected True, False or None, got {deterministic!r}")


def check_softcap(softcap: float | None) -> float:
    """`softcap` as a float; 0.0 is off."""
    if softcap is None:
        return 0.0
    _check_number("softcap", softcap)
    softcap = float(softcap)
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected None, 0.0 (off) or a positive number, got {softcap}")
    return softcap
