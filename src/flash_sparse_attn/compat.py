"""What the predecessors' programs need besides: their names, keywords and masks.

Version 1.x had one function per backend, each with its own argument order. They are kept as named
backends: each runs on that backend or raises with the reasons. `flash_sparse_attn_func_auto` gives
every backend the same argument order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from flash_sparse_attn.attention import flash_sparse_attn_func
from flash_sparse_attn.dispatch import get_available_backends

_OLD_KEYWORDS = {"q": "query", "k": "key", "v": "value", "scale": "softmax_scale"}

_BACKEND_FLAGS = {
    "CUDA_AVAILABLE": "cuda",
    "TRITON_AVAILABLE": "triton",
    "FLEX_AVAILABLE": "flex",
}


def triton_sparse_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_sparse_attn_func` on the Triton backend, in version 1's argument order.

    Args:
        query: ``[B, Q, H, D]``.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        attn_mask: Bool, broadcastable to ``[B, H, Q, K]``, True = visible.
        attn_bias: Broadcastable to ``[B, H, Q, K]``, added to the scaled scores.
        is_causal: Hide keys after the query's position ``i + K - Q``.
        softmax_scale: Default ``D ** -0.5``.

    Returns:
        ``[B, Q, H, D]`` in the dtype of `query`.

    Raises:
        RuntimeError: The Triton backend cannot run here; the message says why.
    """
    return _on_backend("triton", query, key, value, attn_mask, attn_bias, is_causal, softmax_scale)


def flex_sparse_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_sparse_attn_func` on the FlexAttention backend, in version 1's argument order.

    Args:
        query: ``[B, Q, H, D]``.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        attn_mask: Bool, broadcastable to ``[B, H, Q, K]``, True = visible.
        attn_bias: Broadcastable to ``[B, H, Q, K]``, added to the scaled scores.
        is_causal: Hide keys after the query's position ``i + K - Q``. ``None`` means True, as it
            did in version 1 of this one function.
        softmax_scale: Default ``D ** -0.5``.

    Returns:
        ``[B, Q, H, D]`` in the dtype of `query`.

    Raises:
        RuntimeError: The FlexAttention backend cannot run here; the message says why.
    """
    causal = True if is_causal is None else is_causal
    return _on_backend("flex", query, key, value, attn_mask, attn_bias, causal, softmax_scale)


def _on_backend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    softmax_scale: float | None,
) -> Tensor:
    # The other functions take the scale in this place, and a float would pass for True.
    if not isinstance(is_causal, bool):
        raise TypeError(
            f"is_causal: expected True or False right after attn_bias, got {is_causal!r}; "
            "softmax_scale comes next, or use keywords"
        )
    return flash_sparse_attn_func(
        query,
        key,
        value,
        attn_mask,
        attn_bias,
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        backend=backend,
    )


def backend_flag(module: str, name: str) -> bool:
    """An old flag such as ``CUDA_AVAILABLE``: whether that backend can run here.

    Meant for a module's ``__getattr__``, so that importing the module does not look for Triton.

    Raises:
        AttributeError: `name` is no such flag; worded as for any missing attribute of `module`.
    """
    if name not in _BACKEND_FLAGS:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _BACKEND_FLAGS[name] in get_available_backends()


def accept_old_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an attention function take the keywords ``q k v scale`` and version 1.0's float masks.

    Args:
        function: Has parameters of the present names, `attn_mask` among them.

    Returns:
        The same function, with a `TypeError` for an argument given under both its names.
    """
    names = list(inspect.signature(function).parameters)
    mask_at = names.index("attn_mask")

    @wraps(function)
    def with_old_arguments(*args: Any, **kwargs: Any) -> Any:
        for old, new in _OLD_KEYWORDS.items():
            if old not in kwargs:
                continue
            if new in kwargs or names.index(new) < len(args):
                raise TypeError(f"{old}: expected {old} or {new}, the same argument, got both")
            kwargs[new] = kwargs.pop(old)
        if len(args) > mask_at:
            args = (*args[:mask_at], bool_mask(args[mask_at]), *args[mask_at + 1 :])
        elif "attn_mask" in kwargs:
            kwargs["attn_mask"] = bool_mask(kwargs["attn_mask"])
        return function(*args, **kwargs)

    return with_old_arguments


def bool_mask(attn_mask: Any) -> Any:
    """Version 1.0's mask, a float tensor of 1 = visible and 0 = hidden, as bool.

    Anything else is returned as it came. Looking at the values synchronises with a GPU; a bool mask
    avoids that.

    Raises:
        ValueError: A float mask holds another value than 0 and 1.
    """
    if not (isinstance(attn_mask, Tensor) and attn_mask.is_floating_point()):
        return attn_mask
    visible = attn_mask == 1
    # An additive mask (0 = visible, -inf = hidden) would be read the wrong way round.
    strange = attn_mask[~visible & (attn_mask != 0)]
    if strange.numel():
        raise ValueError(
            f"attn_mask: expected only 1 (visible) and 0 (hidden) in a mask of {attn_mask.dtype}, "
            f"got {strange[0].item():g}; pass a bool mask, and additive terms as attn_bias"
        )
    return visible
